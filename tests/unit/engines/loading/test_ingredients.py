"""What of a real folder decides the space of its vectors, and what does not."""

import asyncio
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from msgspec import structs
from safetensors.numpy import load_file, save_file
from sentence_transformers.sentence_transformer.modules import LayerNorm, Pooling

from benchmarks.lib import vocabularies
from benchmarks.lib.engine_kit import Kit
from benchmarks.lib.models import RECIPES, WIDTH, bert_config, dense, edit_json, randomise, save, to_legacy, transformer
from engines.disk_spaces import DiskSpaces, spaces_on_disk
from engines.errors import FilesChanged
from engines.hub.content_digests import ContentDigests
from engines.loading.folder import Folder, read_folder
from engines.loading.ingredients import list_weights, read_ingredients
from engines.space import Ingredients
from engines.spec import Matryoshka, ModelSpec
from engines.types import EmbedCall
from tests.testkit import late_models
from tests.testkit.model_folders import FolderFiles
from tests.testkit.sparse_models import save_router

Change = Callable[[Path], None]
PROMPTS = {"query": "query: ", "document": "passage: "}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every kind of module that has weights, two tokens beside the vocabulary, and remote code."""
    folder = tmp_path_factory.mktemp("space") / "model"
    tokenizer = vocabularies.bert(lowercase=False)
    norm = LayerNorm(WIDTH)
    randomise(norm)
    modules = [Pooling(WIDTH, "mean"), norm, dense(WIDTH, 40, torch.nn.Tanh())]
    save(folder, transformer(bert_config(tokenizer)), tokenizer, modules, prompts=PROMPTS)
    to_legacy(folder, max_length=64)
    (folder / "modeling_custom.py").write_text("VALUE = 1\n")
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "model"))


def disk_spaces(folder: Path, device: str = "cpu", **spec: Any) -> DiskSpaces:
    fields = {"model_id": "m", "source": "./m", "matryoshka": Matryoshka(widths=(16,)), **spec}
    return spaces_on_disk(FolderFiles(folder), ModelSpec(**fields), device, ContentDigests(None))


def spaces(folder: Path, device: str = "cpu", **spec: Any) -> dict[str, dict[str, str]]:
    found = disk_spaces(folder, device, **spec)
    assert found.why_unknown == ""
    return found.spaces


def module(folder: Path, kind: str) -> Path:
    lines = json.loads((folder / "modules.json").read_text())
    return folder / str(next(line["path"] for line in lines if line["type"].endswith(kind)))


def edited(name: str, **changes: Any) -> Change:
    return lambda folder: edit_json(folder / name, **changes)


def in_module(kind: str, **changes: Any) -> Change:
    return lambda folder: edit_json(module(folder, kind) / "config.json", **changes)


def flip_a_bit(path: Path) -> None:
    tensors = load_file(path)
    name = min(tensors)
    bits = tensors[name].view(np.uint32).reshape(-1)
    bits[0] ^= 1
    save_file(tensors, path)


def edit_tokenizer(part: str, edit: Callable[[Any], Any]) -> Change:
    def change(folder: Path) -> None:
        path = folder / "tokenizer.json"
        content = json.loads(path.read_text())
        content[part] = edit(content[part])
        path.write_text(json.dumps(content, indent=2, ensure_ascii=False))

    return change


def swap_words(model: Any) -> Any:
    words = list(model["vocab"])[-2:]
    model["vocab"][words[0]], model["vocab"][words[1]] = model["vocab"][words[1]], model["vocab"][words[0]]
    return model


def swap_modules(folder: Path) -> None:
    lines = json.loads((folder / "modules.json").read_text())
    lines[1], lines[2] = lines[2], lines[1]
    (folder / "modules.json").write_text(json.dumps(lines))


def add_normalize(folder: Path) -> None:
    lines = json.loads((folder / "modules.json").read_text())
    lines.append({"idx": 4, "name": "4", "path": "4_N", "type": "sentence_transformers.models.Normalize"})
    (folder / "modules.json").write_text(json.dumps(lines))


def rewrite_dense(folder: Path) -> None:
    path = module(folder, "Dense") / "pytorch_model.bin"
    tensors = torch.load(path, weights_only=True)
    tensors["linear.weight"][0, 0] += 1
    torch.save(tensors, path)


MUTATIONS: dict[str, Change] = {
    "one bit of the weights": lambda folder: flip_a_bit(folder / "model.safetensors"),
    "weights of a Dense module": rewrite_dense,
    "weights of a LayerNorm module": lambda folder: flip_a_bit(module(folder, "LayerNorm") / "model.safetensors"),
    "activation of a Dense module": in_module("Dense", activation_function="torch.nn.modules.activation.ReLU"),
    "order of modules": swap_modules,
    "another module": add_normalize,
    "pooling mode": in_module("Pooling", pooling_mode_mean_tokens=False, pooling_mode_cls_token=True),
    "pooling of the prompt": in_module("Pooling", include_prompt=False),
    "architecture": edited("config.json", hidden_act="relu"),
    "token types": edited("config.json", type_vocab_size=3),
    "positions": edited("config.json", position_embedding_type="relative_key"),
    "layer norm of the transformer": edited("config.json", layer_norm_eps=1e-5),
    "vocabulary": edit_tokenizer("model", swap_words),
    "an added token": edit_tokenizer(
        "added_tokens", lambda tokens: [*tokens, {**tokens[0], "id": 999, "content": "<new>"}]
    ),
    "normalizer": edit_tokenizer("normalizer", lambda _: {"type": "Lowercase"}),
    "splitting into words": edit_tokenizer("pre_tokenizer", lambda _: {"type": "Whitespace"}),
    "special tokens around texts": edit_tokenizer("post_processor", lambda _: None),
    "special tokens of the configuration": edited("tokenizer_config.json", cls_token="[SEP]"),
    "an end token": edited("tokenizer_config.json", add_eos_token=True),
    "lower-casing": edited("sentence_bert_config.json", do_lower_case=True),
    "options of the tokenizer": edited("sentence_bert_config.json", tokenizer_args={"do_lower_case": True}),
    "an option that is not known here": edited("sentence_bert_config.json", new_option=32),
    "another option of the model": edited("config_sentence_transformers.json", skiplist_words=["a"]),
    "longest input": edited("sentence_bert_config.json", max_seq_length=32),
    "truncation side": edited("tokenizer_config.json", truncation_side="left"),
}


@pytest.mark.parametrize("change", MUTATIONS.values(), ids=MUTATIONS)
def test_each_ingredient_of_the_files_changes_every_space(folder: Path, change: Change) -> None:
    before = spaces(folder)
    change(folder)
    after = spaces(folder)

    assert {space for row in before.values() for space in row.values()}.isdisjoint(
        {space for row in after.values() for space in row.values()}
    )


SPECS: dict[str, dict[str, Any]] = {
    "pooling of the registry": {"pooling": ("cls",)},
    "longest input of the registry": {"max_tokens": 32},
    "truncation side of the registry": {"truncate": "start"},
    "bfloat16": {"dtype": "bfloat16"},
    "float16": {"dtype": "float16"},
    "int8": {"dtype": "int8"},
    "normalization": {"normalize": False},
    "remote code": {"trust_remote_code": True},
}


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_each_ingredient_of_the_registry_changes_every_space(folder: Path, spec: dict[str, Any]) -> None:
    before, after = spaces(folder), spaces(folder, **spec)

    assert before.keys() == after.keys()
    assert all(after[prompt][width] != space for prompt, row in before.items() for width, space in row.items())


def test_a_prompt_and_a_width_are_spaces_of_their_own(folder: Path) -> None:
    found = spaces(folder)

    assert {prompt: list(row) for prompt, row in found.items()} == {key: ["40", "16"] for key in ["", *sorted(PROMPTS)]}
    assert len({space for row in found.values() for space in row.values()}) == 6
    other = spaces(folder, prompts={"query": "Query: "})
    assert (other[""], other["document"]) == (found[""], found["document"])
    assert other["query"] != found["query"]


def test_the_layer_norm_before_a_cut_changes_the_cut_vectors_only(folder: Path) -> None:
    before = spaces(folder)[""]
    after = spaces(folder, matryoshka=Matryoshka(widths=(16,), layer_norm=True))[""]

    assert after["40"] == before["40"]
    assert after["16"] != before["16"]


def test_the_repositorys_own_code_counts_where_it_is_trusted(folder: Path) -> None:
    plain, trusted = spaces(folder), spaces(folder, trust_remote_code=True)
    (folder / "modeling_custom.py").write_text("VALUE = 2\n")

    assert spaces(folder) == plain
    assert spaces(folder, trust_remote_code=True) != trusted


def reshard(folder: Path) -> None:
    """Spreads the weights over two files with an index, as transformers saves large models."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for index, name in enumerate(sorted(tensors)):
        weight_map[name] = f"model-{index % 2 + 1:05}-of-00002.safetensors"
    for file in set(weight_map.values()):
        save_file({name: tensors[name] for name in tensors if weight_map[name] == file}, folder / file)
    index_file = folder / "model.safetensors.index.json"
    index_file.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))


