"""Parking on a fake GPU: weights leave it, passes are recorded again, and vectors stay what they were."""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.gpu.parts import swap
from benchmarks.gpu.results import Record
from benchmarks.gpu.rig import Rig
from benchmarks.gpu.runner import PartContext
from benchmarks.lib.engine_kit import Kit
from engines.batching.engine import EmbeddingEngine
from engines.errors import SelfCheckFailed
from engines.loading.loader import LoaderSettings, TorchLoader
from engines.models import parking
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


@pytest.mark.parametrize("recipe", ["bert-cls", "qwen3-last"])
def test_a_model_that_comes_back_records_its_passes_again_and_gives_the_same_vectors(
    fake: FakeGpuKit, kit: Kit, recipe: str
) -> None:
    engine, encoder = loaded(fake, kit, recipe)
    before, sizes = fake.embed(engine, texts=TEXTS).array(), encoder.sizes

    engine.park()

    assert (encoder.path, encoder.sizes) == ("packed", ())
    fake.gpu.take()
    engine.wake()
    asyncio.run(engine.resume())

    assert (encoder.path, encoder.sizes) == ("graphed", sizes)
    assert np.array_equal(fake.embed(engine, texts=TEXTS).array(), before)
    assert [finding for finding in fake.gpu.take() if finding.kind == "device"] == []
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


def test_the_measurement_of_swaps_times_recorded_passes_and_plain_ones_on_a_gpu(
    fake: FakeGpuKit, kit: Kit, monkeypatch: pytest.MonkeyPatch
) -> None:
    records: list[Record] = []
    context = PartContext("cuda:0", {"size": "small"}, records.append, 60.0)
    monkeypatch.setattr(swap, "Rig", lambda device: FakeRig(fake))
    monkeypatch.setattr(swap, "copy_rate", lambda rig, size: 1e9)
    monkeypatch.setattr(swap, "folder_of", lambda name, device: kit.recipe_folder("bert-cls"))
    monkeypatch.setattr(swap, "raise_lock_limit", lambda: None)

    swap.run(context)

    _, found = records
    assert found["path"] == "graphed"
    assert found["worst_cosine"] > 0.999999
    assert found["times"] > found["copy_times"] > 0
    assert found["times_without_graphs"] > 0
    assert not found["ok"], "nothing was pinned, and the part says so"


def test_the_rate_is_that_of_copies_for_which_the_host_does_not_wait(fake: FakeGpuKit) -> None:
    rig = FakeRig(fake)
    fake.gpu.take()

    with fake.gpu:
        assert swap.copy_rate(rig, 2**16) > 0

    assert {finding.operation for finding in fake.gpu.take()} == {"cuda.synchronize"}
    rig.close()
