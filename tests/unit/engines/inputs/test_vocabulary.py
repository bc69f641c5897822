"""Tests that another model's tokenizer is rejected: every vector would be wrong, with status 200."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.lib import vocabularies
from benchmarks.lib.engine_kit import Kit
from benchmarks.lib.models import edit_json
from engines.errors import BrokenFiles, UnsupportedModel
from engines.inputs.vocabulary import MAX_FILE_BYTES, check_vocabulary
from tests.testkit.refusals import refusal


@pytest.fixture
def folder(kit: Kit, tmp_path: Path) -> Path:
    """A copy of a small BERT for a test to break its tokenizer."""
    return _copy(kit, "bert-cls", tmp_path)


def _copy(kit: Kit, name: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(kit.recipe_folder(name), tmp_path / name))


@pytest.mark.parametrize("name", ["bert-cls", "xlm-roberta-cls", "t5-mean-dense", "gemma3-bidirectional", "llama-mean"])
def test_a_folder_without_any_tokenizer_file_is_refused(kit: Kit, tmp_path: Path, name: str) -> None:
    folder = _copy(kit, name, tmp_path)
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    error = refusal(kit, folder)

    assert isinstance(error, BrokenFiles)
    assert error.file == "tokenizer.json"
    assert "tokenizer.json is missing, and no other file holds a vocabulary" in str(error)


def test_a_config_of_a_tokenizer_is_no_tokenizer(kit: Kit, folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    edit_json(folder / "tokenizer_config.json", tokenizer_class="BertTokenizer")

    assert "tokenizer.json is missing" in str(refusal(kit, folder))


def test_an_empty_vocabulary_is_refused(kit: Kit, folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    edit_json(folder / "tokenizer_config.json", tokenizer_class="BertTokenizer")
    (folder / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n")
    error = refusal(kit, folder)

    assert isinstance(error, UnsupportedModel)
    assert "the tokenizer has 5 tokens, but the model's embedding table has 900 rows" in str(error)


@pytest.mark.parametrize("name", ["xlm-roberta-cls", "static"])
def test_a_larger_models_tokenizer_is_refused(kit: Kit, tmp_path: Path, name: str) -> None:
    folder = _copy(kit, name, tmp_path)
    target = next(folder.rglob("tokenizer.json"))
    content = json.loads(target.read_text())
    pieces = content["model"]["vocab"]
    if isinstance(pieces, list):
        pieces += [[f"piece{index}", -20.0] for index in range(400)]
    else:
        pieces |= {f"piece{index}": len(pieces) + index for index in range(400)}
    target.write_text(json.dumps(content))

    assert "it is incomplete or belongs to another model" in str(refusal(kit, folder))


def test_a_vocabulary_without_the_texts_words_is_refused(kit: Kit, folder: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    content["model"]["vocab"] = {word if word[0] == "[" else f"zq{word}": row for word, row in vocabulary.items()}
    (folder / "tokenizer.json").write_text(json.dumps(content))

    assert "knows no word of 14 texts" in str(refusal(kit, folder))


@pytest.mark.parametrize("name", ["bert-cls", "static"])
def test_a_huge_tokenizer_is_refused_before_it_is_read(kit: Kit, tmp_path: Path, name: str) -> None:
    folder = _copy(kit, name, tmp_path)
    target = next(folder.rglob("tokenizer.json"))
    os.truncate(target, MAX_FILE_BYTES + 1)
    error = refusal(kit, folder)

    assert isinstance(error, BrokenFiles)
    assert error.file == str(target.relative_to(folder))
    assert f"has {MAX_FILE_BYTES + 1} bytes, but the limit is {MAX_FILE_BYTES}" in str(error)


@pytest.mark.parametrize("num_rows", [772, 899, 900, 1024, 1343, 1800])
def test_tables_somewhat_larger_or_smaller_are_fine(num_rows: int) -> None:
    """Tables padded to a round size, ByT5's 259 of 384, or tokens added without a row."""
    check_vocabulary(vocabularies.bert().backend_tokenizer, num_rows)


@pytest.mark.parametrize("num_rows", [5, 300, 771, 1801, 30_522])
def test_tables_of_other_models_are_not(num_rows: int) -> None:
    with pytest.raises(UnsupportedModel, match=f"900 tokens, but the model's embedding table has {num_rows} rows"):
        check_vocabulary(vocabularies.bert().backend_tokenizer, num_rows)


@pytest.mark.parametrize(
    "make",
    [
        vocabularies.bert, vocabularies.roberta, vocabularies.xlm_roberta, vocabularies.t5, vocabularies.qwen,
        vocabularies.llama, vocabularies.gemma, vocabularies.mpnet,
    ],
)  # fmt: skip
def test_every_familys_own_vocabulary_is_fine(make: Callable[[], Any]) -> None:
    tokenizer = make()

    check_vocabulary(tokenizer.backend_tokenizer, len(tokenizer))
