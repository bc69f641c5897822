"""Wraps the backend of a real tokenizer, and counts what it is given."""

from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer as FastTokenizer


class CountedTokenizer:
    """A real backend that counts the characters that it encodes."""

    def __init__(self, backend: FastTokenizer) -> None:
        self._backend = backend
        self.characters = 0

    def encode(self, sequence: str, *, add_special_tokens: bool) -> Any:
        self.characters += len(sequence)
        return self._backend.encode(sequence, add_special_tokens=add_special_tokens)

    def encode_batch_fast(self, input: Sequence[str], *, add_special_tokens: bool) -> Sequence[Any]:
        self.characters += sum(map(len, input))
        return self._backend.encode_batch_fast(input, add_special_tokens=add_special_tokens)
