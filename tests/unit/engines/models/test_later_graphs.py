"""Passes that are recorded again beside requests, on a CPU that imitates CUDA graphs, with two threads."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest

from benchmarks.gpu.parts.swap import wait_for_graphs
from benchmarks.gpu.rig import encoder_of
from benchmarks.lib.engine_kit import Kit
from engines.batching import rest_of_check
from engines.batching.engine import EmbeddingEngine
from engines.batching.request import Entry
from engines.device.scheduler import DeviceScheduler
from engines.loading.loader import LoaderSettings
from engines.types import EmbedCall
from tests.testkit.encoders import FakeGraphCapturer
from tests.testkit.recorded_passes import record_passes

LONGEST_S = 30.0


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> FakeGraphCapturer:
    """Makes models that load run as on a GPU, with recorded passes."""
    monkeypatch.setattr(rest_of_check, "CHECK_AFTER_S", 0.0)
    return record_passes(monkeypatch, 2)


@pytest.fixture
def kit(tmp_path: Path) -> Iterator[Kit]:
    kit = Kit(tmp_path)
    kit.scheduler.close()
    kit.scheduler = DeviceScheduler("two", num_threads=2)
    yield kit
    kit.close()


class Recording:
    """A recording that a test holds up in the middle of its first size."""

    def __init__(self, recorder: FakeGraphCapturer) -> None:
        self.has_begun, self.may_go_on = threading.Event(), threading.Event()
        recorder.before = self._wait

    def _wait(self) -> None:
        self.has_begun.set()
        assert self.may_go_on.wait(LONGEST_S)


@pytest.fixture
def engine(kit: Kit, recorder: FakeGraphCapturer) -> EmbeddingEngine:
    """A model that was parked and has its weights back."""
    engine = kit.load(kit.recipe_folder("bert-cls"), settings=LoaderSettings(copies_parked=True))
    assert encoder_of(engine).path == "graphed"
    encoder_of(engine)._kept = "all"  # as on a GPU
    engine.park()
    engine.wake()
    return engine


def wait_until(is_so: Callable[[], bool]) -> None:
    """Waits for another thread."""
    for _ in range(int(LONGEST_S / 0.001)):
        if is_so():
            return
        time.sleep(0.001)
    raise AssertionError("it takes too long")


async def begun(recording: Recording, engine: EmbeddingEngine) -> None:
    await engine.resume()
    assert await asyncio.to_thread(recording.has_begun.wait, LONGEST_S)


async def test_a_request_waits_for_the_size_that_is_being_recorded_and_is_tried_once(
    engine: EmbeddingEngine, recorder: FakeGraphCapturer, monkeypatch: pytest.MonkeyPatch
) -> None:
    recording, requeued = Recording(recorder), list[object]()
    requeue = engine._queue.requeue

    def counted(texts: Iterable[Entry]) -> None:
        requeued.append(texts)
        requeue(texts)

    monkeypatch.setattr(engine._queue, "requeue", counted)
    await begun(recording, engine)

    request = asyncio.create_task(engine.run(EmbedCall(model_id="m", texts=("one", "two"))))
    await asyncio.to_thread(wait_until, lambda: bool(engine.queue_items))
    recording.may_go_on.set()

    assert np.isfinite((await request).array()).all()
    assert len(requeued) <= 1
    assert await asyncio.to_thread(wait_for_graphs, engine) is not None
    assert (engine.info.path, len(encoder_of(engine).sizes)) == ("graphed", 2)
    engine.close()


@pytest.mark.parametrize("leaves", ["park", "close"])
async def test_a_model_that_leaves_waits_for_the_size_that_is_being_recorded_and_drops_the_rest(
    kit: Kit, engine: EmbeddingEngine, recorder: FakeGraphCapturer, leaves: str
) -> None:
    recording = Recording(recorder)
    await begun(recording, engine)
    num_recorded, encoder = recorder.num_recorded, encoder_of(engine)

    leaving = asyncio.create_task(asyncio.to_thread(getattr(engine, leaves)))
    await asyncio.to_thread(wait_until, lambda: all(each.source is not engine for each in kit.scheduler._usages))
    assert not leaving.done()
    recording.may_go_on.set()
    await leaving

    assert recorder.num_recorded == num_recorded + 1
    assert (encoder.path, encoder.sizes, encoder.passes.is_switch_due) == ("fused", (), False)
    engine.close()
