"""Sorts scores and encodes them as the bodies of rerank, score, classify and predict routes.

Large answers are sorted and encoded on a thread. Scores are written as the shortest decimals that read back as the same
float32.
"""

import asyncio
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import numpy as np
import orjson
from numpy.typing import NDArray

from router.api.scoring import Scored

_INLINE_SCORES = 256
"""More scores are sorted and encoded on a thread: 0.2 ms on the event loop for so many."""
_INLINE_CHARS = 2**16
"""Answers that repeat more characters are encoded on a thread."""
_PIECE_ITEMS = 256
"""Items per encoder call, which holds the GIL."""

Items = Iterable[dict[str, object]]


def best_first(values: NDArray[np.float32], top_n: int | None = None) -> list[int]:
    """Return the indexes of `values`, `[n]`, by falling value; equal values by index."""
    order: list[int] = np.argsort(-values, kind="stable").tolist()
    return order[: top_n or None]


async def encode_ranking(
    scored: Scored, texts: Sequence[str] | None, top_n: int | None, api_version: Literal["1", "2"]
) -> bytes:
    """Encode the answer of `/v1/rerank`. `texts`: the documents, if each result has its own."""

    def encode() -> bytes:
        values = scored.values[:, 0]
        results = (
            {"index": index, "relevance_score": values[index]}
            | ({} if texts is None else {"document": {"text": texts[index]}})
            for index in best_first(values, top_n)
        )
        head = {"id": str(uuid.uuid4()), "object": "list", "model": scored.model_id} | _method(scored)
        meta = {
            "api_version": {"version": api_version},
            "billed_units": {"search_units": 1},
            "tokens": {"input_tokens": scored.num_tokens, "output_tokens": 0},
        }
        return _join(head, "results", results, {"usage": _usage(scored), "meta": meta})

    return await _offload(encode, scored.values.size, texts)


async def encode_infinity_ranking(scored: Scored, texts: Sequence[str] | None, top_n: int | None) -> bytes:
    """Encode Infinity's answer to `/rerank`, whose documents are strings. `texts`: as for `encode_ranking`."""

    def encode() -> bytes:
        values = scored.values[:, 0]
        results = (
            {"index": index, "relevance_score": values[index]} | ({} if texts is None else {"document": texts[index]})
            for index in best_first(values, top_n)
        )
        return _join(_head("rerank", "rerank", scored) | _method(scored), "results", results, {"usage": _usage(scored)})

    return await _offload(encode, scored.values.size, texts)


async def encode_tei_ranking(scored: Scored, texts: Sequence[str] | None) -> bytes:
    """Encode TEI's answer to `/rerank`. `texts`: as for `encode_ranking`."""

    def encode() -> bytes:
        values = scored.values[:, 0]
        ranks: Items = (
            {"index": index, "score": values[index]} | ({} if texts is None else {"text": texts[index]})
            for index in best_first(values)
        )
        return b"[" + _pieces(ranks) + b"]"

    return await _offload(encode, scored.values.size, texts)


async def encode_scores(scored: Scored) -> bytes:
    """Encode the answer of `/v1/score`, in the order of the request."""

    def encode() -> bytes:
        data: Items = (
            {"index": index, "object": "score", "score": value} for index, value in enumerate(scored.values[:, 0])
        )
        return _join(_head("score", "list", scored) | _method(scored), "data", data, {"usage": _usage(scored)})

    return await _offload(encode, scored.values.size)


async def encode_labels(scored: Scored) -> bytes:
    """Encode vLLM's answer of `/v1/classify`, in the order of the request."""

    def encode() -> bytes:
        data: Items = (
            {"index": index, "label": scored.labels[int(np.argmax(row))], "probs": row, "num_classes": len(row)}
            for index, row in enumerate(scored.values)
        )
        return _join(_head("classify", "list", scored), "data", data, {"usage": _usage(scored)})

    return await _offload(encode, scored.values.size)


async def encode_infinity_labels(scored: Scored) -> bytes:
    """Encode Infinity's answer of `/classify`: all labels of each text, best first."""

    def encode() -> bytes:
        data = (predictions(row, scored.labels) for row in scored.values)
        return _join(_head("classify", "classify", scored), "data", data, {"usage": _usage(scored)})

    return await _offload(encode, scored.values.size)


async def encode_predictions(scored: Scored, *, is_batch: bool) -> bytes:
    """Encode TEI's answer of `/predict`: the labels of each input, best first; a list of such lists for a batch."""

    def encode() -> bytes:
        encoded = _pieces(predictions(row, scored.labels) for row in scored.values)
        return b"[" + encoded + b"]" if is_batch else encoded

    return await _offload(encode, scored.values.size)


def predictions(row: NDArray[np.float32], labels: Sequence[str]) -> list[dict[str, object]]:
    """Return labels with their scores, best first."""
    return [{"score": row[index], "label": labels[index]} for index in best_first(row)]


async def _offload(encode: Callable[[], bytes], num_scores: int, texts: Sequence[str] | None = None) -> bytes:
    is_large = num_scores > _INLINE_SCORES or (texts is not None and sum(map(len, texts)) > _INLINE_CHARS)
    return await asyncio.to_thread(encode) if is_large else encode()


def _head(kind: str, object_name: str, scored: Scored) -> dict[str, object]:
    return {
        "id": f"{kind}-{uuid.uuid4().hex}",
        "object": object_name,
        "created": int(time.time()),
        "model": scored.model_id,
    }


def _method(scored: Scored) -> dict[str, object]:
    return {} if scored.method is None else {"method": scored.method}


def _usage(scored: Scored) -> dict[str, int]:
    return {"prompt_tokens": scored.num_tokens, "total_tokens": scored.num_tokens}


def _join(head: dict[str, object], name: str, items: Iterable[object], tail: dict[str, object]) -> bytes:
    """Encode one object: the fields of `head`, the array `name`, and the fields of `tail`."""
    parts = [_dump(head)[:-1], b',"', name.encode(), b'":[', _pieces(items), b"],", _dump(tail)[1:]]
    return b"".join(parts)


def _pieces(items: Iterable[object]) -> bytes:
    """Encode the items of an array, without its brackets."""
    every = list(items)
    starts = range(0, len(every), _PIECE_ITEMS)
    return b",".join(_dump(every[start : start + _PIECE_ITEMS])[1:-1] for start in starts)


def _dump(value: Any) -> bytes:
    return orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY)
