"""Tests the reading of a folder's JSON files: each is used, or rejected by name."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from benchmarks.lib.engine_kit import Kit
from benchmarks.lib.models import edit_json
from engines.errors import BadModel, BrokenFiles, UnsupportedModel
from engines.loading.folder import read_folder
from tests.testkit.refusals import refusal

PLAIN = {"text": {"method": "forward", "method_output_name": "last_hidden_state"}}


@pytest.fixture
def folder(kit: Kit, tmp_path: Path) -> Path:
    """A copy of a small BERT for a test to break."""
    return Path(shutil.copytree(kit.recipe_folder("bert-cls"), tmp_path / "bert"))


@pytest.mark.parametrize(
    "file",
    [
        "modules.json", "config.json", "sentence_bert_config.json", "config_sentence_transformers.json",
        "1_Pooling/config.json", "tokenizer.json", "tokenizer_config.json",
    ],
)  # fmt: skip
@pytest.mark.parametrize("content", ['{"a": ', "", "[1, 2]", "\x00\xff"])
def test_a_file_that_is_no_json_object_is_named(kit: Kit, folder: Path, file: str, content: str) -> None:
    (folder / file).write_text(content, encoding="latin-1")
    error = refusal(kit, folder)

    assert isinstance(error, BrokenFiles)
    assert error.file in (file, "tokenizer.json", "config.json")
    assert file.removesuffix("_config.json").removesuffix(".json") in str(error)


@pytest.mark.parametrize("file", ["config.json", "1_Pooling/config.json", "tokenizer.json"])
def test_a_file_that_must_be_there_is_named(kit: Kit, folder: Path, file: str) -> None:
    (folder / file).unlink()

    assert file in str(refusal(kit, folder))


@pytest.mark.parametrize(
    "lines",
    [[], [{}], [1], {"idx": 0}, [{"type": "sentence_transformers.models.Transformer"}], [{"type": 1, "path": ""}]],
)
def test_a_modules_json_that_lists_no_modules_is_broken(tmp_path: Path, lines: Any) -> None:
    (tmp_path / "modules.json").write_text(json.dumps(lines))

    with pytest.raises(BrokenFiles, match=r"modules\.json") as caught:
        read_folder(tmp_path)
    assert caught.value.file == "modules.json"


@pytest.mark.parametrize("path", ["/etc", "../other", "1_Pooling/../../other", "\\\\share"])
def test_a_module_outside_the_folder_is_refused(tmp_path: Path, path: str) -> None:
    _write_modules(tmp_path, "sentence_transformers.models.Transformer", path)

    with pytest.raises(UnsupportedModel, match="outside the model folder"):
        read_folder(tmp_path)


@pytest.mark.parametrize(
    "kind", ["custom_st.Transformer", "modeling_own.Pooling", "evil.sentence_transformers.Pooling"]
)
def test_a_module_of_the_repositorys_own_code_is_refused(kit: Kit, folder: Path, kind: str) -> None:
    lines = json.loads((folder / "modules.json").read_text())
    lines[0]["type"] = kind
    (folder / "modules.json").write_text(json.dumps(lines))
    error = refusal(kit, folder, trust_remote_code=True)

    assert isinstance(error, UnsupportedModel)
    assert f"modules.json names {kind!r}" in str(error)


@pytest.mark.parametrize(
    "kind",
    [
        "sentence_transformers.models.Transformer",
        "sentence_transformers.base.modules.transformer.Transformer",
        "sentence_transformers.base.modules.Transformer",
    ],
)
def test_both_vocabularies_are_read_by_their_last_word(tmp_path: Path, kind: str) -> None:
    _write_modules(tmp_path, kind, "0_Transformer")

    modules = read_folder(tmp_path).modules

    assert modules is not None
    assert (modules[0].kind, modules[0].path) == ("Transformer", "0_Transformer")


@pytest.mark.parametrize("kind", ["MultiVectorEncoder", "SomethingNew"])
def test_what_is_no_dense_embedder_is_refused(tmp_path: Path, kind: str) -> None:
    (tmp_path / "config_sentence_transformers.json").write_text(json.dumps({"model_type": kind}))

    with pytest.raises(UnsupportedModel, match=rf"config_sentence_transformers\.json declares a {kind}"):
        read_folder(tmp_path)


def test_a_cross_encoder_is_known_with_its_activation(tmp_path: Path) -> None:
    config = {"model_type": "CrossEncoder", "activation_fn": "torch.nn.modules.linear.Identity"}
    (tmp_path / "config_sentence_transformers.json").write_text(json.dumps(config))

    folder = read_folder(tmp_path)

    assert (folder.is_cross_encoder, folder.activation) == (True, config["activation_fn"])


@pytest.mark.parametrize("prompts", [["query: "], "query: ", {"query": 5}, {"query": ["q"]}])
def test_prompts_that_are_no_texts_are_named(tmp_path: Path, prompts: object) -> None:
    (tmp_path / "config_sentence_transformers.json").write_text(json.dumps({"prompts": prompts}))

    with pytest.raises(
        BrokenFiles, match=r"`prompts` in config_sentence_transformers\.json is not a map of names to texts"
    ):
        read_folder(tmp_path)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"query_expansion": {"strategy": "fixed"}}, "query_expansion"),
        ({"query_length": 32}, "query_length"),
        ({"document_length": 300}, "document_length"),
        ({"processing_kwargs": {"text": {"max_length": 8}}}, "processing_kwargs"),
        ({"tokenizer_name_or_path": "another"}, "tokenizer_name_or_path"),
        ({"model_args": {"subfolder": "x"}}, "model_kwargs.subfolder"),
        ({"model_kwargs": {"num_hidden_layers": 2}}, "model_kwargs.num_hidden_layers"),
        ({"transformer_task": "fill-mask"}, "fill-mask"),
        ({"modality_config": {**PLAIN, "message": {"method": "forward"}}}, "chat template"),
        ({"modality_config": {"image": {"method": "get_image_features"}}}, "takes vectors from None"),
        (
            {"modality_config": {"text": {"method": "get_text_features", "method_output_name": "pooler_output"}}},
            "get_text_features",
        ),
        ({"modality_config": PLAIN, "module_output_name": "sentence_embedding"}, "sentence_embedding"),
    ],
)
def test_a_transformer_that_does_more_than_its_last_hidden_state_is_refused(
    tmp_path: Path, config: dict[str, Any], says: str
) -> None:
    (tmp_path / "sentence_bert_config.json").write_text(json.dumps(config))

    with pytest.raises(UnsupportedModel, match=r"sentence_bert_config\.json") as caught:
        read_folder(tmp_path)
    assert says in str(caught.value)


def test_what_does_not_change_the_vectors_is_let_through(tmp_path: Path) -> None:
    config = {
        "max_seq_length": 77, "do_lower_case": False,
        "model_args": {"attn_implementation": "sdpa", "torch_dtype": "float16"},
        "modality_config": {"text": {"method": "forward", "method_output_name": ["last_hidden_state"]}},
        "module_output_name": "token_embeddings", "query_length": None,
    }  # fmt: skip
    (tmp_path / "sentence_bert_config.json").write_text(json.dumps(config))

    assert read_folder(tmp_path).transformer == config


def test_older_names_of_the_transformers_config_are_found(tmp_path: Path) -> None:
    (tmp_path / "sentence_xlm-roberta_config.json").write_text('{"max_seq_length": 77}')

    assert read_folder(tmp_path).transformer == {"max_seq_length": 77}


def test_an_empty_folder_says_nothing(tmp_path: Path) -> None:
    folder = read_folder(tmp_path)

    assert (folder.modules, folder.transformer, folder.prompts, folder.default_prompt) == (None, {}, {}, None)
    assert folder.weights == tmp_path


def test_placeholders_do_not_hide_prompts_of_the_same_family(tmp_path: Path) -> None:
    prompts = {"query": "", "document": None, "search_query": "search_query: ", "STS": ""}
    (tmp_path / "config_sentence_transformers.json").write_text(json.dumps({"prompts": prompts}))

    assert read_folder(tmp_path).prompts == {"search_query": "search_query: ", "STS": ""}


@pytest.mark.parametrize(
    ("config", "own", "widths"),
    [
        ({"matryoshka_dims": [64, 32]}, {}, (64, 32)),
        ({"matryoshka_dimensions": [64]}, {}, (64,)),
        ({"matryoshka_dims": [64]}, {"matryoshka_dims": [16]}, (16,)),
        ({"matryoshka_dims": [64]}, {"truncate_dim": 8}, (64, 8)),
        ({"matryoshka_dims": "many"}, {}, ()),
        ({"matryoshka_dims": [0, -1]}, {"truncate_dim": 0}, ()),
    ],
)
def test_widths_are_read_where_a_folder_states_them(
    tmp_path: Path, config: dict[str, Any], own: dict[str, Any], widths: tuple[int, ...]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "config_sentence_transformers.json").write_text(json.dumps(own))

    assert read_folder(tmp_path).widths == widths


def test_a_default_prompt_that_is_not_there_is_refused(kit: Kit, folder: Path) -> None:
    edit_json(folder / "config_sentence_transformers.json", default_prompt_name="sts")

    with pytest.raises(BadModel, match="the default prompt is 'sts', but the model's prompts are none"):
        kit.load(folder)


@pytest.mark.parametrize("name", ["query", "document", None])
def test_a_default_prompt_that_is_a_placeholder_is_empty(kit: Kit, folder: Path, name: str | None) -> None:
    edit_json(folder / "config_sentence_transformers.json", default_prompt_name=name)

    assert kit.load(folder).info.prompts == {}


def _write_modules(folder: Path, kind: str, path: str) -> None:
    (folder / "modules.json").write_text(json.dumps([{"idx": 0, "name": "0", "path": path, "type": kind}]))
