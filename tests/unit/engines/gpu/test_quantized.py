"""Tests int8 weights on the fake GPU: no host syncs, no mixed devices, and vectors near float32's."""

import numpy as np
import pytest
import torch

from benchmarks.gpu.rig import encoder_of
from benchmarks.lib.engine_kit import Kit, cosines, encode
from benchmarks.lib.models import RECIPES
from benchmarks.lib.workloads import SENTENCES
from engines.errors import UnsupportedModel
from engines.layers.packed_linear import Int8Embedding
from engines.layers.weight_only import Int8WeightLinear
from engines.models.base import weight_bytes
from tests.testkit.fake_gpu_kit import FakeGpuKit

TEXTS = [*SENTENCES[:4], " ".join(SENTENCES[:3])]


@pytest.mark.parametrize("name", ["bert-cls", "qwen3-last", "mpnet-mean"])
def test_int8_weights_on_a_gpu_give_vectors_near_those_of_sentence_transformers(
    fake: FakeGpuKit, kit: Kit, name: str
) -> None:
    before = len(fake.gpu.findings)
    engine = fake.load(kit.recipe_folder(name), dtype="int8", **RECIPES[name].spec)

    found = np.frombuffer(fake.embed(engine, texts=tuple(TEXTS)).vectors, dtype=np.float32)

    expected = encode(kit.reference(name), TEXTS)
    model = encoder_of(engine)._model
    assert engine.info.dtype == "int8"
    assert {Int8WeightLinear, Int8Embedding} <= {type(part) for part in model.modules()}
    assert not any(type(part) is torch.nn.Linear for part in model.modules())
    assert cosines(found.reshape(expected.shape), expected).min() > 0.99
    assert [finding for finding in fake.gpu.findings[before:] if finding.kind == "device"] == []
    engine.close()


def test_int8_halves_the_bytes_of_16_bits(fake: FakeGpuKit, kit: Kit) -> None:
    sizes = {}
    for dtype in ("bfloat16", "int8"):
        engine = fake.load(kit.recipe_folder("bert-cls"), dtype=dtype)
        sizes[dtype] = weight_bytes(encoder_of(engine))
        engine.close()

    assert sizes["int8"] < 0.7 * sizes["bfloat16"]


def test_int4_on_a_gpu_is_refused_with_the_remedy(fake: FakeGpuKit, kit: Kit) -> None:
    with pytest.raises(UnsupportedModel, match=r"int4` needs a CPU .*: set `dtype: int8`"):
        fake.load(kit.recipe_folder("bert-cls"), dtype="int4")
