"""The parts that only a GPU can run in earnest, on a CPU whose memory the test takes away."""

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch

from benchmarks.gpu import folders
from benchmarks.gpu.parts import residence
from benchmarks.gpu.results import Record
from benchmarks.gpu.runner import PartContext
from engines.models.transformer import TransformerEncoder

ROOM_TOKENS = 1100
"""Of a batch that still fits when memory is short: half of `BATCH_TOKENS` and a bit."""


@pytest.fixture(scope="module", autouse=True)
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(folders, "ROOT", tmp_path_factory.mktemp("models"))
        torch.set_num_threads(1)
        yield


def _nothing(*_: object) -> None:
    """Stands for what only a GPU does."""


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Figures of a GPU as a test sets them; `fraction`: of its memory that this process may use."""
    figures: dict[str, float] = {"allocated": 1000, "peak": 5000, "fraction": 1.0}
    properties = type("Properties", (), {"total_memory": 10**6})

    def allocated(*_: object) -> float:
        return figures["allocated"]

    def peak(*_: object) -> float:
        return figures["peak"]

    def get_properties(*_: object) -> object:
        return properties

    def set_fraction(fraction: float, device: object) -> None:
        figures["fraction"] = fraction

    for name, found in {
        "memory_allocated": allocated,
        "memory_reserved": allocated,
        "max_memory_allocated": peak,
        "reset_peak_memory_stats": _nothing,
        "empty_cache": _nothing,
        "get_device_properties": get_properties,
        "set_per_process_memory_fraction": set_fraction,
    }.items():
        monkeypatch.setattr(torch.cuda, name, found)
    return figures


@pytest.fixture
def scarce(monkeypatch: pytest.MonkeyPatch, held: dict[str, float]) -> None:
    """Makes passes of more than `ROOM_TOKENS` fail while the process may not use all of the memory."""
    run = TransformerEncoder.__call__

    def call(self: TransformerEncoder, texts: Sequence[Any], *rest: Any) -> torch.Tensor:
        if held["fraction"] < 1.0 and sum(map(len, texts)) > ROOM_TOKENS:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return run(self, texts, *rest)

    monkeypatch.setattr(TransformerEncoder, "__call__", call)


def recorded(part: Any) -> list[Record]:
    records: list[Record] = []
    part(PartContext("cpu", {"size": "small"}, records.append, 60.0))
    return records


@pytest.mark.usefixtures("scarce")
def test_halves_of_a_batch_run_and_the_limit_comes_back(held: dict[str, float]) -> None:
    (found,) = recorded(residence.out_of_memory)

    assert found["ok"]
    assert found["limit_tokens"] <= ROOM_TOKENS < found["batch_tokens"] == found["limits_with_time"][-1]
    assert found["worst_cosine"] > 0.999999
    assert held["fraction"] == 1.0


@pytest.mark.usefixtures("held")
def test_memory_that_was_never_short_shows_no_halves() -> None:
    (found,) = recorded(residence.out_of_memory)

    assert not found["ok"]
    assert found["limit_tokens"] == found["batch_tokens"]


@pytest.mark.parametrize(("peak", "is_ok"), [(5000, True), (10**12, False)])
def test_two_bulk_requests_are_compared_with_the_workspace_that_is_charged(
    held: dict[str, float], peak: int, is_ok: bool
) -> None:
    held["peak"] = peak

    found = {record["what"]: record for record in recorded(residence.memory)}

    assert found["two bulk requests"]["peak_bytes"] == peak - 1000
    assert found["two bulk requests"]["ok"] == is_ok
    assert found["after it left"]["ok"]


def test_a_model_that_serves_is_watched_while_others_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(residence, "NUM_LOADS_BESIDE", 1)

    (found,) = recorded(residence.capture)

    assert found["errors"] == []
    assert found["worst_cosine"] > 0.999999
    assert found["calls_while_recording"] > 0
    assert not found["ok"], "a CPU records no graphs, and the part says so"
