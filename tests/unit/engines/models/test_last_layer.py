"""The last layer gives only the tokens that a head reads: which heads that is used for, and that it is checked."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.lib.engine_kit import Kit, assert_same
from benchmarks.lib.models import RECIPES, quiet
from engines.layers.decoder import FusedDecoderLayer
from engines.layers.fused import FusedLayer
from engines.layers.packing import TokenChoice
from engines.models.transformer import TransformerEncoder
from tests.testkit.fake_gpu_families import texts_for
from tests.testkit.rerankers import FAMILIES


def folder_of(kit: Kit, name: str) -> tuple[Path, dict[str, Any]]:
    """Returns the folder of a recipe or of a reranker, and the registry's fields for it."""
    if name in RECIPES:
        return kit.recipe_folder(name), RECIPES[name].spec
    folder = kit.folder / "last-layer" / name
    if not folder.exists():
        folder.parent.mkdir(exist_ok=True)
        with quiet():
            FAMILIES[name].build(folder)
    return folder, FAMILIES[name].spec


def encoder_for(kit: Kit, name: str) -> TransformerEncoder:
    """Returns the encoder of a model, on the fused path."""
    folder, spec = folder_of(kit, name)
    runner = kit.load(folder, **spec)._runner
    assert runner is not None
    encoder = runner._encoder
    assert isinstance(encoder, TransformerEncoder)
    encoder.switch_to("fused")
    return encoder


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> list[TokenChoice]:
    """Records for which tokens last layers ran."""
    found: list[TokenChoice] = []
    one_token, last_tokens = FusedLayer.one_token, FusedDecoderLayer.last_tokens

    def first_or_last(self: FusedLayer, x: Tensor, layout: Any, kept: TokenChoice) -> Tensor:
        found.append(kept)
        return one_token(self, x, layout, kept)

    def last(self: FusedDecoderLayer, x: Tensor, layout: Any, rope: Any) -> Tensor:
        found.append("last")
        return last_tokens(self, x, layout, rope)

    monkeypatch.setattr(FusedLayer, "one_token", first_or_last)
    monkeypatch.setattr(FusedDecoderLayer, "last_tokens", last)
    return found


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("bert-multi-label", ["first"]), ("xlm-roberta", ["first"]), ("distilbert", ["first"]), ("electra", ["first"]),
        ("qwen2", ["last"]), ("qwen3-reranker", ["last"]), ("bert-pooled", []), ("mpnet", []),
        ("bert-cls", ["first"]), ("xlm-roberta-cls", ["first"]), ("bert-instructor", []),
    ],
)  # fmt: skip
def test_the_last_layer_runs_for_what_the_head_reads(
    kit: Kit, kept: list[TokenChoice], name: str, expected: Sequence[TokenChoice]
) -> None:
    encoder = encoder_for(kit, name)
    texts = texts_for(encoder)
    kept.clear()

    found = encoder(texts)

    assert kept == expected
    assert_same(found.numpy(), encoder.reference(texts).numpy())


def test_short_texts_in_onnx_runtime_skip_other_tokens_unless_another_output_needs_them(
    kit: Kit, kept: list[TokenChoice]
) -> None:
    encoder = encoder_for(kit, "bert-cls")
    encoder.switch_to("prepacked")
    texts = [np.resize(np.arange(5, 55, dtype=np.int64), 70)] * 2
    layouts = [encoder._layout(texts, needs_all=needs_all) for needs_all in (False, True)]
    kept.clear()
    try:
        with torch.inference_mode():
            found = [encoder._hidden(texts, layout) for layout in layouts]
    finally:
        encoder.switch_to("fused")

    assert [len(hidden) for hidden in found] == [2, 140]
    assert kept == ["first"]
    assert_same(found[0].numpy(), found[1][layouts[1].starts].numpy())


@pytest.mark.parametrize("name", ["xlm-roberta", "bert-cls"])
def test_a_last_layer_that_gives_other_tokens_is_found_when_a_model_loads(
    kit: Kit, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    right = FusedLayer.one_token
    monkeypatch.setattr(FusedLayer, "one_token", lambda self, x, layout, _: right(self, x, layout, "last"))
    folder, spec = folder_of(kit, name)

    info = kit.load(folder, **spec).info

    assert info.path == "packed"
    assert "from the reference forward pass" in " ".join(info.notes)
