"""Models that give vectors of tokens: what is refused, what the check at load finds, and bge-m3's further output."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from torch.nn.functional import linear, normalize

from benchmarks.lib.engine_kit import Kit, embed
from benchmarks.lib.models import quiet
from engines.batching import pooled
from engines.errors import BrokenFiles, ContextLengthExceeded, InvalidValue, SelfCheckFailed, UnsupportedModel
from engines.hub.file_selection import COLBERT_LINEAR
from engines.layers import attention, hidden_keys
from engines.loading import multi_vector
from engines.loading.loader import LoaderSettings
from engines.models.token_head import ScoringMask
from tests.testkit.late_models import FAMILIES, PUNCTUATION, assert_same, outputs, projection, scored, split, vectors

TEXTS = ["The yard keeps.", "a b c", "Über den Dächern, 两个人.", "x", "why not, he said; a longer one"]
NAME = "bert-unseen-fillers"


@pytest.fixture
def folder(kit: Kit, tmp_path: Path) -> Path:
    """A folder that a test may change."""
    own = kit.folder / f"late-{NAME}"
    if not own.exists():
        FAMILIES[NAME].build(own)
    return Path(shutil.copytree(own, tmp_path / "model"))


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    content = json.loads(path.read_text())
    path.write_text(json.dumps(change(content) or content))


def part(folder: Path, kind: str) -> Path:
    """The folder of a module."""
    modules = json.loads((folder / "modules.json").read_text())
    return folder / str(next(line["path"] for line in modules if line["type"].endswith(f".{kind}")))


def add_module(folder: Path, kind: str, **config: Any) -> None:
    (folder / "new").mkdir()
    (folder / "new" / "config.json").write_text(json.dumps(config))
    line = {"idx": 9, "name": "9", "path": "new", "type": f"sentence_transformers.multi_vector_encoder.modules.{kind}"}
    edit(folder / "modules.json", lambda lines: [*lines, line])


def drop_mask(folder: Path) -> None:
    edit(folder / "modules.json", lambda lines: [line for line in lines if not line["type"].endswith("Mask")])


def fill(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        edit(
            folder / "sentence_bert_config.json",
            lambda config: {**config, "query_expansion": {**config["query_expansion"], **changes}},
        )

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (drop_mask, "no MultiVectorMask"),
        (lambda folder: add_module(folder, "LambdaTokenPooling"), "'LambdaTokenPooling', which is not supported"),
        (lambda folder: add_module(folder, "MultiVectorMask"), "MultiVectorMask"),
        (fill(token="[NEW]"), "filled up with .NEW., which the tokenizer does not have"),
        (fill(length=400), "filled up to 400 tokens, but the model has 160 positions"),
        (lambda folder: edit(folder / "tokenizer_config.json", lambda c: {**c, "padding_side": "left"}), "pads at"),
    ],
)
def test_what_cannot_be_served_as_the_reference_serves_it_is_refused(
    kit: Kit, folder: Path, change: Callable[[Path], None], words: str
) -> None:
    change(folder)

    with pytest.raises(UnsupportedModel, match=words):
        kit.load(folder)


def test_a_module_behind_the_pooling_of_tokens_is_refused(kit: Kit, folder: Path) -> None:
    add_module(folder, "HierarchicalTokenPooling", pool_factor=2)
    edit(folder / "modules.json", lambda lines: [*lines[:1], lines[-1], *lines[1:-1]])

    with pytest.raises(UnsupportedModel, match="behind the pooling of tokens"):
        kit.load(folder)


def test_a_pooling_in_the_registry_is_refused(kit: Kit, folder: Path) -> None:
    with pytest.raises(UnsupportedModel, match="remove `pooling`"):
        kit.load(folder, pooling=("mean",))


def test_a_projection_of_another_shape_is_refused(kit: Kit, folder: Path) -> None:
    weights = part(folder, "Dense") / "model.safetensors"
    save_file({"linear.weight": load_file(weights)["linear.weight"].T.contiguous()}, weights)

    with pytest.raises(BrokenFiles, match=r"linear\.weight"):
        kit.load(folder)


def test_without_scipy_nothing_is_merged_and_the_reason_is_given(
    kit: Kit, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = kit.load(folder)
    monkeypatch.setattr(pooled, "has_clustering", lambda: False)
    monkeypatch.setattr(multi_vector, "has_clustering", lambda: False)

    with pytest.raises(InvalidValue, match=r"embedyard\[multi-vector\]"):
        vectors(engine, TEXTS, pool_factor=2)
    add_module(folder, "HierarchicalTokenPooling", pool_factor=2)
    with pytest.raises(UnsupportedModel, match=r"embedyard\[multi-vector\]"):
        kit.load(folder)


def test_a_document_that_is_too_long_to_be_merged_is_refused_before_it_runs(
    kit: Kit, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = kit.load(folder)
    monkeypatch.setattr(pooled, "MAX_POOLED_VECTORS", 12)

    with pytest.raises(InvalidValue, match=r"input\[4\] has \d+ tokens, and the vectors of at most 12"):
        vectors(engine, TEXTS, "document", pool_factor=2)


def test_the_registry_limits_the_tokens_of_documents_and_not_those_of_filled_queries(kit: Kit, folder: Path) -> None:
    engine = kit.load(folder, max_tokens=14)

    assert engine.info.max_tokens == 14
    assert outputs(engine, [TEXTS[-1] * 9], "document").token_counts == (14,)
    assert outputs(engine, [TEXTS[0]], "query").token_counts == (24,)


def test_a_query_that_is_too_long_is_refused_where_a_call_says_so(kit: Kit, folder: Path) -> None:
    engine = kit.load(folder)

    with pytest.raises(ContextLengthExceeded, match=r"query has at least \d+ tokens, but this model's limit is 24"):
        scored(engine, [TEXTS[-1] * 9], TEXTS, truncate="error")
    with pytest.raises(ContextLengthExceeded, match=r"documents\[0\] has at least"):
        scored(engine, ["a"], [TEXTS[-1] * 9], truncate="error")


# Sabotage: each must be found at load.


def test_fillers_that_are_attended_to_are_found_at_load(
    kit: Kit, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = hidden_keys.attend_to_visible

    def wrong(query: Any, key: Any, value: Any, layout: Any, **options: Any) -> Any:
        layout.num_visible = layout.lengths
        return right(query, key, value, layout, **options)

    expected = vectors(kit.load(folder), TEXTS, "query")
    monkeypatch.setattr(attention, "attend_to_visible", wrong)

    engine = kit.load(folder)

    assert engine.info.attention != "packed"
    assert any("reference" in note for note in engine.info.notes)
    assert_same(vectors(engine, TEXTS, "query"), expected)


def transpose(folder: Path) -> None:
    weights = part(folder, "Dense") / "model.safetensors"
    save_file({"linear.weight": load_file(weights)["linear.weight"].T.contiguous()}, weights)


def drop_skip_list(folder: Path) -> None:
    edit(part(folder, "MultiVectorMask") / "config.json", lambda config: {**config, "skiplist_words": []})


def skip_on_queries(folder: Path) -> None:
    edit(part(folder, "MultiVectorMask") / "config.json", lambda config: {**config, "skiplist_tasks": ["query"]})


def drop_fillers(folder: Path) -> None:
    edit(folder / "sentence_bert_config.json", lambda config: {**config, "query_expansion": None})


@pytest.mark.parametrize(
    "sabotage",
    [
        transpose,
        drop_skip_list,
        skip_on_queries,
        drop_fillers,
        pytest.param(fill(attend=True), id="see_fillers"),
        pytest.param(fill(length=23), id="fewer_fillers"),
    ],
)
def test_vectors_that_moved_since_the_first_load_are_refused(
    kit: Kit, folder: Path, tmp_path: Path, sabotage: Callable[[Path], None]
) -> None:
    square: Any = projection(48)
    (part(folder, "Dense") / "config.json").write_text(json.dumps(square.get_config_dict()))
    square.save(str(part(folder, "Dense")))
    settings = LoaderSettings(canary_folder=tmp_path / "canaries")
    kit.load(folder, settings=settings)
    kit.load(folder, settings=settings)

    sabotage(folder)

    with pytest.raises(SelfCheckFailed, match="moved by"):
        kit.load(folder, settings=settings)


def test_a_list_of_words_skips_their_tokens_and_no_unknown_ones() -> None:
    class Words:
        unk_token, unk_token_id = "[UNK]", 1

        def convert_tokens_to_ids(self, word: str) -> int | None:
            return {".": 7, "[UNK]": 1, "lost": None}.get(word, 1)

    mask = multi_vector._scoring_mask({"skiplist_words": [".", "nowhere", "lost"]}, Words())

    assert mask == ScoringMask(skipped_ids=(7,))
    assert multi_vector._scoring_mask({"skiplist_words": ["[UNK]"]}, Words()).skipped_ids == (1,)


# bge-m3: https://github.com/FlagOpen/FlagEmbedding, `EncoderOnlyEmbedderM3ModelForInference._colbert_embedding` and
# `compute_colbert_score`, written anew for one text.


@pytest.fixture
def m3(kit: Kit, tmp_path: Path) -> Path:
    """A folder in bge-m3's form, with random weights."""
    folder = Path(shutil.copytree(kit.recipe_folder("xlm-roberta-cls"), tmp_path / "m3"))
    head = projection(32, bias=True).linear
    torch.save(head.state_dict(), folder / COLBERT_LINEAR)
    return folder


