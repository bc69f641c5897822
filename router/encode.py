"""Vectors → the bytes of an answer: numbers or base64, float32 or quantised. Knows no engine and no request.

Bodies are written in pieces of a bounded size, a large one on a thread: JSON encoders hold the GIL for a whole call,
so one call for megabytes would stop the event loop from any thread.
"""

import asyncio
from collections.abc import Iterator

import msgspec
import numpy as np
import orjson
from msgspec import Struct

from engines.records import Embeddings
from engines.spec import Calibration
from router.quantize import Matrix, quantize
from router.schema import EncodingFormat, OutputDtype, Usage

_PIECE_COMPONENTS = 2**15
"""One encoder call: about 1.2 ms as numbers, 0.2 ms as base64."""
_INLINE_COMPONENTS: dict[EncodingFormat, int] = {"float": 2**15, "base64": 2**18}
"""Above this a body is encoded on a thread. Here the loop stands still for 1 to 2 ms; handing over costs 0.3 ms, and
2,048 × 1,024 numbers would stop it for 140 ms."""


class Form(Struct, frozen=True, kw_only=True):
    """How vectors are written. `calibration`: the ranges of int8 and uint8; None: those of the vectors themselves."""

    encoding: EncodingFormat = "float"
    dtype: OutputDtype = "float"
    calibration: Calibration | None = None


FLOATS = Form()


async def encode_answer(embeddings: Embeddings, model_id: str, form: Form) -> bytes:
    """The JSON body of `POST /v1/embeddings`.

    Raises:
        InvalidValue: the calibration is of another width.
    """
    if embeddings.array().size <= _INLINE_COMPONENTS[form.encoding]:
        return _encode(embeddings, model_id, form)
    return await asyncio.to_thread(_encode, embeddings, model_id, form)


def _encode(embeddings: Embeddings, model_id: str, form: Form) -> bytes:
    matrix = quantize(embeddings.array(), form.dtype, form.calibration)
    tokens = sum(embeddings.token_counts)
    tail = msgspec.json.encode({"model": model_id, "usage": Usage(prompt_tokens=tokens, total_tokens=tokens)})
    parts = [b'{"object":"list","data":[']
    for piece in _numbers(matrix) if form.encoding == "float" else _base64(matrix):
        parts += piece[1:-1], b","
    parts[-1] = b"],"
    return b"".join([*parts, tail[1:]])


async def encode_rows(embeddings: Embeddings, form: Form = FLOATS) -> bytes:
    """The vectors as a JSON array: of arrays of numbers, or of base64 strings.

    Raises:
        InvalidValue: the calibration is of another width.
    """
    if embeddings.array().size <= _INLINE_COMPONENTS[form.encoding]:
        return _encode_rows(embeddings, form)
    return await asyncio.to_thread(_encode_rows, embeddings, form)


def _encode_rows(embeddings: Embeddings, form: Form) -> bytes:
    matrix = quantize(embeddings.array(), form.dtype, form.calibration)
    pieces = (matrix[piece.start : piece.stop] for piece in _pieces(matrix))
    if form.encoding == "float":
        parts = [orjson.dumps(piece, option=orjson.OPT_SERIALIZE_NUMPY)[1:-1] for piece in pieces]
    else:
        parts = [msgspec.json.encode([row.tobytes() for row in piece])[1:-1] for piece in pieces]
    return b"[" + b",".join(parts) + b"]"


def _pieces(matrix: Matrix) -> Iterator[range]:
    rows = max(1, _PIECE_COMPONENTS // matrix.shape[1])
    for start in range(0, len(matrix), rows):
        yield range(start, min(start + rows, len(matrix)))


def _numbers(matrix: Matrix) -> Iterator[bytes]:
    """orjson prints the shortest number that reads back as the same float32."""
    for piece in _pieces(matrix):
        items = [{"object": "embedding", "index": index, "embedding": matrix[index]} for index in piece]
        yield orjson.dumps(items, option=orjson.OPT_SERIALIZE_NUMPY)


def _base64(matrix: Matrix) -> Iterator[bytes]:
    """msgspec writes bytes as base64; a row's bytes are little-endian, as the record has them."""
    raw = np.ascontiguousarray(matrix).data.cast("B")
    width_bytes = matrix.shape[1] * matrix.itemsize
    for piece in _pieces(matrix):
        rows = ((index, raw[index * width_bytes : (index + 1) * width_bytes]) for index in piece)
        items = [{"object": "embedding", "index": index, "embedding": row} for index, row in rows]
        yield msgspec.json.encode(items)
