"""Weights that move to main memory and back, on the CPU, where both are the same."""

import asyncio
import resource
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from structlog.testing import capture_logs
from torch import nn

from benchmarks.lib.engine_kit import Kit, embed
from engines.batching.engine import EmbeddingEngine
from engines.errors import EngineFailed, SelfCheckFailed
from engines.loading.loader import LoaderSettings
from engines.models import parking
from engines.models.parking import HostCopy, PinnedMemory
from engines.testing.fakes import FakeMemory
from engines.types import EmbedCall, Result

CPU = torch.device("cpu")
COPYING = LoaderSettings(copies_parked=True)
TEXTS = ["The cat sits outside.", "A man is playing guitar, and nobody listens.", "x"]


def test_freed_weights_come_back_with_their_views_and_ties() -> None:
    joined = torch.arange(12.0).reshape(4, 3)
    first, tied = joined[:2], nn.Parameter(joined)
    copy = HostCopy([joined, tied, first], CPU)
    assert joined.untyped_storage().nbytes() == 0

    copy.restore()

    assert torch.equal(joined, torch.arange(12.0).reshape(4, 3))
    assert torch.equal(first, torch.arange(6.0).reshape(2, 3))
    assert tied.data_ptr() == joined.data_ptr()


def test_memory_that_is_shared_is_counted_once() -> None:
    joined = torch.zeros(100, dtype=torch.bfloat16)

    copy = HostCopy([joined, joined[10:], torch.zeros(3, dtype=torch.int64)], CPU)

    assert copy.moved_bytes == 224


def test_weights_that_torch_cannot_free_stay_where_they_are_on_a_cpu() -> None:
    array = np.arange(6, dtype=np.float32)

    copy = HostCopy([torch.from_numpy(array)], CPU)

    assert copy.moved_bytes == 0
    assert array.sum() == 15


def test_weights_that_torch_cannot_free_are_refused_on_a_gpu() -> None:
    with pytest.raises(EngineFailed, match="cannot be freed"):
        HostCopy([torch.from_numpy(np.zeros(3))], torch.device("meta"))


def test_pinned_memory_is_bounded_and_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    registered: list[int] = []

    def register(buffer: torch.Tensor) -> int:
        registered.append(buffer.nbytes)
        return 0

    monkeypatch.setattr(parking, "_register", register)
    monkeypatch.setattr(parking, "_unregister", lambda buffer: registered.remove(buffer.nbytes))
    pinned = PinnedMemory(limit_bytes=100)
    first, second = torch.zeros(80, dtype=torch.uint8), torch.zeros(40, dtype=torch.uint8)

    assert pinned.pin(first)
    assert not pinned.pin(second)
    pinned.unpin(first)
    assert pinned.pin(second)

    assert (registered, pinned.used_bytes) == ([40], 40)


@pytest.mark.parametrize(
    ("locked_bytes", "expected"), [(resource.RLIM_INFINITY, 500), (8, 8), (800, 500), (0, 0)]
)  # fmt: skip
def test_pinned_memory_is_a_part_of_main_memory_and_no_more_than_may_be_locked(
    monkeypatch: pytest.MonkeyPatch, locked_bytes: int, expected: int
) -> None:
    monkeypatch.setattr(parking, "device_memory", lambda device: FakeMemory(1000))
    monkeypatch.setattr(resource, "getrlimit", lambda which: (locked_bytes, resource.RLIM_INFINITY))

    assert parking.pinned_limit_bytes() == expected


def test_weights_beyond_what_may_be_locked_stay_pageable_and_the_log_says_how_to_change_that(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(parking, "_register", lambda buffer: 0)
    monkeypatch.setattr(resource, "getrlimit", lambda which: (50, 50))

    with capture_logs() as lines:
        assert not PinnedMemory().pin(torch.zeros(80, dtype=torch.uint8))

    (line,) = lines
    assert (line["event"], line["bytes"], line["limit_bytes"]) == ("parking.not_pinned", 80, 50)
    assert "--ulimit memlock=-1" in line["remedy"]


def test_memory_that_cuda_does_not_pin_stays_pageable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parking, "_register", lambda buffer: 2)
    pinned = PinnedMemory(limit_bytes=100)

    assert not pinned.pin(torch.zeros(80, dtype=torch.uint8))
    assert pinned.used_bytes == 0