@torch.inference_mode()
def m3_vectors(folder: Path, text: str) -> Any:
    """The definition: a linear layer over the states of all tokens but the first, each brought to length one."""
    with quiet():
        model: Any = SentenceTransformer(str(folder), device="cpu")[0]
    ids = model.tokenizer(text, return_tensors="pt", truncation=True, max_length=256)
    states = model.auto_model(**ids).last_hidden_state[0, 1:]
    head = torch.load(folder / COLBERT_LINEAR, weights_only=True)
    return normalize(linear(states, head["weight"], head["bias"]), dim=-1).numpy()


def m3_score(query: Any, document: Any) -> float:
    """The definition: the mean over a query's vectors of the best product with one of the document's."""
    return float((query @ document.T).max(axis=1).mean())


def test_bge_m3_gives_vectors_of_tokens_beside_its_dense_ones(kit: Kit, m3: Path) -> None:
    engine = kit.load(m3)
    expected = [m3_vectors(m3, f"query: {text}") for text in TEXTS]

    both = outputs(engine, TEXTS, outputs=("dense", "multi_vector"))

    assert engine.info.outputs == ("dense", "multi_vector")
    assert (engine.info.dimensions, engine.info.vector_width) == (48, 32)
    assert_same(split(both), expected)
    assert_same(vectors(engine, TEXTS[::-1])[::-1], expected)
    assert float(np.abs(both.array() - embed(engine, TEXTS)).max()) <= 1e-5


