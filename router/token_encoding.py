"""Token ids of another tokenizer back to texts, for models whose registry entry names a `token_encoding`.

LangChain's OpenAI client sends ids of OpenAI's `cl100k_base`, which mean nothing to any other model. tiktoken reads
them and is not among our dependencies. It fetches an encoding's file once, and keeps it under `TIKTOKEN_CACHE_DIR`.
"""

import asyncio
from collections.abc import Sequence
from typing import Any

from engines.errors import InvalidTokenId

_CURE = "send texts instead; with LangChain, set check_embedding_ctx_length=False"


async def decode_token_ids(encoding_name: str, rows: Sequence[Sequence[int]]) -> tuple[str, ...]:
    """The text of each row. On a thread, because the first use of an encoding reads megabytes.

    Raises:
        InvalidTokenId: an id is not of this encoding, or this server does not have the encoding.
    """
    return await asyncio.to_thread(_decode, encoding_name, rows)


def _decode(encoding_name: str, rows: Sequence[Sequence[int]]) -> tuple[str, ...]:
    encoding = _encoding(encoding_name)
    return tuple(_text(encoding, encoding_name, index, row) for index, row in enumerate(rows))


def _encoding(name: str) -> Any:
    try:
        import tiktoken  # late: it need not be installed
    except ImportError:
        raise InvalidTokenId(
            f"input holds token ids, and this server cannot read them: tiktoken is not installed; {_CURE}",
            param="input",
        ) from None
    try:
        return tiktoken.get_encoding(name)
    except (OSError, ValueError):  # no network and no cached file; a file that is not what it should be
        raise InvalidTokenId(
            f"input holds token ids, and this server cannot read them: it could not get the file of {name}; {_CURE}",
            param="input",
        ) from None


def _text(encoding: Any, name: str, index: int, row: Sequence[int]) -> str:
    try:
        text: str = encoding.decode(row)
    except (KeyError, OverflowError):
        raise InvalidTokenId(
            f"input[{index}] holds a token id that {name} does not have; {_CURE}", param="input"
        ) from None
    return text
