"""Which files of sparse models are fetched: those of a Router's routes, and bge-m3's head."""

import json
from typing import Any

import pytest

from engines.errors import BrokenFiles
from engines.hub.file_selection import HEAD_FILES, select

_ST = "sentence_transformers.sparse_encoder.models"
ROUTER = {
    "types": {
        "query_0_SparseStaticEmbedding": f"{_ST}.SparseStaticEmbedding.SparseStaticEmbedding",
        "": f"{_ST}.MLMTransformer.MLMTransformer",
        "document_1_SpladePooling": f"{_ST}.SpladePooling.SpladePooling",
    },
    "structure": {"query": ["query_0_SparseStaticEmbedding"], "document": ["", "document_1_SpladePooling"]},
    "parameters": {"default_route": "document"},
}
MODULES = [{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Router"}]
NAMES = [
    "modules.json", "router_config.json", "config.json", "model.safetensors", "tokenizer.json", "README.md",
    "document_1_SpladePooling/config.json", "query_0_SparseStaticEmbedding/config.json",
    "query_0_SparseStaticEmbedding/model.safetensors", "query_0_SparseStaticEmbedding/tokenizer.json",
    "other/model.safetensors",
]  # fmt: skip


def chosen(names: list[str], **contents: Any) -> tuple[set[str], set[str]]:
    files = {name.replace("__", "."): json.dumps(content).encode() for name, content in contents.items()}
    found = select(names, files.__getitem__, source="test", with_code=False)
    return {*found.files}, {*found.weights}


def test_the_files_of_every_route_are_fetched() -> None:
    files, weights = chosen(NAMES, modules__json=MODULES, router_config__json=ROUTER)

    assert files == {*NAMES} - {"README.md", "other/model.safetensors"}
    assert weights == {"model.safetensors", "query_0_SparseStaticEmbedding/model.safetensors"}


@pytest.mark.parametrize("config", [{}, {"types": []}, []])
def test_a_router_without_modules_is_refused(config: Any) -> None:
    with pytest.raises(BrokenFiles, match=r"router_config\.json lists no modules"):
        chosen(NAMES, modules__json=MODULES, router_config__json=config)


def test_a_table_without_weights_is_refused() -> None:
    names = [name for name in NAMES if name != "query_0_SparseStaticEmbedding/model.safetensors"]

    with pytest.raises(BrokenFiles, match=r"query_0_SparseStaticEmbedding/model\.safetensors is missing"):
        chosen(names, modules__json=MODULES, router_config__json=ROUTER)


def test_the_head_beside_a_transformer_is_fetched() -> None:
    names = ["config.json", "pytorch_model.bin", "tokenizer.json", *HEAD_FILES, "other.pt"]

    files, weights = chosen(names)

    assert {*HEAD_FILES} <= files & weights
    assert "other.pt" not in files


def test_the_weights_of_an_autoencoder_are_fetched_and_needed() -> None:
    folder = "1_SparseAutoEncoder"
    chain = [
        {"idx": 0, "name": "0", "path": "", "type": f"{_ST}.Transformer.Transformer"},
        {"idx": 1, "name": "1", "path": folder, "type": f"{_ST}.SparseAutoEncoder.SparseAutoEncoder"},
    ]
    names = [
        "modules.json", "config.json", "model.safetensors", f"{folder}/config.json", f"{folder}/model.safetensors",
    ]  # fmt: skip

    assert chosen(names, modules__json=chain)[1] == {"model.safetensors", f"{folder}/model.safetensors"}
    with pytest.raises(BrokenFiles, match=rf"{folder}/model\.safetensors is missing"):
        chosen(names[:-1], modules__json=chain)
