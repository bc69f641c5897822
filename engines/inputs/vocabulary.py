"""Whether a tokenizer belongs to its model: its files are there, its words fit the table of tokens, and it tells texts
apart.

transformers makes an empty vocabulary of five special tokens where a folder has no tokenizer file, and a tokenizer of
another model loads without complaint: with both, wrong vectors are served with status 200.
"""

import re
from pathlib import Path

from tokenizers import Tokenizer as FastTokenizer

from engines.errors import BrokenFiles, UnsupportedModel

MAX_FILE_BYTES = 128 * 2**20
"""The largest known tokenizer.json (Gemma's, 262,144 pieces) has 33 MB, and takes ten times that while it is read."""

_FILES = re.compile(
    r"tokenizer\.json|vocab.*|merges\.txt|.*\.model|.*\.tiktoken|bpe\.codes|tekken\.json|.*tokenizer.*\.py"
)
"""Where a vocabulary may stand; tokenizer_config.json alone holds none."""

_FEWEST = 0.5
"""Of the table's rows, the tokenizer must know this share: ByT5's knows 67 %, tables padded to a round size 98 %."""

_FOREIGN = 0.05
_FOREIGN_AT_LEAST = 128
"""Tokens that the table has no row for: somebody added some and did not resize the model. Texts with one of those are
refused by themselves; more than this share is another model's tokenizer."""

PROBES = (
    "The quick brown fox jumps over the lazy dog.", "Über den Dächern schlägt die Uhr.", "中文文本与标点。",
    "日本語のテキスト", "Съешь ещё этих мягких булок", "نص عربي قصير", "हिन्दी में एक वाक्य", "한국어 문장입니다",
    "ข้อความภาษาไทย", "def f(x): return x + 1", "3.14159 2026", "ACGTACGT TTGACA", "MKTAYIAKQR", "CC(=O)Oc1ccccc1",
)  # fmt: skip
"""Texts of which any tokenizer of texts (or of genes, proteins and molecules) knows some."""


_RARE = "\U00013000\U00013050 \ue000"
"""Hieroglyphs and a private character: bytes or the unknown token, for vocabularies without a name for the latter."""


def check_tokenizer_files(folder: Path) -> None:
    """Refuse a folder without a vocabulary, or with one that is too large to be read.

    Raises:
        BrokenFiles: naming the file.
    """
    found = [path for path in folder.iterdir() if _FILES.fullmatch(path.name)]
    if not found:
        raise BrokenFiles(
            "tokenizer.json is missing, and there is no other file with a vocabulary; fetch the model again, or save "
            "its tokenizer into the folder",
            file="tokenizer.json",
        )
    for path in found:
        check_size(path, path.name)


def check_size(path: Path, file: str) -> None:
    """Refuse a vocabulary that would fill the memory.

    Raises:
        BrokenFiles: naming `file`.
    """
    size_bytes = path.stat().st_size
    if size_bytes > MAX_FILE_BYTES:
        raise BrokenFiles(
            f"{file} has {size_bytes} bytes, and a tokenizer's file may have {MAX_FILE_BYTES}; fetch the model again",
            file=file,
        )


def check_vocabulary(backend: FastTokenizer, num_rows: int) -> None:
    """Refuse a vocabulary that is not that of a model with `num_rows` tokens.

    Raises:
        UnsupportedModel: it is far smaller or larger than the table, or tells no text from another.
    """
    size = backend.get_vocab_size()
    if size < _FEWEST * num_rows or size - num_rows > max(_FOREIGN_AT_LEAST, _FOREIGN * num_rows):
        raise UnsupportedModel(
            f"the tokenizer knows {size} tokens, and the model has a row for each of {num_rows}: it is another "
            "model's, or not whole; fetch the model again, or save the model's own tokenizer into the folder"
        )
    if len(_known_ids(backend)) < min(2, num_rows):
        raise UnsupportedModel(
            f"the tokenizer knows no word of {len(PROBES)} texts in ten scripts, so that all vectors would be alike; "
            "fetch the model again, or save the model's own tokenizer into the folder"
        )


def _known_ids(backend: FastTokenizer) -> set[int]:
    """The ids of the probes, but for those that stand for what is unknown."""
    *probes, rare = backend.encode_batch_fast([*PROBES, _RARE], add_special_tokens=False)
    unknown = getattr(backend.model, "unk_token", None)
    unknown_ids = {*rare.ids, *(() if unknown is None else (backend.token_to_id(unknown),))}
    return {token_id for probe in probes for token_id in probe.ids} - unknown_ids
