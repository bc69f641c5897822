"""Tests that rerankers which would give other scores are refused at load, and what a folder says of itself."""

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from structlog.testing import capture_logs
from transformers import AutoTokenizer

from benchmarks.lib.engine_kit import Kit, embed
from benchmarks.lib.models import WIDTH, quiet
from benchmarks.lib.workloads import text
from engines.errors import BrokenFiles, SelfCheckFailed, TaskNotSupported, UnsupportedModel
from engines.inputs.token_ids import ID_MASK
from engines.loading.loader import LoaderSettings
from engines.loading.rerank_templates import TEMPLATES, template_of
from engines.models.transformer import TransformerEncoder
from engines.planner import native_width
from engines.spec import ModelSpec
from tests.testkit.refusals import refusal
from tests.testkit.rerankers import FAMILIES, answer, card_ids, edit, scores

PAIRS = [("what is a yard", "The yard keeps."), ("Why?", "It does.")]


@cache
def _built(kit: Kit, name: str) -> Path:
    folder = kit.folder / "scorers" / name
    folder.parent.mkdir(exist_ok=True)
    with quiet():
        FAMILIES[name].build(folder)
    return folder


@pytest.fixture
def copy(kit: Kit, tmp_path: Path) -> Callable[[str], Path]:
    """Copies the folder of a family for a test to break."""
    return lambda name: Path(shutil.copytree(_built(kit, name), tmp_path / name))


@pytest.mark.parametrize("name", ["bert-multi-label", "albert"])
def test_a_pooler_that_the_head_runs_in_float32_is_not_run_by_a_bfloat16_backbone(kit: Kit, name: str) -> None:
    engine = kit.load(_built(kit, name), dtype="bfloat16")
    exact = kit.load(_built(kit, name))

    assert (engine.info.dtype, exact.info.dtype) == ("bfloat16", "float32")
    # single scores of these random weights are up to 0.25 off in bfloat16, in the mean 0.02
    assert np.abs(scores(engine, PAIRS) - scores(exact, PAIRS)).mean() < 0.06
    for each in (engine, exact):
        each.close()


@pytest.mark.parametrize("model_type", ["new", "xlm-roberta"], ids=["gte-multilingual-reranker", "jina-reranker-v2"])
def test_a_reranker_with_code_of_its_own_is_refused_until_that_is_trusted(
    kit: Kit, copy: Callable[[str], Path], model_type: str
) -> None:
    folder = copy("xlm-roberta")
    code = {"AutoConfig": "own.C", "AutoModelForSequenceClassification": "own.M"}
    edit(folder / "config.json", model_type=model_type, auto_map=code)
    weights = {name.replace("attention", "mixer"): it for name, it in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})

    error = refusal(kit, folder)

    assert isinstance(error, UnsupportedModel)
    assert "review it, then set `trust_remote_code: true` and a 40-hex `revision` in the registry" in str(error)


# Sabotage.


