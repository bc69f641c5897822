"""Encodes several outputs of each text as the bodies of `/v1/embeddings`, `/embed_sparse` and `/embed_all`.

Large answers are encoded on a thread, in pieces of bounded size, as in `router/api/encoding.py`: one text may have
8,192 vectors of 1,024 numbers. They are sent as they are encoded: 256 MiB of vectors are 600 MB of JSON, and encoding
them before the first byte was sent took 1.7 GB a request.
"""

import asyncio
import binascii
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Any, cast

import msgspec
import numpy as np
import orjson
from litestar.response.base import ASGIResponse
from litestar.types import Receive, Scope, Send
from numpy.typing import NDArray

from engines.errors import InvalidValue
from engines.spec import Calibration
from engines.types import Outputs
from router.api.encoding import EncodedAnswer, OutputFormat, is_scalar
from router.quantization import Matrix, quantize
from router.schemas.inference import OutputDtype, Usage

_INLINE_NUMBERS = 2**14
"""Answers with more numbers are encoded on a thread; 0.6 ms on the event loop for so many."""
_NUMBERS_OF_ITEM = 64
"""An item takes as long as so many numbers, whatever it holds."""
_PIECE_NUMBERS = 2**15
_PIECE_BYTES = 3 * 2**18
"""The same bounds as in `router/api/encoding.py`; base64 of multiples of three bytes can be joined."""

_CHUNK_BYTES = 2**20
"""Of a large answer: encoded at once on a thread, in 12 ms, and held until the client has read it."""

UNIT_RANGE = Calibration(lowest=(-1.0,), highest=(1.0,))
"""The range of int8 and uint8 vectors of tokens, which have length 1: so vectors of all requests can be compared."""
_MAX_COMPONENT = 1.001
"""The largest component of a vector of length 1, with the rounding of reduced precision."""

Ragged = list[Any]
"""One array for each text, of as many rows as it has terms or tokens."""


class StreamedAnswer(ASGIResponse):
    """A JSON body that is encoded while it is sent, with its headers, status 200.

    Args:
        chunks: the body, not empty.
        headers: names in lower case.
    """

    def __init__(self, chunks: AsyncIterator[bytes], headers: dict[str, str]) -> None:
        self._chunks = chunks
        self._fields = headers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response; each chunk is encoded when the client has read those before it, and none once it left."""
        fields = [(name.encode("latin-1"), text.encode("latin-1")) for name, text in self._fields.items()]
        own = [(b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": 200, "headers": [*fields, *own]})
        leaving = asyncio.ensure_future(cast(Awaitable[Any], receive()))  # the request has been read
        try:
            async for chunk in self._chunks:
                if leaving.done():
                    return
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
        finally:
            leaving.cancel()
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def encode_outputs(
    result: Outputs, model_id: str, output: OutputFormat, headers: dict[str, str], *, has_names: bool = False
) -> ASGIResponse:
    """Encode the JSON body of `POST /v1/embeddings` with `outputs`. `has_names`: the terms have their tokens.

    Raises:
        InvalidValue: the calibration has another width, or int8 and uint8 do not cover the vectors of tokens.
    """
    return await _respond(result, headers, lambda: _answer(result, model_id, output, has_names))


async def encode_terms(result: Outputs, headers: dict[str, str]) -> ASGIResponse:
    """Encode TEI's answer to `/embed_sparse`: for each text a list of `{index, value}`."""

    def encode() -> Iterator[bytes]:
        opening = b"["
        for pair in zip(*_split_terms(result), strict=True):
            row = [{"index": index, "value": value} for index, value in zip(*pair, strict=True)]
            yield opening + orjson.dumps(row, option=orjson.OPT_SERIALIZE_NUMPY)
            opening = b","
        yield b"]"

    return await _respond(result, headers, encode)


async def encode_token_vectors(result: Outputs, headers: dict[str, str]) -> ASGIResponse:
    """Encode TEI's answer to `/embed_all`: for each text a vector for each token."""

    def encode() -> Iterator[bytes]:
        opening = b"["
        for vectors in _split(result.vectors(), result.num_vectors):
            yield opening
            yield from _numbers(vectors)
            opening = b","
        yield b"]"

    return await _respond(result, headers, encode)


async def _respond(result: Outputs, headers: dict[str, str], encode: Callable[[], Iterator[bytes]]) -> ASGIResponse:
    """Return a response whose body has been encoded, or of a large one the first chunk, so that errors are raised."""
    size = len(result.body) // 4 + _NUMBERS_OF_ITEM * len(result.token_counts)
    if size <= _INLINE_NUMBERS:
        return EncodedAnswer(b"".join(encode()), headers)
    chunks = _joined(encode())
    first = await asyncio.to_thread(next, chunks)
    return StreamedAnswer(_later(first, chunks), headers)


async def _later(first: bytes, others: Iterator[bytes]) -> AsyncIterator[bytes]:
    chunk: bytes | None = first
    while chunk is not None:
        yield chunk
        chunk = await asyncio.to_thread(next, others, None)


