"""A model that is split over two fake GPUs: no tensors of two devices meet. (Fake tensors have no memory to free, so
that layers in main memory are tested on the CPU: `tests/unit/engines/test_split_models.py`.)"""

import asyncio
from pathlib import Path

import numpy as np
import pytest
from sentence_transformers.sentence_transformer.modules import Pooling

from benchmarks.lib import vocabularies
from benchmarks.lib.models import bert_config, save, transformer
from engines.batching.engine import EmbeddingEngine
from engines.loading.loader import LoaderSettings, TorchLoader
from engines.protocols import Placement
from engines.spec import ModelSpec
from engines.types import ModelFiles
from tests.testkit.fake_gpu import GPU
from tests.testkit.fake_gpu_kit import FakeGpuKit

NUM_LAYERS = 4
TEXTS = ("one", "two boats", "three boats in the yard")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "deep"
    tokenizer = vocabularies.bert()
    config = bert_config(tokenizer, hidden_size=64, num_hidden_layers=NUM_LAYERS, intermediate_size=128)
    save(folder, transformer(config), tokenizer, [Pooling(64, "mean")])
    return folder


def load(fake: FakeGpuKit, folder: Path, placement: Placement | None) -> EmbeddingEngine:
    loader = TorchLoader(str(GPU), fake.lane, fake.threads, LoaderSettings(max_batch_tokens=64))
    files = ModelFiles(path=str(folder), revision="r1", size_bytes=0)
    spec = ModelSpec(model_id="m", source=str(folder), dtype="float32")
    if placement is None:
        engine = fake.call(lambda: loader.load(spec, files))
    else:
        engine = fake.call(lambda: loader.load_split(spec, files, placement))
    asyncio.run(engine.warm_up())
    return engine


@pytest.mark.slow
def test_activations_follow_the_layers_from_gpu_to_gpu(fake: FakeGpuKit, folder: Path) -> None:
    whole = load(fake, folder, None)
    expected = np.frombuffer(fake.embed(whole, texts=TEXTS).vectors, dtype=np.float32)
    whole.close()
    fake.gpu.take()

    engine = load(fake, folder, Placement(devices=("cuda:0", "cuda:1"), num_parts=(3, 2)))
    got = np.frombuffer(fake.embed(engine, texts=TEXTS).vectors, dtype=np.float32)

    assert [finding for finding in fake.gpu.take() if finding.kind == "device"] == []
    assert np.abs(got - expected).max() <= 1e-6
    assert engine.info.notes == whole.info.notes
    assert [bool(size) for size in engine.info.share_bytes] == [True, True, False]
    engine.close()
