"""Parking on a fake GPU: weights leave it, passes are recorded again, and vectors stay what they were."""

import asyncio
import gc
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.gpu.parts import swap
from benchmarks.gpu.results import Record
from benchmarks.gpu.rig import Rig
from benchmarks.gpu.runner import PartContext
from benchmarks.lib.engine_kit import Kit
from engines.batching import rest_of_check
from engines.batching.engine import EmbeddingEngine
from engines.errors import SelfCheckFailed
from engines.loading.loader import LoaderSettings, TorchLoader
from engines.models import cuda_graphs, parking
from engines.models.base import ForwardPathFailed, Size
from engines.models.later_graphs import MAX_ATTEMPTS, LaterGraphs
from engines.models.parking import HostCopy
from engines.models.transformer import TransformerEncoder
from tests.testkit.fake_gpu import GPU, twin
from tests.testkit.fake_gpu_families import encoder_of
from tests.testkit.fake_gpu_kit import CPU, FakeGpuKit

TEXTS = ("The cat sits outside.", "x")


@pytest.fixture(autouse=True)
def copies(monkeypatch: pytest.MonkeyPatch) -> list[HostCopy]:
    """Copies the values of the GPU's tensors, which lie in their twins; lists the copies."""
    made: list[HostCopy] = []

    def copy(tensors: Sequence[Tensor], device: torch.device) -> HostCopy:
        assert device == GPU
        assert all(tensor.device == GPU for tensor in tensors)
        made.append(HostCopy([twin(tensor) for tensor in tensors], CPU))
        return made[-1]

    monkeypatch.setattr(parking, "HostCopy", copy)
    return made


def loaded(fake: FakeGpuKit, kit: Kit, recipe: str) -> tuple[EmbeddingEngine, TransformerEncoder]:
    engine = fake.load(kit.recipe_folder(recipe))
    encoder = encoder_of(engine)
    assert isinstance(encoder, TransformerEncoder)
    return engine, encoder