def _joined(parts: Iterator[bytes]) -> Iterator[bytes]:
    """Join parts to chunks of at least `_CHUNK_BYTES`, but the last."""
    held: list[bytes] = []
    size = 0
    for part in parts:
        held.append(part)
        size += len(part)
        if size >= _CHUNK_BYTES:
            yield b"".join(held)
            held, size = [], 0
    yield b"".join(held)


def _answer(result: Outputs, model_id: str, output: OutputFormat, has_names: bool) -> Iterator[bytes]:
    """Yield the parts of the body."""
    tokens = sum(result.token_counts)
    fields = [
        field for field in (_dense(result, output), _sparse(result, has_names), _vectors(result, output)) if field
    ]
    opening = b'{"object":"list","data":['
    for index, values in enumerate(zip(*fields, strict=True)):
        yield opening + b'{"object":"embedding","index":%d' % index
        for parts in values:
            yield from parts
        opening = b"},"
    tail = msgspec.json.encode({"model": model_id, "usage": Usage(prompt_tokens=tokens, total_tokens=tokens)})
    yield b"}]," + tail[1:]


Field = Iterator[Iterator[bytes]] | None
"""The parts of one field of each text; None if the answer does not have the field."""


def _dense(result: Outputs, output: OutputFormat) -> Field:
    if not result.dimensions:
        return None
    matrix = quantize(result.array(), output.dtype, output.calibration)
    encode = _numbers if output.encoding == "float" else _base64
    return (_named(b"embedding", encode(row)) for row in matrix)


def _sparse(result: Outputs, has_names: bool) -> Field:
    if not result.num_terms:
        return None
    names = result.term_names if has_names else None
    return (_sparse_parts(*terms, names) for terms in zip(*_split_terms(result), strict=True))


def _sparse_parts(
    entries: NDArray[np.int32], weights: NDArray[np.float32], names: dict[int, str] | None
) -> Iterator[bytes]:
    yield b',"sparse_embedding":{"indices":'
    yield from _numbers(entries)
    yield b',"values":'
    yield from _numbers(weights)
    if names is not None:
        yield b',"tokens":' + msgspec.json.encode([names[entry] for entry in entries.tolist()])
    yield b"}"


def _vectors(result: Outputs, output: OutputFormat) -> Field:
    if not result.num_vectors:
        return None
    matrix = quantize_token_vectors(result.vectors(), output.dtype)
    rows = _split(matrix, result.num_vectors)
    encode = _numbers if output.encoding == "float" else _encoded_vectors
    return (_named(b"multi_vector_embedding", encode(vectors)) for vectors in rows)


def quantize_token_vectors(vectors: NDArray[np.float32], dtype: OutputDtype) -> Matrix:
    """Quantize the vectors of tokens, `[n, width]`, as `quantize` does; int8 and uint8 divide the range from -1 to 1.

    Raises:
        InvalidValue: a component lies outside that range, as the vectors do not have length 1.
    """
    if is_scalar(dtype) and vectors.size:
        largest = float(np.abs(vectors).max())
        if largest > _MAX_COMPONENT:
            raise InvalidValue(
                f"{dtype} covers vectors of tokens of length 1, and one has a component of {largest:.3g}: use float, "
                "binary or ubinary, or omit normalize",
                param="output_dtype",
            )
    return quantize(vectors, dtype, UNIT_RANGE)


def _encoded_vectors(vectors: Matrix) -> Iterator[bytes]:
    yield b'{"shape":[%d,%d],"data":' % vectors.shape
    yield from _base64(vectors)
    yield b"}"


def _named(name: bytes, parts: Iterator[bytes]) -> Iterator[bytes]:
    yield b',"' + name + b'":'
    yield from parts


def _numbers(array: Matrix | NDArray[np.int32]) -> Iterator[bytes]:
    """Encode an array, of one dimension or of two; orjson writes the shortest decimal that reads back as float32."""
    rows = max(1, _PIECE_NUMBERS // (array.shape[1] or 1)) if array.ndim == 2 else _PIECE_NUMBERS
    opening = b"["
    for start in range(0, len(array), rows):
        piece = np.ascontiguousarray(array[start : start + rows])
        yield opening + orjson.dumps(piece, option=orjson.OPT_SERIALIZE_NUMPY)[1:-1]
        opening = b","
    yield b"]" if len(array) else b"[]"


def _base64(array: Matrix) -> Iterator[bytes]:
    """Encode the little-endian bytes of an array as a JSON string."""
    raw = np.ascontiguousarray(array).data.cast("B") if array.size else memoryview(b"")
    yield b'"'
    for start in range(0, len(raw), _PIECE_BYTES):
        yield binascii.b2a_base64(raw[start : start + _PIECE_BYTES], newline=False)
    yield b'"'


def _split_terms(result: Outputs) -> tuple[Ragged, Ragged]:
    """Split the entries and the weights of all texts by text."""
    entries, weights = result.terms()
    return _split(entries, result.num_terms), _split(weights, result.num_terms)


def _split(rows: NDArray[Any], counts: Sequence[int]) -> Ragged:
    return [rows[start:stop] for start, stop in pairwise(accumulate(counts, initial=0))]
