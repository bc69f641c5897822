"""Checks that a tokenizer belongs to its model: files exist, size fits the embedding table, texts get different ids.

transformers creates a vocabulary of five special tokens for a folder without a tokenizer file, and loads another
model's tokenizer without complaint: both would serve wrong vectors with status 200.
"""

import re
from pathlib import Path

from tokenizers import Tokenizer as FastTokenizer

from engines.errors import BrokenFiles, UnsupportedModel

MAX_FILE_BYTES = 128 * 2**20
"""Limit of a tokenizer file: the largest known (Gemma's, 262,144 pieces) has 33 MB and takes ten times that to read."""

_FILES = re.compile(
    r"tokenizer\.json|vocab.*|merges\.txt|.*\.model|.*\.tiktoken|bpe\.codes|tekken\.json|.*tokenizer.*\.py"
)
"""Files that may hold a vocabulary; tokenizer_config.json holds none."""

_MIN_KNOWN_SHARE = 0.5
"""The tokenizer must know this share of the table's rows: ByT5's knows 67 %, tables padded to a round size 98 %."""

_MAX_EXTRA_SHARE = 0.05
_MIN_EXTRA_LIMIT = 128
"""Limits of tokens without a row in the table, which appear when tokens were added without resizing the model.

A text with such a token is rejected by itself; above these limits the tokenizer belongs to another model.
"""

PROBES = (
    "The quick brown fox jumps over the lazy dog.", "Über den Dächern schlägt die Uhr.", "中文文本与标点。",
    "日本語のテキスト", "Съешь ещё этих мягких булок", "نص عربي قصير", "हिन्दी में एक वाक्य", "한국어 문장입니다",
    "ข้อความภาษาไทย", "def f(x): return x + 1", "3.14159 2026", "ACGTACGT TTGACA", "MKTAYIAKQR", "CC(=O)Oc1ccccc1",
)  # fmt: skip
"""Any tokenizer of texts (or of genes, proteins and molecules) knows some tokens of these."""

_RARE_TEXT = "\U00013000\U00013050 \ue000"
"""Hieroglyphs and a private-use character: yield bytes or the unknown token, which not every vocabulary names."""


def check_tokenizer_files(folder: Path) -> None:
    """Rejects a folder without a vocabulary, or with one that is too large to read.

    Raises:
        BrokenFiles: naming the file.
    """
    found = [path for path in folder.iterdir() if _FILES.fullmatch(path.name)]
    if not found:
        raise BrokenFiles(
            "tokenizer.json is missing, and no other file holds a vocabulary; fetch the model again, or save its "
            "tokenizer into the folder",
            file="tokenizer.json",
        )
    for path in found:
        check_size(path, path.name)


def check_size(path: Path, file: str) -> None:
    """Rejects a vocabulary that would exhaust the memory.

    Raises:
        BrokenFiles: naming `file`.
    """
    size_bytes = path.stat().st_size
    if size_bytes > MAX_FILE_BYTES:
        raise BrokenFiles(
            f"{file} has {size_bytes} bytes, but the limit is {MAX_FILE_BYTES}; fetch the model again",
            file=file,
        )


def check_vocabulary(backend: FastTokenizer, num_rows: int) -> None:
    """Rejects a vocabulary that does not belong to a model with an embedding table of `num_rows`.

    Raises:
        UnsupportedModel: it is far smaller or larger than the table, or gives the same ids for all texts.
    """
    size = backend.get_vocab_size()
    if size < _MIN_KNOWN_SHARE * num_rows or size - num_rows > max(_MIN_EXTRA_LIMIT, _MAX_EXTRA_SHARE * num_rows):
        raise UnsupportedModel(
            f"the tokenizer has {size} tokens, but the model's embedding table has {num_rows} rows: it is incomplete "
            "or belongs to another model; fetch the model again, or save the model's own tokenizer into the folder"
        )
    if len(_known_ids(backend)) < min(2, num_rows):
        raise UnsupportedModel(
            f"the tokenizer knows no word of {len(PROBES)} texts in ten scripts, so all vectors would be alike; fetch "
            "the model again, or save the model's own tokenizer into the folder"
        )


def _known_ids(backend: FastTokenizer) -> set[int]:
    """Returns the ids of the probes without those of unknown tokens."""
    *probes, rare = backend.encode_batch_fast([*PROBES, _RARE_TEXT], add_special_tokens=False)
    unknown = getattr(backend.model, "unk_token", None)
    unknown_ids = {*rare.ids, *(() if unknown is None else (backend.token_to_id(unknown),))}
    return {token_id for probe in probes for token_id in probe.ids} - unknown_ids