def test_paths_that_drop_token_types_are_refused(
    kit: Kit, copy: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = TransformerEncoder._parted

    def dropped(self: TransformerEncoder, ids: torch.Tensor) -> Any:
        found, types = right(self, ids)
        return found, {name: torch.zeros_like(given) for name, given in types.items()}

    monkeypatch.setattr(TransformerEncoder, "_parted", dropped)

    with pytest.raises(SelfCheckFailed, match="from those of its own class, BertForSequenceClassification"):
        kit.load(copy("bert-modules"))


def test_a_fast_path_that_drops_token_types_is_not_taken(
    kit: Kit, copy: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = TransformerEncoder._row

    def dropped(self: TransformerEncoder, row: torch.Tensor, layout: Any) -> torch.Tensor:
        return right(self, row & ID_MASK, layout)

    monkeypatch.setattr(TransformerEncoder, "_row", dropped)
    engine = kit.load(copy("electra"))

    assert engine.info.attention == "padded"
    assert "from the reference forward pass" in " ".join(engine.info.notes)
    engine.close()


def test_a_template_of_another_family_is_refused(kit: Kit, copy: Callable[[str], Path]) -> None:
    error = refusal(kit, copy("mxbai-rerank-v2"), template="qwen3-reranker")

    assert isinstance(error, UnsupportedModel)
    assert "qwen3-reranker is that of a qwen3, but config.json describes a qwen2" in str(error)


def test_a_tokenizer_of_another_family_is_refused(kit: Kit, copy: Callable[[str], Path]) -> None:
    folder = copy("qwen3-reranker")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(_built(kit, "llama") / file, folder / file)

    error = refusal(kit, folder, template="qwen3-reranker")

    assert "which this tokenizer does not know" in str(error)


def test_scores_have_no_int8(kit: Kit, copy: Callable[[str], Path]) -> None:
    assert "`dtype: int8` is for models that embed" in str(refusal(kit, copy("electra"), dtype="int8"))


@pytest.mark.parametrize("name", ["electra", "qwen3-logits"])
def test_scores_in_bfloat16_are_near_those_in_float32(kit: Kit, name: str) -> None:
    folder = _built(kit, name)
    exact, near = kit.load(folder), kit.load(folder, revision="r2", dtype="bfloat16")

    assert near.info.dtype == "bfloat16"
    assert near.info.precision is None
    assert np.allclose(scores(near, PAIRS), scores(exact, PAIRS), atol=0.05)


def test_an_unknown_template_is_refused_with_the_known_ones(
    kit: Kit, copy: Callable[[str], Path], tmp_path: Path
) -> None:
    error = refusal(kit, copy("qwen3-reranker").rename(tmp_path / "tuned"), task="rerank")

    assert "set `template` in the registry (qwen3-reranker, mxbai-rerank-v2, bge-reranker-v2-gemma)" in str(error)


@pytest.mark.parametrize("tokens", [(5, 5), (10**6, 5), (None, 5), ("yes", 5)])
def test_answers_that_the_model_cannot_give_are_refused(
    kit: Kit, copy: Callable[[str], Path], tokens: tuple[Any, Any]
) -> None:
    folder = copy("qwen3-logits")
    edit(next(folder.glob("1_*")) / "config.json", true_token_id=tokens[0], false_token_id=tokens[1])

    assert isinstance(refusal(kit, folder), UnsupportedModel)


def test_another_answer_or_swapped_labels_do_not_pass_the_canary(
    kit: Kit, copy: Callable[[str], Path], tmp_path: Path
) -> None:
    settings = LoaderSettings(canary_folder=tmp_path / "canaries")
    causal, classifier = copy("qwen3-logits"), copy("roberta-nli")
    for folder in (causal, classifier):
        kit.load(folder, settings=settings, model_id=folder.name).close()
        kit.load(folder, settings=settings, model_id=folder.name).close()

    config = next(causal.glob("1_*")) / "config.json"
    answers = json.loads(config.read_text())
    edit(config, true_token_id=answers["false_token_id"], false_token_id=answers["true_token_id"])
    weights = load_file(classifier / "model.safetensors")
    for name in ("classifier.out_proj.weight", "classifier.out_proj.bias"):
        weights[name] = weights[name].flip(0).contiguous()
    save_file(weights, classifier / "model.safetensors", {"format": "pt"})

    for folder in (causal, classifier):
        with pytest.raises(SelfCheckFailed, match="the model's scores moved by"):
            kit.load(folder, settings=settings, model_id=folder.name)


def test_a_chat_template_that_loses_query_or_document_is_refused(kit: Kit, copy: Callable[[str], Path]) -> None:
    folder = copy("qwen3-chat")
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{% if m.role == 'user' %}<|im_start|>{{ m.content }}{% endif %}{% endfor %}"
    )

    assert "does not render a query and then a document unchanged" in str(refusal(kit, folder))


def test_a_chat_template_that_trims_is_refused(kit: Kit, copy: Callable[[str], Path]) -> None:
    folder = copy("qwen3-chat")
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}<|im_start|>{{ m.content | trim }}\n{% endfor %}<|im_end|>"
    )

    assert "does not render a query and then a document unchanged" in str(refusal(kit, folder))


