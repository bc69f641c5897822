"""The paths of a transformer: their vectors, their waiting for the device, and their memory."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2PreTrainedModel

from benchmarks.lib.engine_kit import Kit
from benchmarks.lib.models import RECIPES
from benchmarks.lib.workloads import mixed
from engines.inputs.prompts import PromptTemplate
from engines.inputs.tokenizer import Ids
from engines.layers.packing import bucket_by_length
from engines.models.adapters import storage_bytes
from engines.models.base import weight_bytes, workspace_bytes
from engines.models.cuda_graphs import ForbidHostSync
from engines.models.transformer import TransformerEncoder
from engines.models.verification import distance

TRANSFORMERS = sorted(name for name in RECIPES if name != "static")


def _encoder(kit: Kit, name: str) -> TransformerEncoder:
    runner = kit.engine(name)._runner
    assert runner is not None
    encoder = runner._encoder
    assert isinstance(encoder, TransformerEncoder)
    return encoder


def _ids(kit: Kit, name: str) -> list[Ids]:
    engine = kit.engine(name)

    return sorted(engine._tokenizer.encode(mixed(14, seed=8), PromptTemplate(), "end").ids, key=len)


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_all_paths_give_the_same_vectors(kit: Kit, name: str) -> None:
    encoder, ids = _encoder(kit, name), _ids(kit, name)
    used, expected = encoder.path, encoder.reference(ids)

    assert encoder.path == used
    for path in encoder.candidate_paths() if encoder.attention == "packed" else ("padded", "unpadded"):
        encoder.switch_to(path)
        assert distance(encoder(ids), expected) < 1e-10
    encoder.switch_to(used)


def test_soft_capped_scores_never_run_by_sdpa_which_leaves_out_the_cap(
    kit: Kit, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers 5.17 says that Gemma 2 supports it."""
    monkeypatch.setattr(Gemma2PreTrainedModel, "_supports_sdpa", True)
    engine = kit.load(kit.recipe_folder("gemma2-last"))

    runner = engine._runner
    assert runner is not None
    assert runner._encoder._own_attention == "eager"  # type: ignore[attr-defined]  # a transformer's
    assert (engine.info.attention, engine.info.path) == ("padded", "padded")
    engine.close()


@pytest.mark.parametrize("name", [name for name in TRANSFORMERS if RECIPES[name].attention == "packed"])
def test_a_packed_pass_never_makes_the_host_wait_for_the_device(kit: Kit, name: str) -> None:
    encoder, ids = _encoder(kit, name), _ids(kit, name)

    with ForbidHostSync():
        encoder(ids)
        encoder(ids, [2] * len(ids))


def test_a_padded_pass_drops_its_padding_without_making_the_host_wait(kit: Kit) -> None:
    encoder, ids = _encoder(kit, "deberta-v2-mean"), _ids(kit, "deberta-v2-mean")
    expected = encoder.reference(ids)

    with ForbidHostSync():
        vectors = encoder.encode_batched(ids)

    assert distance(vectors[0], expected) < 1e-10


def test_transformers_makes_the_host_wait_for_a_mask(kit: Kit) -> None:
    """It reads once a batch, before the first layer, whether the mask hides anything."""
    encoder, ids = _encoder(kit, "bert-cls"), _ids(kit, "bert-cls")
    used = encoder.path
    encoder.switch_to("padded")

    with ForbidHostSync(), pytest.raises(NotImplementedError, match=r"on the host \(aten.is_nonzero.default\)"):
        encoder.encode_batched(ids)
    encoder.switch_to(used)


@given(lengths=st.lists(st.integers(1, 500), min_size=1, max_size=60).map(sorted))
def test_padded_batches_hold_every_text_once_and_little_padding(lengths: list[int]) -> None:
    spans = list(bucket_by_length(lengths))

    assert [index for start, end in spans for index in range(start, end)] == list(range(len(lengths)))
    for start, end in spans:
        real, computed = sum(lengths[start:end]), lengths[end - 1] * (end - start)
        assert real >= 0.75 * computed


def test_no_texts_make_no_batches() -> None:
    assert list(bucket_by_length([])) == []


def test_tied_weights_count_once() -> None:
    table = nn.Embedding(10, 4)
    head = nn.Linear(4, 10, bias=False)
    head.weight = table.weight

    assert storage_bytes([table.weight, head.weight, torch.zeros(3)]) == 10 * 4 * 4 + 3 * 4


def test_the_bytes_of_a_model_are_those_of_its_tensors(kit: Kit) -> None:
    encoder = _encoder(kit, "bert-dense-identity")
    parameters = sum(parameter.numel() for parameter in encoder._model.parameters())

    assert weight_bytes(encoder) >= 4 * (parameters + 64 * 48)
    assert workspace_bytes(encoder, 1000) == 1000 * (8 * 48 + 3 * 96) * 4
