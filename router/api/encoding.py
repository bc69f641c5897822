"""Encodes vectors as response bodies: JSON numbers or base64, float32 or quantized.

Bodies are encoded in pieces of bounded size, large ones on a thread: a JSON encoder holds the GIL during a call, so one
call for megabytes would block the event loop even from a thread.
"""

import asyncio
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, TypeGuard

import msgspec
import numpy as np
import orjson
from litestar.response.base import ASGIResponse
from litestar.types import Receive, Scope, Send
from msgspec import Struct
from numpy.typing import NDArray

from engines.errors import InvalidValue
from engines.spec import Calibration, ModelSpec
from engines.types import Embeddings
from router.quantization import Matrix, quantize
from router.schemas.inference import EncodingFormat, OutputDtype, Usage


class EncodedAnswer(ASGIResponse):
    """An encoded JSON body with its headers, status 200.

    Sent as it is: `ASGIResponse` writes its headers through a dictionary of folded names and has hooks between the
    parts, which took 5 % of the event loop's time for a short answer.

    Args:
        body: JSON.
        headers: names in lower case.
    """

    def __init__(self, body: bytes, headers: dict[str, str]) -> None:
        self.body = body
        self._fields = headers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response."""
        fields = []
        for name, text in self._fields.items():  # a loop: a comprehension is a call
            fields.append((name.encode("latin-1"), text.encode("latin-1")))
        fields += (b"content-type", b"application/json"), (b"content-length", b"%d" % len(self.body))
        await send({"type": "http.response.start", "status": 200, "headers": fields})
        await send({"type": "http.response.body", "body": self.body, "more_body": False})


Scalar = Literal["int8", "uint8"]


def is_scalar(dtype: str | None) -> TypeGuard[Scalar]:
    """Whether the dtype quantizes a range of values, and so needs one."""
    return dtype in ("int8", "uint8")


def check_ranges(spec: ModelSpec, dtypes: Iterable[str | None], num_items: int, normalize: bool | None) -> None:
    """Check before any work is done that int8 and uint8 will have ranges to quantize.

    Raises:
        InvalidValue: one input to a model without calibration, or a `normalize` that its calibration does not fit.
    """
    scalar = next(filter(is_scalar, dtypes), None)
    if scalar is None:
        return
    if spec.calibration is None and num_items < 2:
        raise InvalidValue(
            f"{scalar} needs at least 2 inputs to compute ranges, got 1: send more, use binary or ubinary, or set "
            "`calibration` for this model in the registry",
            param="output_dtype",
        )
    if spec.calibration is not None and normalize not in (None, spec.normalize):
        raise InvalidValue(
            f"{scalar} uses this model's calibration, which was made with normalize={str(spec.normalize).lower()}: "
            "omit normalize, or use float",
            param="output_dtype",
        )


_PIECE_COMPONENTS = 2**15
"""Components per encoder call: about 1.2 ms as numbers, 0.2 ms as base64."""

_INLINE_COMPONENTS: dict[EncodingFormat, int] = {"float": 2**15, "base64": 2**18}
"""Larger bodies are encoded on a thread. This size blocks the event loop for 1 to 2 ms, a thread costs 0.3 ms, and
2,048 × 1,024 numbers would block it for 140 ms."""


class OutputFormat(Struct, frozen=True, kw_only=True):
    """The encoding and dtype of vectors. `calibration`: the ranges of int8 and uint8; None: ranges of the vectors."""

    encoding: EncodingFormat = "float"
    dtype: OutputDtype = "float"
    calibration: Calibration | None = None


FLOATS = OutputFormat()


async def encode_answer(embeddings: Embeddings, model_id: str, output: OutputFormat) -> bytes:
    """Encode the JSON body of `POST /v1/embeddings`.

    Raises:
        InvalidValue: the calibration has another width.
    """
    vectors = embeddings.array()
    if vectors.size <= _INLINE_COMPONENTS[output.encoding]:
        return _encode(vectors, embeddings, model_id, output)
    return await asyncio.to_thread(_encode, vectors, embeddings, model_id, output)


def _encode(vectors: NDArray[np.float32], embeddings: Embeddings, model_id: str, output: OutputFormat) -> bytes:
    matrix = vectors if output.dtype == "float" else quantize(vectors, output.dtype, output.calibration)
    tokens = sum(embeddings.token_counts)
    tail = msgspec.json.encode({"model": model_id, "usage": Usage(prompt_tokens=tokens, total_tokens=tokens)})
    parts = [b'{"object":"list","data":[']
    for piece in _encode_numbers(matrix) if output.encoding == "float" else _encode_base64(matrix):
        parts += piece[1:-1], b","
    parts[-1] = b"],"
    return b"".join([*parts, tail[1:]])


async def encode_documents(embeddings: Embeddings, pieces: Sequence[int], model_id: str, output: OutputFormat) -> bytes:
    """Encode the JSON body of `POST /v1/contextualizedembeddings`: the vectors in one list for each document.

    Args:
        pieces: how many of the vectors each document has.

    Raises:
        InvalidValue: the calibration has another width.
    """
    if embeddings.array().size <= _INLINE_COMPONENTS[output.encoding]:
        return _encode_documents(embeddings, pieces, model_id, output)
    return await asyncio.to_thread(_encode_documents, embeddings, pieces, model_id, output)


def _encode_documents(embeddings: Embeddings, pieces: Sequence[int], model_id: str, output: OutputFormat) -> bytes:
    matrix = quantize(embeddings.array(), output.dtype, output.calibration)
    encode = _encode_numbers if output.encoding == "float" else _encode_base64
    parts, start = [b'{"object":"list","data":['], 0
    for index, count in enumerate(pieces):
        rows = b",".join(part[1:-1] for part in encode(matrix[start : start + count]))
        parts += b'{"object":"list","data":[', rows, b'],"index":%d}' % index, b","
        start += count
    tail = {"model": model_id, "usage": {"total_tokens": sum(embeddings.token_counts)}}
    parts[-1] = b"]," + msgspec.json.encode(tail)[1:]
    return b"".join(parts)


async def encode_rows(embeddings: Embeddings, output: OutputFormat = FLOATS) -> bytes:
    """Encode the vectors as a JSON array: of arrays of numbers, or of base64 strings.

    Raises:
        InvalidValue: the calibration has another width.
    """
    if embeddings.array().size <= _INLINE_COMPONENTS[output.encoding]:
        return _encode_rows(embeddings, output)
    return await asyncio.to_thread(_encode_rows, embeddings, output)


def _encode_rows(embeddings: Embeddings, output: OutputFormat) -> bytes:
    matrix = quantize(embeddings.array(), output.dtype, output.calibration)
    pieces = (matrix[piece.start : piece.stop] for piece in _split_rows(matrix))
    if output.encoding == "float":
        parts = [orjson.dumps(piece, option=orjson.OPT_SERIALIZE_NUMPY)[1:-1] for piece in pieces]
    else:
        parts = [msgspec.json.encode([row.tobytes() for row in piece])[1:-1] for piece in pieces]
    return b"[" + b",".join(parts) + b"]"


def _split_rows(matrix: Matrix) -> Iterator[range]:
    rows = max(1, _PIECE_COMPONENTS // matrix.shape[1])
    for start in range(0, len(matrix), rows):
        yield range(start, min(start + rows, len(matrix)))


def _encode_numbers(matrix: Matrix) -> Iterator[bytes]:
    """Encode rows as numbers; orjson writes the shortest decimal that reads back as the same float32."""
    for piece in _split_rows(matrix):
        items = [{"object": "embedding", "index": index, "embedding": matrix[index]} for index in piece]
        yield orjson.dumps(items, option=orjson.OPT_SERIALIZE_NUMPY)


def _encode_base64(matrix: Matrix) -> Iterator[bytes]:
    """Encode rows as base64 of their little-endian bytes, which is how msgspec writes bytes."""
    raw = np.ascontiguousarray(matrix).data.cast("B")
    width_bytes = matrix.shape[1] * matrix.itemsize
    for piece in _split_rows(matrix):
        rows = ((index, raw[index * width_bytes : (index + 1) * width_bytes]) for index in piece)
        items = [{"object": "embedding", "index": index, "embedding": row} for index, row in rows]
        yield msgspec.json.encode(items)