def test_a_head_without_its_weights_is_refused(kit: Kit, copy: Callable[[str], Path]) -> None:
    folder = copy("bert-legacy-identity")
    weights = load_file(folder / "model.safetensors")
    del weights["classifier.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})

    error = refusal(kit, folder)

    assert isinstance(error, BrokenFiles)
    assert "classifier.weight" in str(error)


def test_a_head_that_reads_more_than_one_vector_is_refused(
    kit: Kit, copy: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engines.models.score_head._rows", lambda hidden, layout, choice: hidden[layout.starts + 1])

    assert "does not read one vector of a text" in str(refusal(kit, copy("bert-modules")))


@pytest.mark.parametrize("name", ["qwen3-logits", "qwen3-reranker", "mxbai-rerank-v2", "bge-reranker-v2-gemma"])
def test_the_end_of_a_template_survives_a_cut(kit: Kit, name: str) -> None:
    """Only the document is cut: what stands before and behind it is that of an uncut pair."""
    engine = kit.load(_built(kit, name), **FAMILIES[name].spec)
    query, document = "what is a yard", text(600, 3)

    for side in (None, "end", "start"):
        found = answer(engine, [document], queries=[query], truncate=side)
        assert (found.truncated, found.token_counts) == ((0,), (engine.info.max_tokens,))
    pairs = scorers_pairs(engine)
    (cut,), (whole,) = pairs.encode([query], [document]).ids, pairs.encode([query], ["The yard keeps."]).ids
    behind = len(pairs.pair.suffix)
    assert behind >= 3
    assert (cut[-behind:] == whole[-behind:]).all()
    assert (cut[:8] == whole[:8]).all()
    engine.close()


@pytest.mark.parametrize("name", ["qwen3-reranker", "mxbai-rerank-v2", "bge-reranker-v2-gemma"])
def test_the_ids_of_a_published_template_are_those_of_the_model_card(kit: Kit, name: str) -> None:
    engine = kit.load(_built(kit, name), **FAMILIES[name].spec)
    tokenizer = AutoTokenizer.from_pretrained(_built(kit, name))

    for query, document in [*PAIRS, ("a\n", " b"), ("两个人：", "<b>"), ("", "x")]:
        (ids,) = scorers_pairs(engine).encode([query], [document]).ids
        assert (ids & ID_MASK).tolist() == card_ids(name, tokenizer, query, document)
    engine.close()


def scorers_pairs(engine: Any) -> Any:
    """What reads an engine's pairs."""
    return engine._scoring.pairs


# What a folder is.


def test_an_instruction_takes_its_place_in_the_template(kit: Kit) -> None:
    engine = kit.load(_built(kit, "qwen3-logits"))
    default = "Given a web search query, retrieve relevant passages that answer the query"

    plain, spelt, other = (
        scores(engine, PAIRS, instruction=task, activation="none") for task in (None, default, "Find jokes")
    )

    assert np.abs(plain - spelt).max() < 1e-5
    assert np.abs(plain - other).max() > 1e-4
    engine.close()


def test_each_task_refuses_the_other(kit: Kit) -> None:
    reranker, embedder = kit.load(_built(kit, "bert-modules")), kit.engine("bert-cls")

    with pytest.raises(TaskNotSupported, match="can rerank, not embed"):
        embed(reranker, ["text"])
    with pytest.raises(TaskNotSupported, match="can embed, not score"):
        answer(embedder, ["text"], queries=["query"])
    reranker.close()


@pytest.mark.parametrize(
    ("name", "task", "message"),
    [
        ("bert-modules", "embed", "the registry says `task: embed`"),
        ("roberta-nli", "rerank", "the model has 3 labels: set `task: classify`"),
    ],
)
def test_a_task_that_contradicts_the_files_is_refused(
    kit: Kit, copy: Callable[[str], Path], name: str, task: str, message: str
) -> None:
    assert message in str(refusal(kit, copy(name), task=task))


def test_an_embedding_model_is_no_reranker(kit: Kit, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(kit.recipe_folder("bert-cls"), tmp_path / "m"))

    assert "these are the files of an embedding model" in str(refusal(kit, folder, task="rerank"))


def test_one_label_may_be_a_class(kit: Kit) -> None:
    engine = kit.load(_built(kit, "bert-modules"), task="classify")

    assert (engine.info.task, engine.info.labels) == ("classify", ("LABEL_0",))
    engine.close()


@pytest.mark.parametrize(
    ("source", "model_type", "template"),
    [
        ("Qwen/Qwen3-Reranker-0.6B", "qwen3", "qwen3-reranker"),
        ("mixedbread-ai/mxbai-rerank-base-v2", "qwen2", "mxbai-rerank-v2"),
        ("/models/bge-reranker-v2-gemma/", "gemma", "bge-reranker-v2-gemma"),
    ],
)
def test_the_families_are_known_by_the_names_of_their_repositories(source: str, model_type: str, template: Any) -> None:
    assert template_of(ModelSpec(model_id="m", source=source), model_type) is TEMPLATES[template]


def test_the_original_folder_of_a_known_reranker_needs_no_key(kit: Kit, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(_built(kit, "qwen3-reranker"), tmp_path / "Qwen3-Reranker-0.6B"))

    engine = kit.load(folder)

    assert (engine.info.task, engine.info.max_tokens) == ("rerank", 512)
    engine.close()


def test_an_unknown_activation_is_the_default_as_in_sentence_transformers(
    kit: Kit, copy: Callable[[str], Path]
) -> None:
    folder = copy("bert-modules")
    edit(folder / "config_sentence_transformers.json", activation_fn="my_code.Softer")
    engine = kit.load(folder)

    assert np.abs(scores(engine, PAIRS) - scores(engine, PAIRS, activation="probabilities")).max() < 1e-6
    engine.close()


def test_token_types_count_in_the_workspace(kit: Kit, copy: Callable[[str], Path]) -> None:
    folder = copy("bert-modules")
    typed = kit.load(folder)
    edit(folder / "tokenizer_config.json", model_input_names=["input_ids", "attention_mask"])
    plain = kit.load(folder)

    assert typed.workspace_bytes > plain.workspace_bytes
    assert np.abs(scores(typed, PAIRS) - scores(plain, PAIRS)).max() > 1e-4
    typed.close()
    plain.close()


def test_a_model_that_scores_has_no_width(kit: Kit) -> None:
    spec = ModelSpec(model_id="m", source="x")

    assert native_width(_built(kit, "bert-modules"), spec) is None
    assert native_width(_built(kit, "xlm-roberta"), spec) is None
    assert native_width(kit.recipe_folder("bert-cls"), spec) == WIDTH


def test_a_target_width_says_nothing_of_a_model_that_scores(kit: Kit) -> None:
    with capture_logs() as lines:
        engine = kit.load(_built(kit, "bert-modules"), settings=LoaderSettings(target_dim=1024))
    engine.close()

    assert [line for line in lines if line["event"] == "model.target_dim_ignored"] == []
