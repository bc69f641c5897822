"""Tests that a tokenizer built from a record is transformers' own, and that any doubt leads back there."""

import json
import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tokenizers import Tokenizer as FastTokenizer
from transformers import AutoTokenizer, PretrainedConfig

from benchmarks.lib.engine_kit import Kit, assert_same, embed
from benchmarks.lib.models import edit_json
from benchmarks.lib.workloads import SENTENCES
from engines.errors import BrokenFiles
from engines.loading import recorded_tokenizer
from engines.loading.builders import Knowledge
from engines.loading.folder import read_folder
from engines.loading.loader import LoaderSettings
from engines.loading.recorded_tokenizer import BuiltTokenizer, RecordedTokenizer, TokenizerRecords
from engines.loading.tokenizer import ModelFacts, Reference, read_reference
from engines.models.load_records import LoadRecords
from engines.spec import ModelSpec

FAMILIES = (
    "bert-cls", "bert-lower-case", "roberta-mean", "xlm-roberta-cls", "camembert-mean", "mpnet-mean", "modernbert-cls",
    "deberta-v2-mean", "t5-mean-dense", "qwen3-last", "gemma2-last", "mistral-last", "llama-mean", "albert-mean",
)  # fmt: skip

TEXTS = [*SENTENCES, "aaaaaaaa", "  two  spaces ", "<s> and [CLS] </s>", "İstanbul ﬁne ①", "\u200bzero\u00a0width"]


def facts_of(folder: Path) -> ModelFacts:
    config = PretrainedConfig(**json.loads((folder / "config.json").read_text()))
    vocab_size = FastTokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size()
    return ModelFacts(config, vocab_size=vocab_size, position_limit=None, pooling=("cls",), counts_prompt=False)


def load(folder: Path, records: TokenizerRecords, **spec: Any) -> Reference:
    kept = RecordedTokenizer(read_folder(folder), ModelSpec(model_id="m", source=str(folder), **spec), records)
    return kept.reference(facts_of(folder))


def ids(reference: Reference) -> list[list[int]]:
    return reference.tokenizer.encode_bare(TEXTS)