def save_with_metadata(folder: Path) -> None:
    save_file(load_file(folder / "model.safetensors"), folder / "model.safetensors", metadata={"format": "np"})


def touch(folder: Path) -> None:
    for path in folder.rglob("*"):
        path.touch()


def add_a_file(folder: Path) -> None:
    (folder / "README.md").write_text("# A model")


HARMLESS: dict[str, Change] = {
    "files written again": touch,
    "another shard layout": reshard,
    "other metadata of the weights": save_with_metadata,
    "a version of transformers": edited("config.json", transformers_version="9.9", _name_or_path="elsewhere"),
    "versions of sentence-transformers": edited(
        "config_sentence_transformers.json", __version__={"pytorch": "9"}, similarity_fn_name="dot"
    ),
    "labels of a head": edited("config.json", id2label={"0": "a"}, architectures=["BertForMaskedLM"]),
    "the dtype that files name": edited("config.json", torch_dtype="bfloat16", dtype="bfloat16"),
    "a chat template": edited("tokenizer_config.json", chat_template="{{ text }}", padding_side="left"),
    "another file": add_a_file,
    "the same pooling in newer words": in_module("Pooling", pooling_mode="mean"),
}


@pytest.mark.parametrize("change", HARMLESS.values(), ids=HARMLESS)
def test_what_changes_no_vector_changes_no_space(folder: Path, change: Change) -> None:
    before = spaces(folder)
    change(folder)

    assert spaces(folder) == before


