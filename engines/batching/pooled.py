"""Bounds the merging of a document's vectors, whose cost grows with the square of their number."""

from collections.abc import Sequence

from engines.errors import InvalidValue
from engines.layers.token_pooling import MAX_POOLED_VECTORS, TokenPooling, has_clustering
from engines.types import format_bytes

MAX_HELD_BYTES = 256 * 2**20
"""The most bytes of one request's vectors that wait to be merged."""


def check_pooled(poolings: Sequence[TokenPooling], token_counts: Sequence[int], width: int, field: str) -> None:
    """Checks, before any work is done, that the vectors of documents can be merged.

    Args:
        poolings: what is done with them; with none, nothing is checked.
        width: of the vectors.
        field: of the request, which messages name.

    Raises:
        InvalidValue: a document is too long, all of them are, or the library that clusters is missing.
    """
    if any(pooling.factor > 1 for pooling in poolings):
        _check_clustering(token_counts, field)
    size_bytes = 4 * sum(token_counts) * width
    if poolings and size_bytes > MAX_HELD_BYTES:
        raise InvalidValue(
            f"the vectors of {len(token_counts)} inputs take {format_bytes(size_bytes)} before they are merged, and "
            f"the limit is {format_bytes(MAX_HELD_BYTES)}: send fewer inputs",
            param=field,
        )


def _check_clustering(token_counts: Sequence[int], field: str) -> None:
    if not has_clustering():
        raise InvalidValue(
            "pool_factor needs scipy, which the server does not have: pip install 'embedyard[multi-vector]', or leave "
            "pool_factor out",
            param="pool_factor",
        )
    longest = max(range(len(token_counts)), key=token_counts.__getitem__)
    if token_counts[longest] > MAX_POOLED_VECTORS:
        raise InvalidValue(
            f"{field}[{longest}] has {token_counts[longest]} tokens, and the vectors of at most {MAX_POOLED_VECTORS} "
            "can be merged: shorten it",
            param=field,
        )
