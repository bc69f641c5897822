"""Tests of the sizes of a model's parts, from config.json alone."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModel

from engines.layers.host_layers import HostLayer
from engines.loading.folder import read_folder
from engines.loading.parts import measure_parts
from engines.models.base import EncoderConfig
from engines.spec import Dtype, ModelSpec
from tests.testkit.split_models import NUM_LAYERS, bert_config, write_model

CONFIG = EncoderConfig(num_threads=2)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "m", bert_config())


def spec_of(root: Path, dtype: Dtype = "float32", min_cosine: float | None = None) -> ModelSpec:
    return ModelSpec(model_id="m", source=str(root), dtype=dtype, min_cosine=min_cosine)


def test_the_parts_are_the_layers_and_the_rest_as_they_are_loaded(root: Path) -> None:
    found = measure_parts(read_folder(root), spec_of(root), CONFIG, 64)

    model = AutoModel.from_pretrained(root)
    layers = [sum(weight.nbytes for weight in layer.parameters()) for layer in model.encoder.layer]
    tables = sum(tensor.nbytes for tensor in (*model.embeddings.parameters(), *model.embeddings.buffers()))
    assert found is not None
    assert found.parts == (tables, *layers)  # without the pooler, which is not served
    assert len(found.parts) == 1 + NUM_LAYERS


def test_the_workspace_is_that_of_all_batches_that_run_at_once(root: Path) -> None:
    one = measure_parts(read_folder(root), spec_of(root), EncoderConfig(num_threads=1), 64)
    two = measure_parts(read_folder(root), spec_of(root), CONFIG, 64)

    assert one is not None
    assert two is not None
    assert two.workspace_bytes == 2 * one.workspace_bytes > 0


@pytest.mark.parametrize(("dtype", "min_cosine"), [("int8", 0.0), ("bfloat16", None)])
def test_a_dtype_that_is_built_in_float32_first_or_compared_with_it_is_not_split(
    root: Path, dtype: Dtype, min_cosine: float | None
) -> None:
    assert measure_parts(read_folder(root), spec_of(root, dtype, min_cosine), CONFIG, 64) is None


def test_a_reduced_dtype_without_comparison_takes_half(root: Path) -> None:
    whole = measure_parts(read_folder(root), spec_of(root), CONFIG, 64)
    half = measure_parts(read_folder(root), spec_of(root, "bfloat16", 0.0), CONFIG, 64)

    assert whole is not None
    assert half is not None
    assert half.parts[1:] == tuple(size // 2 for size in whole.parts[1:])


def test_a_layer_in_main_memory_has_device_memory_during_its_turn_only() -> None:
    layer = torch.nn.Linear(8, 8)
    expected = layer(torch.ones(8)).detach()
    during: list[int] = []

    host_layer = HostLayer(layer, torch.device("cpu"), lambda buffer: False)
    layer.register_forward_pre_hook(lambda *_: during.append(layer.weight.untyped_storage().nbytes()))

    assert host_layer.size_bytes == 4 * (64 + 8)
    assert layer.weight.untyped_storage().nbytes() == 0
    with torch.inference_mode():
        assert torch.equal(layer(torch.ones(8)), expected)
        assert torch.equal(layer(torch.ones(8)), expected)
    assert during == [256, 256]
    assert layer.weight.untyped_storage().nbytes() == 0


def test_a_layer_that_fails_gives_its_device_memory_back() -> None:
    layer = torch.nn.Linear(8, 8)
    HostLayer(layer, torch.device("cpu"), lambda buffer: False)

    with pytest.raises(RuntimeError), torch.inference_mode():
        layer(torch.ones(3))

    assert layer.weight.untyped_storage().nbytes() == 0
