"""Errors keep class, message and attributes across processes."""

from typing import Any

import msgspec
import pytest

from engines import errors
from engines.errors import EngineError, EngineFailed, InvalidValue, LoadFailed, NonFiniteEmbedding, QueueFull
from engines.rpc.errors import ErrorRecord, error_of, error_record_of

ALL = [cls for cls in vars(errors).values() if isinstance(cls, type) and issubclass(cls, EngineError)]


def crossed(error: Exception) -> EngineError:
    """Encodes the error to bytes and decodes it again."""
    return error_of(msgspec.msgpack.decode(msgspec.msgpack.encode(error_record_of(error)), type=ErrorRecord))


@pytest.mark.parametrize("cls", ALL, ids=lambda cls: cls.__name__)
def test_every_error_crosses_with_all_that_it_carries(cls: type[EngineError]) -> None:
    more: dict[str, Any] = {"index": 7} if cls is NonFiniteEmbedding else {}
    error = cls("9.1 GiB are needed, 7.9 GiB are there", **more)

    back = crossed(error)

    assert (type(back), str(back), vars(back)) == (cls, str(error), vars(error))


def test_what_an_error_carries_beside_its_message_crosses() -> None:
    assert vars(crossed(InvalidValue("no", param="input"))) == {"param": "input"}
    assert vars(crossed(QueueFull("full", retry_after_s=0.25))) == {"retry_after_s": 0.25}
    assert vars(crossed(LoadFailed("no", retry_after_s=40.0, kind="disk_full"))) == {
        "retry_after_s": 40.0,
        "kind": "disk_full",
    }
    assert vars(crossed(NonFiniteEmbedding("nan", index=3))) == {"index": 3}


def test_an_unexpected_error_crosses_without_its_message() -> None:
    """Unexpected messages may hold paths, texts and keys; only the host's log has them."""
    back = crossed(ValueError("/secret/path"))

    assert type(back) is EngineFailed
    assert "ValueError" in str(back)
    assert "secret" not in str(back)


def test_an_error_of_a_newer_version_is_an_engine_failure() -> None:
    back = error_of(ErrorRecord(kind="TooMuchNoise", message="turn it down"))

    assert (type(back), str(back)) == (EngineFailed, "turn it down")