def test_names_of_models_and_folders_do_not_count(folder: Path, tmp_path: Path) -> None:
    before = spaces(folder)
    moved = folder.rename(tmp_path / "elsewhere")

    assert spaces(moved, model_id="other", source="./elsewhere", description="other", max_batch_tokens=64) == before


def test_a_statement_of_the_registry_that_repeats_the_files_does_not_count(folder: Path) -> None:
    same: dict[str, Any] = {
        "pooling": ("mean",),
        "max_tokens": 64,
        "truncate": "end",
        "dtype": "float32",
        "device": "cpu",
    }

    assert spaces(folder, **same) == spaces(folder)


def test_a_gpu_has_the_spaces_of_its_own_dtype(folder: Path) -> None:
    assert spaces(folder, "cuda:0") == spaces(folder, "cpu", dtype="bfloat16")
    assert spaces(folder, "cuda:1", dtype="float32") == spaces(folder, "cpu")


def test_a_folder_that_ends_with_normalize_has_one_space_whether_or_not_vectors_are_normalized(folder: Path) -> None:
    add_normalize(folder)
    given, raw = spaces(folder), spaces(folder, normalize=False)

    assert given[""]["40"] == raw[""]["40"]
    assert given[""]["16"] != raw[""]["16"]


def test_a_bare_folder_is_the_one_with_mean_pooling(original: Path, tmp_path: Path) -> None:
    chain, bare = tmp_path / "chain", tmp_path / "bare"
    tokenizer = vocabularies.bert()
    save(chain, transformer(bert_config(tokenizer)), tokenizer, [Pooling(WIDTH, "mean")], max_length=None)
    shutil.copytree(chain, bare)
    (bare / "modules.json").unlink()

    assert spaces(bare) == spaces(chain)