def park_and_wake(engine: EmbeddingEngine) -> None:
    engine.park()
    engine.wake()
    asyncio.run(engine.resume())


REDUCED: list[tuple[str, dict[str, Any]]] = [
    ("bert-cls", {"dtype": "bfloat16", "min_cosine": 0.0}),
    ("bert-cls", {"dtype": "int8", "min_cosine": 0.0}),
]
NAMES = ("bert-dense-residual", "qwen3-last", "static", "jamba-mean", "nomic-mean", "modernbert-cls")


@pytest.mark.parametrize(("recipe", "spec"), [*((name, {}) for name in NAMES), *REDUCED])
def test_a_woken_engine_gives_the_same_vectors_without_its_files(
    kit: Kit, tmp_path: Path, recipe: str, spec: dict[str, Any]
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(kit.recipe_folder(recipe), folder)
    engine = kit.load(folder, settings=COPYING, **spec)
    before = embed(engine, TEXTS)
    shutil.rmtree(folder)

    for _ in range(2):
        park_and_wake(engine)

        assert np.array_equal(embed(engine, TEXTS), before)
    engine.close()


def test_a_woken_engine_answers_flex_requests_too(kit: Kit) -> None:
    engine = kit.load(kit.recipe_folder("bert-cls"), settings=COPYING)
    park_and_wake(engine)

    async def ask() -> Result:
        return await asyncio.wait_for(engine.run(EmbedCall(model_id="m", texts=tuple(TEXTS), is_flex=True)), 30)

    assert np.abs(asyncio.run(ask()).array() - embed(engine, TEXTS)).max() < 1e-6
    engine.close()


def test_a_parked_engine_holds_none_of_what_was_moved(kit: Kit) -> None:
    engine = kit.load(kit.recipe_folder("bert-cls"), settings=COPYING, dtype="bfloat16", min_cosine=0.0)

    host_bytes = engine.park()

    assert host_bytes == engine.weight_bytes
    assert engine._parkable is not None
    assert engine._parkable._copy is not None
    assert engine._parkable._copy.moved_bytes > 0
    engine.close()


def test_weights_stay_in_place_on_a_cpu_and_nothing_is_checked_again(kit: Kit) -> None:
    engine = kit.load(kit.recipe_folder("bert-cls"))
    before = embed(engine, TEXTS)
    assert engine._parkable is not None

    host_bytes = engine.park()

    assert (host_bytes, engine.moved_bytes) == (engine.weight_bytes, 0)
    engine.wake()
    engine._parkable._check = lambda: pytest.fail("there is nothing to check")
    asyncio.run(engine.resume())
    assert np.array_equal(embed(engine, TEXTS), before)
    engine.close()


def test_an_engine_that_comes_back_with_other_weights_is_not_served(kit: Kit) -> None:
    engine = kit.load(kit.recipe_folder("bert-cls"), settings=COPYING, dtype="bfloat16", min_cosine=0.0)
    engine.park()
    assert engine._parkable is not None
    assert engine._parkable._copy is not None
    largest = max(engine._parkable._copy._places(), key=len)
    largest.view(torch.int16).bitwise_xor_(0x8)  # a bit of each number's mantissa
    engine.wake()

    with pytest.raises(SelfCheckFailed, match="after waking"):
        asyncio.run(engine.resume())
    engine.close()


def test_an_engine_on_its_fallback_path_is_not_parked(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = kit.load(kit.recipe_folder("bert-cls"), settings=COPYING)
    assert engine._parkable is not None
    engine._parkable._encoder.passes.report_failure()  # type: ignore[attr-defined]  # a path that fails in service

    with pytest.raises(EngineFailed, match="fallback path"):
        engine.park()
    engine.close()
