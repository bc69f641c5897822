"""Tests which models are compared with llama.cpp, and what its files are refused for."""

import importlib
import json
from pathlib import Path

import pytest

from benchmarks.lib.peers import PEERS

llama = importlib.import_module("benchmarks.peers.llama")


def _folder(path: Path, model_type: str, pooling: str = "pooling_mode_lasttoken") -> Path:
    (path / "1_Pooling").mkdir()
    (path / "config.json").write_text(json.dumps({"model_type": model_type}))
    (path / "1_Pooling" / "config.json").write_text(json.dumps({pooling: True}))
    return path


def test_llama_cpp_is_compared_on_the_decoders_that_it_gets(tmp_path: Path) -> None:
    peers = {peer.kind: peer for peer in PEERS}
    (bert := tmp_path / "bert").mkdir()
    (decoder := tmp_path / "decoder").mkdir()
    _folder(bert, "bert")
    _folder(decoder, "qwen3")

    assert peers["llama-cpp-q8-0"].can_run(decoder)
    assert not peers["llama-cpp-q8-0"].can_run(bert)
    assert peers["sentence-transformers"].can_run(bert)


@pytest.mark.parametrize(
    ("model_type", "pooling", "reason"),
    [("bert", "pooling_mode_lasttoken", "not of bert"), ("qwen3", "pooling_mode_cls_token", "neither")],
)
def test_other_models_are_refused_with_the_reason(tmp_path: Path, model_type: str, pooling: str, reason: str) -> None:
    folder = _folder(tmp_path, model_type, pooling)

    with pytest.raises(ValueError, match=reason):
        llama.export_gguf(str(folder), str(tmp_path / "target"))