def test_bge_m3_scores_by_the_mean_of_the_best_products(kit: Kit, m3: Path) -> None:
    query = m3_vectors(m3, "query: a yard")
    expected = [m3_score(query, m3_vectors(m3, f"passage: {text}")) for text in TEXTS]

    found = scored(kit.load(m3), ["a yard"], TEXTS)

    assert found.labels == ("meanmaxsim",)
    assert np.allclose(found.array()[:, 0], expected, atol=1e-5)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"weight": torch.ones(32, 47), "bias": torch.ones(32)}, r"\(32, 47\) and \(32,\), which do not fit the model"),
        ({"weight": torch.ones(48, 32), "bias": torch.ones(32)}, "do not fit the model"),
        ({"weight": torch.ones(32, 48)}, "it holds weight in place of weight and bias"),
        ({"weight": torch.ones(32, 48), "bias": Path("x")}, "UnpicklingError"),
    ],
)
def test_another_file_in_the_place_of_the_projection_is_refused(
    kit: Kit, m3: Path, content: dict[str, Any], words: str
) -> None:
    torch.save(content, m3 / COLBERT_LINEAR)

    with pytest.raises(BrokenFiles, match=words):
        kit.load(m3)


def test_the_punctuation_of_a_skip_list_has_no_vectors(kit: Kit, folder: Path) -> None:
    engine = kit.load(folder)

    plain, marked = (outputs(engine, [text], "document").num_vectors for text in ("a b c", "a, b. c!"))

    assert plain == marked
    assert {",", ".", "!"} <= {*PUNCTUATION}


def test_texts_that_are_read_to_another_length_lie_in_another_space(kit: Kit, folder: Path) -> None:
    """Documents are cut at 50 tokens, texts without a side at 100, and queries are filled up to 24."""
    edit(folder / "config_sentence_transformers.json", lambda config: {**config, "prompts": {}})
    engine = kit.load(folder)

    def space(side: str | None = None, max_tokens: int | None = None) -> str:
        return outputs(engine, ["text"], side, max_tokens=max_tokens).space

    assert len({space(), space("document"), space("query"), space(None, 60), space("document", 40)}) == 5
    assert space("document", 60) == space("document") == space("passage") == space(None, 50)
    assert space(None, 120) == space()
    engine.close()