@pytest.fixture
def two_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes of two sizes are recorded."""
    monkeypatch.setattr(cuda_graphs, "SIZES", (*cuda_graphs.SIZES[:1], Size(64, 32)))


@pytest.fixture
def never_due(monkeypatch: pytest.MonkeyPatch) -> None:
    """No step of a recording runs by itself."""
    monkeypatch.setattr(rest_of_check, "CHECK_AFTER_S", 3600.0)


def least_cosine(got: NDArray[np.float32], wanted: NDArray[np.float32]) -> float:
    """The least cosine of two rows. A row of a fixed size takes other kernels, which round bfloat16 otherwise."""
    return float((got * wanted).sum(-1).min())


def come_back(engine: EmbeddingEngine) -> LaterGraphs:
    """Wakes a parked model; returns what records its passes again."""
    engine.wake()
    asyncio.run(engine.resume())
    assert engine._parkable is not None
    assert engine._parkable.graphs is not None
    return engine._parkable.graphs


@pytest.mark.usefixtures("two_sizes", "never_due")
@pytest.mark.parametrize("recipe", ["bert-cls", "qwen3-last"])
def test_a_model_that_comes_back_answers_first_and_records_its_passes_later(
    fake: FakeGpuKit, kit: Kit, recipe: str
) -> None:
    engine, encoder = loaded(fake, kit, recipe)
    before, sizes = fake.embed(engine, texts=TEXTS).array(), encoder.sizes
    charged_bytes, recorded_bytes = engine.weight_bytes, encoder.extra_bytes()

    engine.park()
    fake.gpu.take()
    graphs = come_back(engine)

    assert (engine.info.path, engine.info.checked, encoder.sizes) == ("fused", "all", ())
    assert least_cosine(fake.embed(engine, texts=TEXTS).array(), before) > 0.9999
    for _ in sizes:
        fake.call(graphs.step)
        assert (engine.info.path, encoder.sizes, graphs.is_pending) == ("fused", (), True)
    fake.call(graphs.step)

    assert (engine.info.path, encoder.sizes, graphs.is_pending) == ("graphed", sizes, False)
    assert np.array_equal(fake.embed(engine, texts=TEXTS).array(), before)
    assert (engine.weight_bytes, encoder.extra_bytes()) == (charged_bytes, recorded_bytes)
    assert [finding for finding in fake.gpu.take() if finding.kind == "device"] == []
    engine.close()


@pytest.mark.usefixtures("two_sizes")
def test_the_device_records_the_passes_by_itself_when_no_text_waits(
    fake: FakeGpuKit, kit: Kit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rest_of_check, "CHECK_AFTER_S", 0.0)
    engine, encoder = loaded(fake, kit, "bert-cls")
    before, sizes = fake.embed(engine, texts=TEXTS).array(), encoder.sizes
    engine.park()

    graphs = come_back(engine)
    assert swap.wait_for_graphs(engine) is not None

    assert (encoder.path, encoder.sizes, graphs.is_pending) == ("graphed", sizes, False)
    assert np.array_equal(fake.embed(engine, texts=TEXTS).array(), before)
    engine.close()


@pytest.mark.usefixtures("two_sizes", "never_due")
def test_a_request_is_answered_between_two_steps_of_a_recording(fake: FakeGpuKit, kit: Kit) -> None:
    engine, encoder = loaded(fake, kit, "bert-cls")
    before = fake.embed(engine, texts=TEXTS).array()
    engine.park()
    graphs = come_back(engine)

    fake.call(graphs.step)
    during = fake.embed(engine, texts=TEXTS).array()
    fake.call(graphs.step)
    fake.call(graphs.step)

    assert encoder.path == "graphed"
    assert least_cosine(during, before) > 0.9999
    engine.close()


@pytest.mark.usefixtures("two_sizes", "never_due")
def test_a_model_that_is_parked_during_a_recording_records_all_passes_when_it_comes_back(
    fake: FakeGpuKit, kit: Kit
) -> None:
    engine, encoder = loaded(fake, kit, "bert-cls")
    before, sizes = fake.embed(engine, texts=TEXTS).array(), encoder.sizes
    engine.park()
    graphs = come_back(engine)
    fake.call(graphs.step)
    dropped = graphs._graphs

    engine.park()

    assert dropped is not None
    assert (graphs._graphs, set(twin_bytes(encoder))) == (None, {0})
    assert come_back(engine) is graphs
    for _ in range(len(sizes) + 1):
        fake.call(graphs.step)
    assert (encoder.path, encoder.sizes) == ("graphed", sizes)
    assert np.array_equal(fake.embed(engine, texts=TEXTS).array(), before)
    engine.close()


@pytest.mark.usefixtures("two_sizes", "never_due")
def test_a_model_that_is_unloaded_during_a_recording_leaves_nothing(fake: FakeGpuKit, kit: Kit) -> None:
    engine, encoder = loaded(fake, kit, "bert-cls")
    engine.park()
    graphs = come_back(engine)
    fake.call(graphs.step)
    held: list[weakref.ref[Any]] = [weakref.ref(encoder), weakref.ref(graphs), weakref.ref(graphs._graphs)]

    engine.close()
    del encoder, graphs
    gc.collect()

    assert [each() for each in held] == [None, None, None]


@pytest.mark.usefixtures("two_sizes", "never_due")
def test_recorded_passes_that_are_wrong_are_not_used(
    fake: FakeGpuKit, kit: Kit, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, encoder = loaded(fake, kit, "bert-cls")
    before = fake.embed(engine, texts=TEXTS).array()
    engine.park()
    graphs = come_back(engine)
    recorder = encoder._recorder
    assert recorder is not None, "it is on a GPU"
    record = recorder.record

    def wrong(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        return record(lambda: run().flip(0))

    monkeypatch.setattr(recorder, "record", wrong)

    while graphs.is_pending:
        fake.call(graphs.step)

    assert (engine.info.path, engine.info.is_fallback, encoder.sizes) == ("fused", False, ())
    assert least_cosine(fake.embed(engine, texts=TEXTS).array(), before) > 0.9999
    engine.close()


@pytest.mark.usefixtures("two_sizes", "never_due")
def test_no_memory_for_a_recording_postpones_it_and_ends_it_at_last(
    fake: FakeGpuKit, kit: Kit, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, encoder = loaded(fake, kit, "bert-cls")
    engine.park()
    graphs = come_back(engine)

    def fail(run: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(encoder._recorder, "record", fail)

    for _ in range(MAX_ATTEMPTS - 1):
        with pytest.raises(torch.OutOfMemoryError):
            fake.call(graphs.step)
        assert graphs.is_pending
    fake.call(graphs.step)

    assert (encoder.path, graphs.is_pending) == ("fused", False)
    assert fake.embed(engine, texts=TEXTS).array().shape[0] == len(TEXTS)
    engine.close()


@pytest.mark.usefixtures("never_due")
def test_no_pass_runs_beside_a_step_of_a_recording(fake: FakeGpuKit, kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, encoder = loaded(fake, kit, "bert-cls")
    engine.park()
    graphs = come_back(engine)
    found: list[tuple[bool, int]] = []

    def observe(size: Size) -> None:
        found.append((encoder.is_reentrant, engine.max_concurrent_tasks))
        with pytest.raises(ForwardPathFailed):
            encoder([np.array([1, 2])])

    monkeypatch.setattr(cuda_graphs.CudaGraphs, "add", lambda self, size: observe(size))
    fake.call(graphs.step)

    with encoder.passes.running_pass(), pytest.raises(ForwardPathFailed):
        graphs.step()
    assert found == [(False, 1)]
    assert encoder.is_reentrant
    engine.close()


def twin_bytes(encoder: TransformerEncoder) -> list[int]:
    """The bytes that the tensors of an encoder hold."""
    return [twin(tensor).untyped_storage().nbytes() for tensor in encoder.tensors()]


def test_every_byte_of_a_parked_model_leaves_the_gpu(fake: FakeGpuKit, kit: Kit) -> None:
    engine, encoder = loaded(fake, kit, "bert-cls")
    assert min(twin_bytes(encoder)) > 0

    freed_bytes = engine.park()

    assert set(twin_bytes(encoder)) == {0}
    assert freed_bytes == engine.moved_bytes > 0
    engine.close()


def test_a_model_that_comes_back_with_other_weights_does_not_serve(
    fake: FakeGpuKit, kit: Kit, copies: list[HostCopy]
) -> None:
    engine, _ = loaded(fake, kit, "bert-cls")
    engine.park()
    copies[0]._buffer.zero_()

    engine.wake()
    with pytest.raises(SelfCheckFailed):
        asyncio.run(engine.resume())
    engine.close()


class FakeRig(Rig):
    """The rig of the measurement on a GPU, around a fake one."""

    def __init__(self, fake: FakeGpuKit) -> None:
        self._fake = fake
        self.device, self.lane, self.threads = GPU, fake.lane, fake.threads
        self._loader = TorchLoader(str(GPU), fake.lane, fake.threads, LoaderSettings())
        self._loop = asyncio.new_event_loop()

    def build(self, folder: Path, **spec: Any) -> EmbeddingEngine:
        return self._fake.call(lambda: super(FakeRig, self).build(folder, **spec))

    def close(self) -> None:
        self._loop.close()


def test_the_measurement_of_swaps_times_the_answer_and_the_recorded_passes_after_it(
    fake: FakeGpuKit, kit: Kit, monkeypatch: pytest.MonkeyPatch
) -> None:
    records: list[Record] = []
    context = PartContext("cuda:0", {"size": "small"}, records.append, 60.0)
    monkeypatch.setattr(swap, "Rig", lambda device: FakeRig(fake))
    monkeypatch.setattr(swap, "copy_rate", lambda rig, size: 1e9)
    monkeypatch.setattr(swap, "folder_of", lambda name, device: kit.recipe_folder("bert-cls"))
    monkeypatch.setattr(swap, "raise_lock_limit", lambda: None)
    monkeypatch.setattr(rest_of_check, "CHECK_AFTER_S", 0.05)

    swap.run(context)

    _, found = records
    assert found["path"] == "graphed"
    assert found["worst_cosine"] > 0.9999, "a row of a fixed size rounds otherwise"
    assert found["times"] > found["copy_times"] > 0
    assert found["first_path"] == "fused"
    assert found["graphs_back_s"] > 0
    assert not found["ok"], "nothing was pinned, and the part says so"


def test_the_rate_is_that_of_copies_for_which_the_host_does_not_wait(fake: FakeGpuKit) -> None:
    rig = FakeRig(fake)
    fake.gpu.take()

    with fake.gpu:
        assert swap.copy_rate(rig, 2**16) > 0

    assert {finding.operation for finding in fake.gpu.take()} == {"cuda.synchronize"}
    rig.close()