@pytest.fixture
def asked(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Records each time that transformers builds a tokenizer."""
    calls: list[str] = []
    for name in ("bert-cls", "xlm-roberta-cls"):
        kit.recipe_folder(name)  # which asks, too
    build = AutoTokenizer.from_pretrained

    def counted(*args: Any, **options: Any) -> Any:
        calls.append("")
        return build(*args, **options)

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", counted)
    return calls


@pytest.mark.parametrize("name", FAMILIES)
def test_the_tokenizer_of_a_record_is_that_of_transformers(
    kit: Kit, tmp_path: Path, name: str, asked: list[str]
) -> None:
    folder, records = kit.recipe_folder(name), TokenizerRecords(tmp_path)
    asked.clear()  # as above
    first = load(folder, records)
    again = load(folder, TokenizerRecords(tmp_path))

    assert len(asked) == 1
    assert ids(again) == ids(first)
    assert again.backend.to_str() == first.backend.to_str()
    assert again.tokenizer.limits == first.tokenizer.limits
    plain = read_reference(read_folder(folder), ModelSpec(model_id="m", source=str(folder)), facts_of(folder))
    assert ids(again) == ids(plain)


@pytest.mark.parametrize("kind", ["XLMRobertaTokenizer", "PreTrainedTokenizerFast"])
def test_scores_are_read_as_transformers_reads_them(kit: Kit, tmp_path: Path, kind: str, asked: list[str]) -> None:
    folder = Path(shutil.copytree(kit.recipe_folder("xlm-roberta-cls"), tmp_path / "model"))
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    model["vocab"] = [[piece, -9.007249999999999 - number / 7] for number, (piece, _) in enumerate(model["vocab"])]
    edit_json(folder / "tokenizer.json", model=model)
    edit_json(folder / "tokenizer_config.json", tokenizer_class=kind)
    first, again = (load(folder, records) for records in [TokenizerRecords(tmp_path / "records")] * 2)

    scores = [json.loads(reference.backend.to_str())["model"]["vocab"] for reference in (first, again)]
    assert len(asked) == 1
    assert scores[0] == scores[1]
    assert (scores[0] == model["vocab"]) == (kind == "XLMRobertaTokenizer"), "else one way would do"


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: edit_json(folder / "tokenizer_config.json", model_max_length=77),
        lambda folder: (folder / "special_tokens_map.json").write_text("{}"),
        lambda folder: edit_json(folder / "sentence_bert_config.json", do_lower_case=True, max_seq_length=9),
    ],
    ids=["options", "a new file", "lower case"],
)
def test_other_files_lead_back_to_transformers(kit: Kit, tmp_path: Path, asked: list[str], change: Any) -> None:
    folder = Path(shutil.copytree(kit.recipe_folder("bert-cls"), tmp_path / "model"))
    records = TokenizerRecords(None)
    load(folder, records)
    change(folder)
    load(folder, records)

    assert len(asked) == 2


@pytest.mark.parametrize("is_known", [False, True])
def test_files_that_are_replaced_while_a_tokenizer_is_built_leave_no_record(
    kit: Kit, tmp_path: Path, asked: list[str], monkeypatch: pytest.MonkeyPatch, is_known: bool
) -> None:
    """A later load of the first files, put back, must not get the tokenizer of the others."""
    folder = Path(shutil.copytree(kit.recipe_folder("bert-cls"), tmp_path / "model"))
    path, records = folder / "tokenizer.json", TokenizerRecords(None, 2**30)
    before = path.read_bytes()
    if is_known:
        load(folder, records)
        records._built.clear()
    probe = recorded_tokenizer._probe

    def replaced(backend: FastTokenizer) -> str:
        edit_json(path, added_tokens=[{**token, "lstrip": True} for token in json.loads(before)["added_tokens"]])
        return probe(backend)

    with monkeypatch.context() as patched:
        patched.setattr(recorded_tokenizer, "_probe", replaced)
        load(folder, records)
    assert not records._built

    assert len(records._in_memory) == int(is_known)


def test_other_limits_of_the_model_lead_back_to_transformers(kit: Kit, asked: list[str]) -> None:
    folder, records = kit.recipe_folder("bert-cls"), TokenizerRecords(None)
    load(folder, records)

    assert load(folder, records, max_tokens=17).tokenizer.max_tokens == 17
    assert len(asked) == 2
    assert load(folder, records, max_tokens=17).tokenizer.max_tokens == 17
    assert len(asked) == 2


def test_a_record_whose_tokenizer_reads_probes_otherwise_is_not_used(
    kit: Kit, tmp_path: Path, asked: list[str]
) -> None:
    folder = kit.recipe_folder("bert-cls")
    first = load(folder, TokenizerRecords(tmp_path))
    [path] = tmp_path.iterdir()
    record = msgspec.json.decode(path.read_bytes())
    record["parts"]["normalizer"]["lowercase"] = False
    path.write_bytes(msgspec.json.encode(record))

    assert ids(load(folder, TokenizerRecords(tmp_path))) == ids(first)
    assert len(asked) == 2


@pytest.mark.parametrize("content", [b"", b"{}", b"\x00\x01", b'{"parts": 3}'])
def test_a_record_that_cannot_be_read_is_as_none(kit: Kit, tmp_path: Path, asked: list[str], content: bytes) -> None:
    folder = kit.recipe_folder("bert-cls")
    load(folder, TokenizerRecords(tmp_path))
    [path] = tmp_path.iterdir()
    path.write_bytes(content)

    load(folder, TokenizerRecords(tmp_path))
    load(folder, TokenizerRecords(tmp_path))

    assert len(asked) == 2, "the second load has written it anew"


def test_code_of_the_repository_is_never_bypassed(kit: Kit, asked: list[str]) -> None:
    folder, records = kit.recipe_folder("bert-cls"), TokenizerRecords(None)
    for _ in range(2):
        load(folder, records, trust_remote_code=True, revision="0" * 40)

    assert len(asked) == 2


def test_a_tokenizer_whose_vocabulary_transformers_changes_has_no_record(
    kit: Kit, monkeypatch: pytest.MonkeyPatch, asked: list[str]
) -> None:
    folder, records = kit.recipe_folder("bert-cls"), TokenizerRecords(None)
    compose = recorded_tokenizer._compose
    monkeypatch.setattr(
        recorded_tokenizer,
        "_compose",
        lambda content, parts, **way: compose(content.replace(b'"##s"', b'"##sss"'), parts, **way),
    )
    for _ in range(2):
        load(folder, records)

    assert len(asked) == 2


def test_what_else_is_asked_of_transformers_tokenizer_loads_it(kit: Kit, asked: list[str]) -> None:
    folder, records = kit.recipe_folder("bert-cls"), TokenizerRecords(None)
    first, again = (load(folder, records) for _ in range(2))

    assert again.theirs.cls_token_id == first.theirs.cls_token_id is not None
    assert again.theirs.bos_token_id is None
    assert len(asked) == 1
    assert again.theirs.convert_tokens_to_ids("[SEP]") == first.theirs.convert_tokens_to_ids("[SEP]")
    assert len(asked) == 2


def test_few_records_stay_on_disk(tmp_path: Path, kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorded_tokenizer, "MAX_RECORDS", 2)
    records = TokenizerRecords(tmp_path)
    for length in (11, 12, 13):
        folder = Path(shutil.copytree(kit.recipe_folder("bert-cls"), tmp_path.parent / f"model-{length}"))
        edit_json(folder / "tokenizer_config.json", model_max_length=length)
        load(folder, records)

    assert len(list(tmp_path.iterdir())) == 2


def test_a_folder_without_a_tokenizer_is_refused_as_before(kit: Kit, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(kit.recipe_folder("bert-cls"), tmp_path / "model"))
    facts, read = facts_of(folder), read_folder(folder)
    for name in ("tokenizer.json", "vocab.txt"):
        (folder / name).unlink(missing_ok=True)
    kept = RecordedTokenizer(read, ModelSpec(model_id="m", source=str(folder)), TokenizerRecords(None))

    with pytest.raises(BrokenFiles, match=r"tokenizer\.json is missing"):
        kept.reference(facts)


def test_an_engine_of_a_later_load_gives_the_same_vectors(kit: Kit, tmp_path: Path, asked: list[str]) -> None:
    folder = kit.recipe_folder("xlm-roberta-cls")
    settings = LoaderSettings(knowledge=Knowledge(LoadRecords(tmp_path), TokenizerRecords(tmp_path / "tokenizers")))
    first, again = (kit.load(folder, settings=settings) for _ in range(2))

    assert len(asked) == 1
    assert_same(embed(again, TEXTS), embed(first, TEXTS))


def test_a_model_that_comes_back_finds_its_tokenizer_as_it_left_it(
    kit: Kit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, records = kit.recipe_folder("bert-cls"), TokenizerRecords(tmp_path, max_built_bytes=2**30)
    first = load(folder, records)
    monkeypatch.setattr(recorded_tokenizer, "_compose", lambda *_, **__: pytest.fail("built again"))

    again = load(folder, records)

    assert again.backend is first.backend
    assert again.tokenizer.limits == first.tokenizer.limits


def test_tokenizers_are_kept_within_their_bytes_and_the_ones_asked_for_last() -> None:
    records = TokenizerRecords(None, max_built_bytes=100)

    def put(key: str, size_bytes: int) -> None:
        built: Any = BuiltTokenizer(record=key, backend=None, size_bytes=size_bytes)  # type: ignore[arg-type]  # a label
        records.put_built(key, built)

    def kept() -> str:
        return "".join(records._built)

    put("a", 40)
    put("b", 40)
    assert records.built("a") is not None
    put("c", 40)
    assert kept() == "ac"
    put("d", 101)
    assert kept() == ""
    put("e", 60)
    put("e", 70)
    assert kept() == "e"
    assert records.built("a") is None
