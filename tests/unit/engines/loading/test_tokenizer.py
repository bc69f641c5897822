"""Tests a folder's tokenizer: its limits, its special tokens, and the rejection of what would give wrong vectors."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from benchmarks.lib import vocabularies
from benchmarks.lib.engine_kit import Kit, assert_same, embed
from benchmarks.lib.models import edit_json, to_legacy
from benchmarks.lib.workloads import SENTENCES
from engines.errors import BrokenFiles, UnsupportedModel
from tests.testkit.refusals import refusal

TEXTS = list(SENTENCES[:6])


def _copy(kit: Kit, name: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(kit.recipe_folder(name), tmp_path / name))


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("bert-cls", "defines [CLS] and [SEP] but does not add both"),
        ("xlm-roberta-cls", "defines <s> and </s> but does not add both"),
        ("t5-mean-dense", "defines </s> but does not append it"),
        ("qwen3-last", "pooling takes the last token, but the tokenizer appends no end token"),
        ("mistral-last", "pooling takes the last token, but the tokenizer appends no end token"),
    ],
)
def test_a_tokenizer_that_lost_its_post_processor_is_refused(kit: Kit, tmp_path: Path, name: str, says: str) -> None:
    folder = _copy(kit, name, tmp_path)
    edit_json(folder / "tokenizer.json", post_processor=None)
    error = refusal(kit, folder)

    assert isinstance(error, UnsupportedModel)
    assert says in str(error)
    assert "tokenizer.json has no post_processor that adds them" in str(error)


def test_the_registry_may_confirm_that_the_texts_own_last_token_is_meant(kit: Kit, tmp_path: Path) -> None:
    folder = _copy(kit, "qwen3-last", tmp_path)
    edit_json(folder / "tokenizer.json", post_processor=None)

    engine = kit.load(folder, pooling=("lasttoken",))

    assert_same(embed(engine, ["a text<|endoftext|>"]), embed(kit.engine("qwen3-last"), ["a text"]))


def test_the_last_id_is_the_end_token(kit: Kit) -> None:
    tokenizer = kit.engine("qwen3-last")._tokenizer

    assert tokenizer.limits.suffix == (vocabularies.qwen().eos_token_id,)


def test_segments_other_than_zero_are_refused(kit: Kit, tmp_path: Path) -> None:
    folder = _copy(kit, "bert-cls", tmp_path)
    processor = json.loads((folder / "tokenizer.json").read_text())["post_processor"]
    for piece in processor["single"]:
        next(iter(piece.values()))["type_id"] = 1
    edit_json(folder / "tokenizer.json", post_processor=processor)
    # Loaded with BERT's own class, transformers would replace the template by its own.
    edit_json(folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    edit_json(folder / "tokenizer_config.json", model_input_names=["input_ids", "token_type_ids", "attention_mask"])

    assert "segment ids other than 0" in str(refusal(kit, folder))


class Odd:
    """Wraps transformers' tokenizer and changes one result."""

    def __init__(self, owner: Any, **changes: Any) -> None:
        self._owner = owner
        self._changes = changes

    def __getattr__(self, name: str) -> Any:
        return self._changes.get(name, getattr(self._owner, name))

    def __call__(self, text: str, **options: Any) -> Any:
        whole = self._owner(text, **options)
        change = self._changes.get("cut" if options.get("truncation") else "text")
        return {**whole, "input_ids": change(whole["input_ids"])} if change else whole


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"cut": lambda ids: [*ids[:-2], ids[-1]]}, "has a custom truncation"),
        (
            {"text": lambda ids: [*ids, *([3] * (len(ids) % 2))]},
            "does not add the same special tokens around every text",
        ),
        ({"text": lambda ids: ids[::-1]}, "does not add the same special tokens around every text"),
        ({"backend_tokenizer": None}, "has no fast form: add a tokenizer.json"),
    ],
)
def test_a_tokenizer_with_ways_of_its_own_is_refused(
    kit: Kit, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], says: str
) -> None:
    load = AutoTokenizer.from_pretrained
    folder = kit.recipe_folder("bert-cls")
    monkeypatch.setattr(
        AutoTokenizer, "from_pretrained", lambda *args, **options: Odd(load(*args, **options), **changes)
    )

    with pytest.raises(UnsupportedModel, match=says):
        kit.load(folder)


def test_a_broken_tokenizer_is_named(kit: Kit, tmp_path: Path) -> None:
    folder = _copy(kit, "bert-cls", tmp_path)
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    error = refusal(kit, folder)

    assert isinstance(error, BrokenFiles)
    assert error.file == "tokenizer.json"


@pytest.mark.parametrize(
    ("tokenizer_limit", "positions", "stated", "registry", "limit"),
    [
        (512, 256, 160, None, 160),
        (512, 256, None, None, 256),
        (100, 256, None, None, 100),
        (512, 256, 400, None, 256),
        (512, 256, 160, 32, 32),
        (512, 256, 32, 160, 160),
        (512, 256, 160, 5000, 256),
        (10**30, 256, None, None, 256),
    ],
)
def test_the_smallest_plausible_limit_counts(  # noqa: PLR0913  # a table of four files and their outcome
    kit: Kit, tmp_path: Path, tokenizer_limit: int, positions: int, stated: int | None, registry: int | None, limit: int
) -> None:
    folder = _copy(kit, "bert-cls", tmp_path)
    edit_json(folder / "tokenizer_config.json", model_max_length=tokenizer_limit)
    to_legacy(folder, max_length=stated)
    assert json.loads((folder / "config.json").read_text())["max_position_embeddings"] == positions

    assert kit.load(folder, max_tokens=registry).info.max_tokens == limit


def test_a_model_without_any_limit_reads_eight_thousand_tokens(kit: Kit, tmp_path: Path) -> None:
    folder = _copy(kit, "t5-mean-dense", tmp_path)
    edit_json(folder / "tokenizer_config.json", model_max_length=10**30)

    assert kit.load(folder).info.max_tokens == 8192


def test_a_limit_too_small_for_text_is_refused(kit: Kit) -> None:
    with pytest.raises(UnsupportedModel, match="max_tokens is 2, but 2 of these are special tokens"):
        kit.load(kit.recipe_folder("bert-cls"), max_tokens=2)
    assert kit.load(kit.recipe_folder("bert-cls"), max_tokens=3).info.max_tokens == 3


@pytest.mark.parametrize("stated", ["128", 12.5, True])
def test_a_limit_that_is_no_number_is_named(kit: Kit, tmp_path: Path, stated: object) -> None:
    folder = _copy(kit, "bert-cls", tmp_path)
    edit_json(folder / "sentence_bert_config.json", max_seq_length=stated)
    error = refusal(kit, folder)

    assert isinstance(error, BrokenFiles)
    assert f"the longest input is {stated!r} in sentence_bert_config.json" in str(error)


def test_lower_case_is_not_done_twice(kit: Kit, tmp_path: Path) -> None:
    """sentence-transformers keeps a normaliser that lowercases already; in another order letters could differ."""
    folder = _copy(kit, "bert-lower-case", tmp_path)
    steps = [{"type": "NFKC"}, {"type": "Lowercase"}]
    edit_json(folder / "tokenizer.json", normalizer={"type": "Sequence", "normalizers": steps})
    edit_json(folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")

    backend = kit.load(folder)._tokenizer.backend

    assert json.loads(backend.to_str())["normalizer"]["normalizers"] == steps  # type: ignore[attr-defined]  # tokenizers
