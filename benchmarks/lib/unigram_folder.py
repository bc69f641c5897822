"""Builds a folder of XLM-R-large's size with a unigram tokenizer as large as XLM-R's, and bge-m3's two further heads.

Its pieces are random, so that the library's trie of them has more nodes than that of any real vocabulary.
"""

import json
import random
import shutil
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor

from benchmarks.lib.folders import BENCH, resolve

NAME = "xlmr-large-unigram"

_SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")
_NUM_PIECES = 250002
_LETTERS = "abcdefghijklmnopqrstuvwxyzäöüßéèабвгдежзиклмнопрстуфхцчшщ中文日本語한국어ไทยعربي"
_OWN = ("tokenizer.json", "vocab.txt", "tokenizer_config.json", "special_tokens_map.json", "model.safetensors")


def build(root: Path = BENCH / "models") -> Path:
    """Return the folder, which is built on first use; its weights are those of `xlmr-large`."""
    folder, source = root / NAME, resolve("xlmr-large", root)
    if (folder / "tokenizer.json").exists():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns(*_OWN))
    (folder / "model.safetensors").symlink_to(source.resolve() / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config |= {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
    (folder / "config.json").write_text(json.dumps(config))
    _save_linear(folder / "sparse_linear.pt", 1, config["hidden_size"])
    _save_linear(folder / "colbert_linear.pt", config["hidden_size"], config["hidden_size"])
    names = {"bos": "<s>", "eos": "</s>", "sep": "</s>", "cls": "<s>", "unk": "<unk>", "pad": "<pad>", "mask": "<mask>"}
    stated = {f"{name}_token": token for name, token in names.items()}
    options = {"tokenizer_class": "XLMRobertaTokenizer", "model_max_length": 8192, **stated}
    (folder / "tokenizer_config.json").write_text(json.dumps(options))
    _tokenizer().save(str(folder / "tokenizer.json"))
    return folder


def _tokenizer() -> Tokenizer:
    chance = random.Random(1)
    pieces = dict.fromkeys([*_SPECIAL, *_LETTERS, "▁"])
    while len(pieces) < _NUM_PIECES - 1:
        letters = "".join(chance.choices(_LETTERS, k=chance.randint(2, 9)))
        pieces[f"▁{letters}" if chance.random() < 0.5 else letters] = None
    scored = [(piece, 0.0 if piece in _SPECIAL else -8 - number / 20000) for number, piece in enumerate(pieces)]
    tokenizer = Tokenizer(models.Unigram([*scored, ("<mask>", 0.0)], unk_id=3))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=["<s>", "$A", "</s>"], pair=["<s>", "$A", "</s>", "</s>", "$B", "</s>"],
        special_tokens=[("<s>", 0), ("</s>", 2)],
    )  # fmt: skip
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in (*_SPECIAL, "<mask>")])
    return tokenizer


def _save_linear(path: Path, rows: int, width: int) -> None:
    weight: Tensor = torch.randn(rows, width, generator=torch.Generator().manual_seed(1)) * 0.03
    torch.save({"weight": weight, "bias": torch.zeros(rows)}, path)