def test_what_is_not_known_is_said(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\x00" * 9)
    found = disk_spaces(folder)

    assert found.spaces == {}
    assert "model.safetensors is truncated or corrupt" in found.why_unknown
    assert str(tmp_path) not in found.why_unknown


def test_weights_that_were_written_after_the_load_began_have_no_digest(folder: Path) -> None:
    read = read_folder(folder)
    weights = list_weights(read)
    flip_a_bit(folder / "model.safetensors")
    (folder / "model.safetensors").touch()

    with pytest.raises(FilesChanged):
        read_ingredients(read, ModelSpec(model_id="m", source="m"), weights, ContentDigests(None))


LOADED = ("bert-instructor", "bert-dense-tanh-legacy", "roberta-mean", "qwen2-last", "gemma3-bidirectional", "static")


@pytest.mark.parametrize("name", LOADED)
def test_a_loaded_model_has_the_spaces_of_its_files(kit: Kit, name: str) -> None:
    folder, spec = kit.recipe_folder(name), RECIPES[name].spec
    engine = kit.load(folder, **spec)
    on_disk = disk_spaces(folder, **{"matryoshka": None, **spec})

    assert engine.info.ingredients == on_disk.ingredients
    for prompt, row in on_disk.spaces.items():
        for width, space in row.items():
            call = EmbedCall(model_id="m", texts=("text",), dimensions=int(width), input_type=prompt or None)
            assert asyncio.run(engine.run(call)).space == space
    engine.close()


def ingredients_of(folder: Folder) -> Ingredients:
    return read_ingredients(folder, ModelSpec(model_id="m", source="m"), list_weights(folder), ContentDigests(None))


def test_an_adapter_and_each_part_of_it_decide_the_vectors(folder: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"r": 4, "base_model_name_or_path": "org/a"}')
    save_file({"lora_A": np.ones((2, 2), np.float32)}, adapter / "adapter_model.safetensors")
    plain = read_folder(folder)
    merged = structs.replace(plain, adapter=adapter)
    given = ingredients_of(merged)

    assert given != ingredients_of(plain)
    (adapter / "adapter_config.json").write_text('{"r": 4, "base_model_name_or_path": "another name"}')
    assert ingredients_of(merged) == given
    (adapter / "adapter_config.json").write_text('{"r": 8}')
    assert ingredients_of(merged).values["adapter"] != given.values["adapter"]
    save_file({"lora_A": np.zeros((2, 2), np.float32)}, adapter / "adapter_model.safetensors")
    assert ingredients_of(merged).values["adapter weights"] != given.values["adapter weights"]


def test_the_tokenizer_of_an_adapter_takes_the_place_of_its_bases(folder: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    save_file({"lora_A": np.ones((2, 2), np.float32)}, adapter / "adapter_model.safetensors")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / name, adapter / name)
    merged = structs.replace(read_folder(folder), adapter=adapter)
    given = ingredients_of(merged)

    edit_json(folder / "tokenizer.json", normalizer=None)
    assert ingredients_of(merged) == given
    edit_json(adapter / "tokenizer.json", normalizer=None)
    assert ingredients_of(merged).values["normalizer"] != given.values["normalizer"]
    edit_json(adapter / "tokenizer_config.json", truncation_side="left")
    assert ingredients_of(merged).values["truncation_side"] == "start"


@pytest.mark.parametrize(
    "setting",
    [{"doc_maxlen": 30}, {"query_maxlen": 20}, {"attend_to_mask_tokens": True}, {"mask_punctuation": False}],
    ids=lambda setting: next(iter(setting)),
)
def test_the_settings_of_stanfords_colbert_decide_the_vectors(tmp_path: Path, setting: dict[str, Any]) -> None:
    late_models.FAMILIES["stanford"].build(tmp_path)
    given = ingredients_of(read_folder(tmp_path))

    edit_json(tmp_path / "artifact.metadata", **setting)

    assert ingredients_of(read_folder(tmp_path)) != given


def test_heads_beside_a_transformer_in_a_folder_of_its_own_decide_the_vectors(folder: Path, tmp_path: Path) -> None:
    nested = structs.replace(read_folder(folder), base=tmp_path)
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "sparse_linear.pt").write_bytes(b"a head")

    assert "sparse:weights" in ingredients_of(nested).values


def test_both_sides_of_a_router_decide_the_vectors(tmp_path: Path) -> None:
    save_router(tmp_path)
    given = ingredients_of(read_folder(tmp_path))
    (table,) = tmp_path.glob("query_*/model.safetensors")
    flip_a_bit(table)

    found = ingredients_of(read_folder(tmp_path))

    assert {name for name, value in found.values.items() if value != given.values[name]} == {"query side weights"}
    assert given.values["side without a name"] == "document"
