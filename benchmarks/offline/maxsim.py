"""Measures the engine's MaxSim scores beside `MultiVectorEncoder` of sentence-transformers.

    python -m benchmarks.offline.maxsim --model minilm [--cpu-time]

One query and 100 documents a call, of mixed and of equal lengths, on models of late interaction of random weights in
the sizes of MiniLM-L6 and of BERT base (ColBERT v2), which fill queries up to 32 tokens and give vectors 128 wide. The
peer encodes the query and the documents, and takes their similarity. All else is as `offline.rerank` does it.
"""

import argparse
import json
import shutil
import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import MultiVectorEncoder
from sentence_transformers.base.modules import Dense, Normalize, Transformer
from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask
from transformers import BertConfig, BertModel

from benchmarks.lib.folders import BENCH, minilm_package, prepare
from benchmarks.lib.models import quiet
from benchmarks.lib.report import add_save_option, publish
from benchmarks.offline.rerank import BASE, CASES, SIZES, TOKENIZER_FILES, run

PEERS = {BASE: ("multi-vector", None)}
"""By name: the kind in `peers/peer.py`, and the environment."""

_WIDTH, _QUERY_TOKENS, _DOCUMENT_TOKENS = 128, 32, 300


def build(size: str, root: Path = BENCH / "models") -> Path:
    """The folder of a model of that size with MiniLM's tokenizer, built when it is not there yet."""
    folder = root / f"colbert-{size}"
    if (folder / "built").exists():
        return folder
    prepare(BENCH)
    shutil.rmtree(folder, ignore_errors=True)
    draft = folder / "draft"
    draft.mkdir(parents=True)
    torch.manual_seed(7)
    shape: dict[str, Any] = {"vocab_size": 30522, **SIZES[size]}
    model: Any = BertModel(BertConfig(**shape))
    model.save_pretrained(draft)
    for file in TOKENIZER_FILES:
        shutil.copy(minilm_package() / file, draft / file)
    expansion: Any = {"strategy": "fixed", "attend": False, "length": _QUERY_TOKENS}
    with quiet():
        transformer = Transformer(str(draft), document_length=_DOCUMENT_TOKENS, query_expansion=expansion)
        projection = Dense(
            shape["hidden_size"], _WIDTH, bias=False, activation_function=None, module_input_name="token_embeddings"
        )
        mask = MultiVectorMask(skiplist_words=list(string.punctuation))
        modules = [transformer, projection, mask, Normalize(module_input_name="token_embeddings")]
        MultiVectorEncoder(modules=modules, device="cpu").save(str(folder), create_model_card=False)
    shutil.rmtree(draft)
    limits = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(limits | {"model_max_length": 512}))
    (folder / "built").touch()
    return folder


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table, and save it."""
    parser: Any = argparse.ArgumentParser(prog="python -m benchmarks.offline.maxsim", description=__doc__)
    parser.add_argument("--model", default="minilm", choices=list(SIZES))
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--documents", type=int, default=100)
    parser.add_argument("--cpu-time", action="store_true", help="processor time instead of time, on a busy machine")
    add_save_option(parser)
    asked = parser.parse_args(argv)
    found = run(build(asked.model), asked.cases, asked.rounds, asked.documents, peers=PEERS, is_cpu_time=asked.cpu_time)
    publish(found, asked.results)


if __name__ == "__main__":
    main()
