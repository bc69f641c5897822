"""Sparse outputs are those of sentence-transformers' SparseEncoder for the same folder, whatever the batch."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from benchmarks.lib.engine_kit import Kit, embed
from benchmarks.lib.models import edit_json
from benchmarks.lib.workloads import SENTENCES
from engines.batching.engine import EmbeddingEngine
from engines.errors import BrokenFiles, SelfCheckFailed, TaskNotSupported, UnsupportedModel
from engines.layers.products import linear
from engines.loading import sparse
from engines.loading.loader import LoaderSettings
from engines.models import splade
from engines.models.multi_output import MultiOutputEncoder
from engines.models.outputs import Wanted
from engines.models.splade import SpladeHead
from engines.types import Outputs, OutputsCall
from tests.testkit.fake_gpu_families import texts_for
from tests.testkit.sparse_models import (
    LANGUAGE_MODELS,
    save_router,
    save_splade,
    save_static,
    sparse_encode,
    sparse_reference,
)

TEXTS = [*SENTENCES[:6], "a", "the the the", SENTENCES[0]]
Weights = NDArray[np.float32]


def folder_of(kit: Kit, name: str, build: Callable[..., None], *args: Any, **options: Any) -> Path:
    """Returns a folder that is made once a session."""
    folder = kit.folder / "sparse" / name
    if not folder.exists():
        folder.parent.mkdir(exist_ok=True)
        build(folder, *args, **options)
    return folder


def outputs_of(engine: EmbeddingEngine, texts: list[str], *names: Any, **options: Any) -> Outputs:
    result = asyncio.run(engine.run(OutputsCall(model_id="m", texts=tuple(texts), outputs=names, **options)))
    assert isinstance(result, Outputs)
    return result


def weights_of(engine: EmbeddingEngine, texts: list[str], **options: Any) -> Weights:
    """Returns the weights of all entries, `[n, vocabulary]`."""
    found = outputs_of(engine, texts, "sparse", **options)
    entries, weights = found.terms()
    rows = np.repeat(np.arange(len(texts)), found.num_terms)
    whole = np.zeros((len(texts), engine.info.vocab_size), np.float32)
    whole[rows, entries] = weights
    return whole


def assert_same_weights(found: Weights, wanted: Any) -> None:
    """Asserts that values differ by 1e-5 at most, of those above 1 relatively; the same entries exceed 1e-6."""
    expected = np.asarray(wanted)
    assert found.shape == expected.shape
    assert (np.abs(found - expected) / np.abs(expected).clip(min=1)).max() <= 1e-5
    unclear = (np.abs(expected) < 1e-5) & (np.abs(found) < 1e-5)
    assert (((np.abs(found) > 1e-6) == (np.abs(expected) > 1e-6)) | unclear).all()
    assert unclear.mean() < 0.999
    assert np.abs(expected).max() > 0.1


@pytest.mark.parametrize("family", LANGUAGE_MODELS)
def test_every_family_has_the_weights_of_sentence_transformers(kit: Kit, family: str) -> None:
    folder = folder_of(kit, family, save_splade, family)
    engine = kit.load(folder)

    assert_same_weights(weights_of(engine, TEXTS), sparse_encode(sparse_reference(folder), TEXTS))
    assert (engine.info.outputs, engine.info.dimensions, engine.info.task) == (("sparse",), 0, "embed")


@pytest.mark.parametrize(("strategy", "activation"), [("sum", "relu"), ("sum", "log1p_relu"), ("max", "log1p_relu")])
def test_every_pooling_has_the_weights_of_sentence_transformers(kit: Kit, strategy: str, activation: str) -> None:
    folder = folder_of(kit, f"bert-{strategy}-{activation}", save_splade, strategy=strategy, activation=activation)

    assert_same_weights(weights_of(kit.load(folder), TEXTS), sparse_encode(sparse_reference(folder), TEXTS))


def test_a_folder_of_sentence_transformers_5_is_read(kit: Kit) -> None:
    folder = folder_of(kit, "legacy", save_splade, is_legacy=True)

    assert_same_weights(weights_of(kit.load(folder), TEXTS), sparse_encode(sparse_reference(folder), TEXTS))


def test_a_limit_of_entries_in_the_folder_is_obeyed(kit: Kit) -> None:
    folder = folder_of(kit, "limited", save_splade, max_active_dims=9)

    found = weights_of(kit.load(folder), TEXTS)

    assert_same_weights(found, sparse_encode(sparse_reference(folder), TEXTS))
    assert ((found != 0).sum(1) == 9).all()


@pytest.mark.parametrize("limit", [0, -1, True, 9.0, "9"])
def test_a_limit_that_is_no_positive_integer_is_refused_as_sentence_transformers_refuses_it(
    kit: Kit, tmp_path: Path, limit: object
) -> None:
    folder = tmp_path / "m"
    save_splade(folder)
    edit_json(folder / "config_sentence_transformers.json", max_active_dims=limit)

    with pytest.raises(ValueError, match="max_active_dims must be a positive integer"):
        sparse_reference(folder)
    with pytest.raises(BrokenFiles, match=f"has max_active_dims {limit!r}, not a positive integer"):
        kit.load(folder)


def test_prompts_are_put_in_front(kit: Kit) -> None:
    folder = folder_of(kit, "prompts", save_splade, prompts={"query": "find this: ", "document": ""})
    reference = sparse_reference(folder)

    found = weights_of(kit.load(folder), TEXTS, input_type="query")

    assert_same_weights(found, sparse_encode(reference, TEXTS, prompt_name="query"))
    assert np.abs(found - sparse_encode(reference, TEXTS).numpy()).max() > 0.01


def test_a_text_has_the_same_weights_alone_in_any_batch_and_in_parts_of_the_vocabulary(
    kit: Kit, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = kit.load(folder_of(kit, "bert", save_splade, "bert"))
    whole = weights_of(engine, TEXTS)

    assert_same_weights(weights_of(engine, TEXTS[::-1])[::-1], whole)
    assert_same_weights(np.concatenate([weights_of(engine, [text]) for text in TEXTS]), whole)
    monkeypatch.setattr(splade, "_BLOCK_NUMBERS", 1000)
    monkeypatch.setattr(splade, "_LEAST_BLOCK", 16)
    monkeypatch.setattr(splade, "_GROUP_NUMBERS", 2 * engine.info.vocab_size)
    assert_same_weights(weights_of(engine, TEXTS), whole)


def test_every_path_gives_the_same_weights(kit: Kit) -> None:
    engine = kit.load(folder_of(kit, "bert", save_splade, "bert"))
    assert engine._runner is not None
    encoder = engine._runner._encoder
    assert isinstance(encoder, MultiOutputEncoder)
    texts = texts_for(encoder)
    expected = encoder.reference(texts).numpy()

    assert {"fused", "packed", "padded", "unpadded"} <= {*encoder.candidate_paths()}
    for path in encoder.candidate_paths():
        encoder.switch_to(path)
        rows = encoder.run_outputs(texts, None, Wanted(sparse=True)).sparse
        assert rows is not None
        found = np.zeros_like(expected)
        found[np.repeat(np.arange(len(texts)), rows.counts), rows.entries] = rows.weights
        assert_same_weights(found, expected)


def test_a_table_has_the_weights_of_sentence_transformers(kit: Kit) -> None:
    folder = folder_of(kit, "static", save_static)
    engine = kit.load(folder)
    found = weights_of(engine, TEXTS)

    assert_same_weights(found, sparse_encode(sparse_reference(folder), TEXTS))
    assert found.min() < 0
    assert_same_weights(np.concatenate([weights_of(engine, [text]) for text in TEXTS]), found)


@pytest.mark.parametrize("default_route", ["document", "query"])
def test_a_router_has_both_sides_and_its_default(kit: Kit, default_route: str) -> None:
    folder = folder_of(kit, f"router-{default_route}", save_router, default_route=default_route)
    engine, reference = kit.load(folder), sparse_reference(folder)
    query, document = (sparse_encode(reference, TEXTS, task=task).numpy() for task in ("query", "document"))

    assert_same_weights(weights_of(engine, TEXTS, input_type="query"), query)
    assert_same_weights(weights_of(engine, TEXTS, input_type="document"), document)
    assert_same_weights(weights_of(engine, TEXTS), sparse_encode(reference, TEXTS))
    assert np.abs(query - document).max() > 0.1
    counts = [outputs_of(engine, ["a"], "sparse", input_type=side).token_counts for side in ("query", "document")]
    assert counts == [(1,), (3,)]


def test_dense_vectors_scores_and_states_are_refused_by_name(kit: Kit) -> None:
    engine = kit.load(folder_of(kit, "bert", save_splade, "bert"))

    with pytest.raises(TaskNotSupported, match="m gives sparse outputs, no dense vectors"):
        embed(engine, TEXTS)
    with pytest.raises(TaskNotSupported, match="m gives sparse; it has no tokens output"):
        outputs_of(engine, TEXTS, "tokens")


@pytest.mark.parametrize("spec", [{"dtype": "int8"}, {"pooling": ("mean",)}])
def test_registry_keys_for_dense_vectors_are_refused(kit: Kit, spec: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedModel, match="remove it"):
        kit.load(folder_of(kit, "bert", save_splade, "bert"), **spec)


def test_an_adapter_of_a_table_is_refused(kit: Kit, tmp_path: Path) -> None:
    """It was ignored: there is no transformer to merge it into."""
    folder = folder_of(kit, "static", save_static)
    (tmp_path / "adapter_config.json").write_text("{}")

    with pytest.raises(UnsupportedModel, match="an adapter needs a transformer"):
        kit.load(folder, adapter=tmp_path)


def test_a_head_with_another_bias_is_refused_at_load(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    made = SpladeHead.__init__

    def changed(self: SpladeHead, *args: Any) -> None:
        made(self, *args)
        assert self._bias is not None
        self._bias = self._bias.clone()
        self._bias[7] += 0.5

    monkeypatch.setattr(SpladeHead, "__init__", changed)
    with pytest.raises(SelfCheckFailed, match="from those of its own class, BertForMaskedLM"):
        kit.load(folder_of(kit, "bert", save_splade, "bert"))


def test_a_head_with_another_pooling_is_refused_at_load(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    made = SpladeHead.__init__

    def changed(self: SpladeHead, model: Any, backbone: str, pooling: Any, pause: Any) -> None:
        made(self, model, backbone, splade.SpladePooling("sum", pooling.logs), pause)

    monkeypatch.setattr(SpladeHead, "__init__", changed)
    with pytest.raises(SelfCheckFailed, match="from those of its own class"):
        kit.load(folder_of(kit, "bert", save_splade, "bert"))


def test_a_path_that_gives_other_weights_is_not_taken(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    states = MultiOutputEncoder._hidden

    def changed(self: MultiOutputEncoder, texts: Any, layout: Any) -> torch.Tensor:
        hidden = states(self, texts, layout)
        return hidden * 1.01 if self.path in ("fused", "prepacked") else hidden

    monkeypatch.setattr(MultiOutputEncoder, "_hidden", changed)
    info = kit.load(folder_of(kit, "bert", save_splade, "bert")).info

    assert info.path == "packed"
    assert "from the reference forward pass" in " ".join(info.notes)


@pytest.mark.parametrize("side", ["query", "document"])
def test_weights_that_moved_since_the_first_load_are_refused(
    kit: Kit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, side: str
) -> None:
    folder = folder_of(kit, "router-document", save_router)
    settings = LoaderSettings(canary_folder=tmp_path)
    kit.load(folder, settings=settings)
    read_pooling, read_static = sparse._read_pooling, sparse._read_static

    def other_table(*args: Any) -> Any:
        table, tokenizer = read_static(*args)
        table._table = table._table.flip(0)
        return table, tokenizer

    if side == "query":
        monkeypatch.setattr(sparse, "_read_static", other_table)
    else:
        monkeypatch.setattr(
            sparse, "_read_pooling", lambda folder: splade.SpladePooling("max", read_pooling(folder).logs + 1)
        )
    with pytest.raises(SelfCheckFailed, match="moved by"):
        kit.load(folder, settings=settings)


def test_the_head_lets_other_texts_run_between_two_blocks(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = kit.load(folder_of(kit, "bert", save_splade, "bert"))
    assert engine._runner is not None
    encoder = engine._runner._encoder
    assert isinstance(encoder, MultiOutputEncoder)
    assert isinstance(encoder.heads.sparse, SpladeHead)
    monkeypatch.setattr(splade, "_BLOCK_NUMBERS", 1000)
    texts, pauses = texts_for(encoder), []
    monkeypatch.setattr(encoder.heads.sparse, "_pause", lambda: pauses.append(1))

    encoder.run_outputs(texts, None, Wanted(sparse=True))

    assert len(pauses) == -(-engine.info.vocab_size // 256)


def test_no_pass_holds_the_logits_of_all_its_tokens(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = kit.load(folder_of(kit, "bert", save_splade, "bert"))
    assert engine._runner is not None
    encoder = engine._runner._encoder
    assert isinstance(encoder, MultiOutputEncoder)
    texts = texts_for(encoder)
    held: list[int] = []
    monkeypatch.setattr(splade, "_BLOCK_NUMBERS", 4096)
    monkeypatch.setattr(splade, "_LEAST_BLOCK", 16)

    def recorded(*args: Any) -> torch.Tensor:
        logits = linear(*args)
        held.append(logits.numel())
        return logits

    monkeypatch.setattr(splade, "linear", recorded)
    encoder.run_outputs(texts, None, Wanted(sparse=True))

    assert max(held) <= 4096
    assert sum(held) == sum(map(len, texts)) * engine.info.vocab_size
