"""What a load takes of memory, on the host and on a fake GPU: no second copy of the weights, not even for a moment."""

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from sentence_transformers.sentence_transformer.modules import Pooling
from torch import Tensor

from benchmarks.lib import vocabularies
from benchmarks.lib.engine_kit import Kit
from benchmarks.lib.models import bert_config, save, transformer
from engines.batching.engine import EmbeddingEngine
from engines.loading import builders, weight_reader
from engines.loading.loader import LoaderSettings, TorchLoader
from engines.loading.weight_reader import WeightReader
from engines.models.transformer import TransformerEncoder
from engines.spec import ModelSpec
from engines.types import ModelFiles
from tests.testkit.fake_gpu import GPU, twin
from tests.testkit.fake_gpu_families import encoder_of
from tests.testkit.fake_gpu_kit import FakeGpuKit

NUM_LAYERS = 6
ALLOWANCE = 0.2
"""Share of the weights: those of a layer exist twice while they are joined, and one pass of a few tokens runs."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of many layers, each a small part of the whole."""
    folder = tmp_path_factory.mktemp("models") / "deep"
    tokenizer = vocabularies.bert()
    config = bert_config(tokenizer, hidden_size=64, num_hidden_layers=NUM_LAYERS, intermediate_size=768)
    save(folder, transformer(config), tokenizer, [Pooling(64, "mean")])
    return folder


def load(fake: FakeGpuKit, folder: Path) -> EmbeddingEngine:
    loader = TorchLoader(str(GPU), fake.lane, fake.threads, LoaderSettings())
    files = ModelFiles(path=str(folder), revision="r1", size_bytes=0)
    return fake.call(lambda: loader.load(ModelSpec(model_id="m", source=str(folder)), files))


def held(fake: FakeGpuKit) -> dict[str, int]:
    """Returns the bytes held by what is still used."""
    fake.call(lambda: None)  # its thread has then ended the task before, too
    gc.collect()
    return dict(fake.gpu.held_bytes)


def test_a_load_holds_the_weights_once_on_the_host_and_on_the_gpu_together(fake: FakeGpuKit, folder: Path) -> None:
    before = held(fake)
    fake.gpu.reset_peak()

    engine = load(fake, folder)

    peak = {kind: fake.gpu.peak_bytes[kind] - before[kind] for kind in before}
    weights = engine.weight_bytes
    assert 0.9 * weights < peak["cuda"] <= (1 + ALLOWANCE) * weights
    assert 0.9 * weights < peak["cpu"] <= (1 + ALLOWANCE) * weights
    assert peak["both"] <= (1 + ALLOWANCE) * weights
    assert fake.gpu.held_bytes["cpu"] == before["cpu"]


def test_a_second_copy_would_be_seen(fake: FakeGpuKit, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copies: list[Tensor] = []
    place = builders._placed

    def placed(*args: Any) -> Any:
        model, config = place(*args)
        copies.extend(map(torch.clone, model.parameters()))
        return model, config

    monkeypatch.setattr(builders, "_placed", placed)
    before = held(fake)
    fake.gpu.reset_peak()

    engine = load(fake, folder)

    assert fake.gpu.peak_bytes["cuda"] - before["cuda"] > 1.9 * engine.weight_bytes


def test_what_is_charged_is_what_is_held(fake: FakeGpuKit, folder: Path) -> None:
    before = held(fake)["cuda"]

    engine = load(fake, folder)

    assert fake.gpu.held_bytes["cuda"] - before == pytest.approx(engine.weight_bytes, rel=0.01)


def test_an_unloaded_model_leaves_nothing(fake: FakeGpuKit, folder: Path) -> None:
    before = held(fake)["cuda"]
    engine = fake.load(folder)
    assert fake.gpu.held_bytes["cuda"] > before

    engine.close()
    del engine

    assert held(fake)["cuda"] == before


def test_a_canary_of_an_earlier_load_is_compared_on_the_gpu(fake: FakeGpuKit, kit: Kit, tmp_path: Path) -> None:
    settings = LoaderSettings(canary_folder=tmp_path)
    first = fake.load(kit.recipe_folder("bert-cls"), settings)
    fake.gpu.take()
    second = fake.load(kit.recipe_folder("bert-cls"), settings)

    assert (first.info.path, second.info.path, second.info.notes) == ("graphed", "graphed", ())
    assert len(list(tmp_path.iterdir())) == 1
    assert [finding for finding in fake.gpu.take() if finding.kind == "device"] == []


def test_a_path_that_failed_is_checked_again_on_the_gpu(fake: FakeGpuKit, kit: Kit) -> None:
    encoder = encoder_of(fake.load(kit.recipe_folder("bert-cls")))
    assert isinstance(encoder, TransformerEncoder)
    encoder._chosen = encoder.path
    fake.gpu.take()

    fake.call(lambda: encoder.switch_to("unpadded"))
    assert fake.call(encoder._resume)

    assert encoder.path == encoder._chosen == "graphed"
    assert [finding for finding in fake.gpu.take() if finding.kind == "device"] == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_read_in_blocks_onto_the_gpu_where_their_dtype_changes(
    fake: FakeGpuKit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(weight_reader, "STAGING_BYTES", 4096)
    stored = torch.arange(-3000.0, 3000.0).reshape(60, 100) / 7
    save_file({"a": stored}, tmp_path / "model.safetensors")
    with WeightReader(tmp_path, ["model.safetensors"], GPU) as reader:
        before = held(fake)
        fake.gpu.reset_peak()

        made = fake.call(lambda: reader.read("a", dtype))

        peak = {kind: fake.gpu.peak_bytes[kind] - before[kind] for kind in before}
    assert made.device.type == "cuda"
    assert torch.equal(twin(made), stored.to(dtype))
    assert peak["cpu"] <= weight_reader.STAGING_BYTES
    assert peak["cuda"] <= made.nbytes + weight_reader.STAGING_BYTES
