"""Vectors → the bytes of an answer: numbers or base64, float32 or quantised. Knows no engine and no request.

Bodies are written in pieces of a bounded size, a large one on a thread: JSON encoders hold the GIL for a whole call,
so one call for megabytes would stop the event loop from any thread.
"""

import asyncio
from collections.abc import Iterator

import msgspec
import numpy as np
import orjson
from numpy.typing import NDArray

from engines.errors import InvalidValue
from engines.records import Embeddings
from router.schema import EncodingFormat, OutputDtype, Usage

Matrix = NDArray[np.float32] | NDArray[np.int8] | NDArray[np.uint8]

_PIECE_COMPONENTS = 2**15
"""One encoder call: about 1.2 ms as numbers, 0.2 ms as base64."""
_INLINE_COMPONENTS: dict[EncodingFormat, int] = {"float": 2**15, "base64": 2**18}
"""Above this a body is encoded on a thread. Here the loop stands still for 1 to 2 ms; handing over costs 0.3 ms, and
2,048 × 1,024 numbers would stop it for 140 ms."""


async def encode_answer(embeddings: Embeddings, model_id: str, encoding: EncodingFormat, dtype: OutputDtype) -> bytes:
    """The JSON body of `POST /v1/embeddings`.

    Raises:
        InvalidValue: int8 or uint8 for a single vector.
    """
    matrix = embeddings.array()
    if matrix.size <= _INLINE_COMPONENTS[encoding]:
        return _encode(embeddings, model_id, encoding, dtype)
    return await asyncio.to_thread(_encode, embeddings, model_id, encoding, dtype)


def _encode(embeddings: Embeddings, model_id: str, encoding: EncodingFormat, dtype: OutputDtype) -> bytes:
    matrix = quantize(embeddings.array(), dtype)
    tokens = sum(embeddings.token_counts)
    tail = msgspec.json.encode({"model": model_id, "usage": Usage(prompt_tokens=tokens, total_tokens=tokens)})
    parts = [b'{"object":"list","data":[']
    for piece in _numbers(matrix) if encoding == "float" else _base64(matrix):
        parts += piece[1:-1], b","
    parts[-1] = b"],"
    return b"".join([*parts, tail[1:]])


async def encode_rows(
    embeddings: Embeddings, dtype: OutputDtype = "float", encoding: EncodingFormat = "float"
) -> bytes:
    """The vectors as a JSON array: of arrays of numbers, or of base64 strings.

    Raises:
        InvalidValue: int8 or uint8 for a single vector.
    """
    if embeddings.array().size <= _INLINE_COMPONENTS[encoding]:
        return _encode_rows(embeddings, dtype, encoding)
    return await asyncio.to_thread(_encode_rows, embeddings, dtype, encoding)


def _encode_rows(embeddings: Embeddings, dtype: OutputDtype, encoding: EncodingFormat) -> bytes:
    matrix = quantize(embeddings.array(), dtype)
    pieces = (matrix[piece.start : piece.stop] for piece in _pieces(matrix))
    if encoding == "float":
        parts = [orjson.dumps(piece, option=orjson.OPT_SERIALIZE_NUMPY)[1:-1] for piece in pieces]
    else:
        parts = [msgspec.json.encode([row.tobytes() for row in piece])[1:-1] for piece in pieces]
    return b"[" + b",".join(parts) + b"]"


def quantize(vectors: NDArray[np.float32], dtype: OutputDtype) -> Matrix:
    """`vectors`, `[n, width]`, as sentence-transformers' `quantize_embeddings` has it, with the batch's own ranges.

    int8, uint8: each component's range over the batch is cut into 256 steps. binary, ubinary: one bit a component
    (is it positive), eight to a byte, the last byte filled with zeros: `[n, ceil(width / 8)]`.

    Raises:
        InvalidValue: int8 or uint8 for a single vector, whose ranges would be points.
    """
    if dtype == "float":
        return vectors
    if dtype in ("binary", "ubinary"):
        bits = np.packbits(vectors > 0, axis=-1)
        signed: NDArray[np.int8] = np.bitwise_xor(bits, 0x80).view(np.int8)
        return bits if dtype == "ubinary" else signed
    if len(vectors) < 2:
        raise InvalidValue(
            f"output_dtype {dtype} takes its ranges from the vectors of the request: 1 input was sent, at least 2 are "
            "needed; ask for binary or ubinary, or quantise float vectors with ranges of your own",
            param="output_dtype",
        )
    starts = vectors.min(axis=0)
    steps = (vectors.max(axis=0) - starts) / 255
    steps[steps == 0] = 1
    codes: NDArray[np.float32] = np.clip(np.floor((vectors - starts) / steps), 0, 255)
    return codes.astype(np.uint8) if dtype == "uint8" else (codes - 128).astype(np.int8)


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
