"""Vectors → the bytes of an answer: numbers or base64, float32 or quantised. Knows no engine and no request.

Bodies are written in pieces of a bounded size, a large one on a thread: JSON encoders hold the GIL for a whole call,
so one call for megabytes would stop the event loop from any thread.
"""

import asyncio
from collections.abc import Iterable, Iterator
from typing import Literal, TypeGuard

import msgspec
import numpy as np
import orjson
from msgspec import Struct
from numpy.typing import NDArray

from engines.errors import InvalidValue
from engines.spec import Calibration, ModelSpec
from engines.types import Embeddings
from router.schemas.inference import EncodingFormat, OutputDtype, Usage

Matrix = NDArray[np.float32] | NDArray[np.int8] | NDArray[np.uint8]


Scalar = Literal["int8", "uint8"]


def is_scalar(dtype: str | None) -> TypeGuard[Scalar]:
    """Whether codes of this kind divide a range."""
    return dtype in ("int8", "uint8")


def check_ranges(spec: ModelSpec, dtypes: Iterable[str | None], num_items: int, normalize: bool | None) -> None:
    """Before any work is done: will there be ranges for what is asked?

    Raises:
        InvalidValue: a single vector of a model without calibration, or vectors of another length than it was made of.
    """
    scalar = next(filter(is_scalar, dtypes), None)
    if scalar is None:
        return
    if spec.calibration is None and num_items < 2:
        raise InvalidValue(
            f"{scalar} takes its ranges from the vectors of the request: 1 input was sent, at least 2 are needed. Send "
            "more, ask for binary or ubinary, or have `calibration` set for this model in the registry",
            param="output_dtype",
        )
    if spec.calibration is not None and normalize not in (None, spec.normalize):
        raise InvalidValue(
            f"{scalar} takes its ranges from this model's calibration, which is of vectors with normalize "
            f"{str(spec.normalize).lower()}: leave normalize out, or ask for float",
            param="output_dtype",
        )


def quantize(vectors: NDArray[np.float32], dtype: OutputDtype, calibration: Calibration | None = None) -> Matrix:
    """The codes of `vectors`, `[n, width]`.

    int8, uint8: each component's range is cut into 256 steps; what lies outside gets the code of the nearest end.
    binary, ubinary: one bit a component (is it positive), eight to a byte, the last byte filled with zeros:
    `[n, ceil(width / 8)]`.

    Raises:
        InvalidValue: the calibration is of another width.
    """
    if dtype == "float":
        return vectors
    if dtype in ("binary", "ubinary"):
        bits = np.packbits(vectors > 0, axis=-1)
        signed: NDArray[np.int8] = np.bitwise_xor(bits, 0x80).view(np.int8)
        return bits if dtype == "ubinary" else signed
    starts, ends = (vectors.min(axis=0), vectors.max(axis=0)) if calibration is None else _ranges(calibration, vectors)
    steps = (ends - starts) / 255
    steps[steps == 0] = 1
    codes: NDArray[np.float32] = np.clip(np.floor((vectors - starts) / steps), 0, 255)
    return codes.astype(np.uint8) if dtype == "uint8" else (codes - 128).astype(np.int8)


def _ranges(calibration: Calibration, vectors: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Float32 `[width]` each."""
    width = vectors.shape[1]
    if not calibration.covers(width):
        known = max(len(calibration.lowest), len(calibration.highest))
        raise InvalidValue(
            f"this model is calibrated for vectors of {known} components, and these have {width}: leave dimensions "
            "out, or ask for float, binary or ubinary",
            param="output_dtype",
        )
    starts, ends = (
        np.broadcast_to(np.array(side, np.float32), width) for side in (calibration.lowest, calibration.highest)
    )
    return starts, ends


_PIECE_COMPONENTS = 2**15
"""One encoder call: about 1.2 ms as numbers, 0.2 ms as base64."""


_INLINE_COMPONENTS: dict[EncodingFormat, int] = {"float": 2**15, "base64": 2**18}
"""Above this a body is encoded on a thread. Here the loop stands still for 1 to 2 ms; handing over costs 0.3 ms, and
2,048 × 1,024 numbers would stop it for 140 ms."""


class OutputFormat(Struct, frozen=True, kw_only=True):
    """How vectors are written. `calibration`: the ranges of int8 and uint8; None: those of the vectors themselves."""

    encoding: EncodingFormat = "float"
    dtype: OutputDtype = "float"
    calibration: Calibration | None = None


FLOATS = OutputFormat()


async def encode_answer(embeddings: Embeddings, model_id: str, form: OutputFormat) -> bytes:
    """The JSON body of `POST /v1/embeddings`.

    Raises:
        InvalidValue: the calibration is of another width.
    """
    if embeddings.array().size <= _INLINE_COMPONENTS[form.encoding]:
        return _encode(embeddings, model_id, form)
    return await asyncio.to_thread(_encode, embeddings, model_id, form)


def _encode(embeddings: Embeddings, model_id: str, form: OutputFormat) -> bytes:
    matrix = quantize(embeddings.array(), form.dtype, form.calibration)
    tokens = sum(embeddings.token_counts)
    tail = msgspec.json.encode({"model": model_id, "usage": Usage(prompt_tokens=tokens, total_tokens=tokens)})
    parts = [b'{"object":"list","data":[']
    for piece in _numbers(matrix) if form.encoding == "float" else _base64(matrix):
        parts += piece[1:-1], b","
    parts[-1] = b"],"
    return b"".join([*parts, tail[1:]])


async def encode_rows(embeddings: Embeddings, form: OutputFormat = FLOATS) -> bytes:
    """The vectors as a JSON array: of arrays of numbers, or of base64 strings.

    Raises:
        InvalidValue: the calibration is of another width.
    """
    if embeddings.array().size <= _INLINE_COMPONENTS[form.encoding]:
        return _encode_rows(embeddings, form)
    return await asyncio.to_thread(_encode_rows, embeddings, form)


def _encode_rows(embeddings: Embeddings, form: OutputFormat) -> bytes:
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
