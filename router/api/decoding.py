"""Decodes request bodies into Structs and `EmbedCall`. Strict: `"256"` is not 256, and inputs are of one kind.

Everything that needs no model is checked here, so that an invalid request never loads one. The engine checks widths,
prompts and token ids.
"""

import asyncio
import math
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from typing import Any, get_args, get_origin

import msgspec
from litestar import Request
from litestar.exceptions.http_exceptions import RequestEntityTooLarge
from litestar.types import Empty
from msgspec import Struct, structs

from engines.errors import InvalidRequest, InvalidTokenId, InvalidValue
from engines.types import EmbedCall
from router.api.decode_errors import explain_invalid_json, explain_invalid_value
from router.config.quantities import parse_keep_alive_s
from router.errors import ClientLeft, EmptyInput, InvalidJson, TooManyInputs
from router.schemas.compat import CohereRequest, CohereV1Request, InfinityRequest, TeiRequest, TeiTokenizeRequest
from router.schemas.inference import (
    MAX_IDS,
    MAX_IDS_OF_TEXT,
    MAX_INPUTS,
    EmbeddingRequest,
    Input,
    KeepAlive,
)
from router.schemas.ollama import OllamaRequest
from router.schemas.outputs import TeiOutputsRequest
from router.schemas.scoring import (
    ClassifyRequest,
    EitherRerankRequest,
    PredictRequest,
    RerankRequest,
    ScoreRequest,
)

_REMEDY = "send texts instead; with LangChain, set check_embedding_ctx_length=False"


async def decode_token_ids(encoding_name: str, rows: Sequence[Sequence[int]]) -> tuple[str, ...]:
    """Decode each row of token ids to text. Runs on a thread, because the first use of an encoding reads megabytes.

    Raises:
        InvalidTokenId: an id is not in this encoding, or the encoding is not available on this server.
    """
    return await asyncio.to_thread(_decode, encoding_name, rows)


def _decode(encoding_name: str, rows: Sequence[Sequence[int]]) -> tuple[str, ...]:
    encoding = _encoding(encoding_name)
    return tuple(_decode_row(encoding, encoding_name, index, row) for index, row in enumerate(rows))


def _encoding(name: str) -> Any:
    try:
        import tiktoken  # imported late: it is optional
    except ImportError:
        raise InvalidTokenId(
            f"Token ids are not supported here: tiktoken is not installed; {_REMEDY}",
            param="input",
        ) from None
    try:
        return tiktoken.get_encoding(name)
    except (OSError, ValueError):  # no network and no cached file, or a corrupt file
        raise InvalidTokenId(
            f"Token ids are not supported here: the file of the encoding {name} could not be downloaded; {_REMEDY}",
            param="input",
        ) from None


def _decode_row(encoding: Any, name: str, index: int, row: Sequence[int]) -> str:
    try:
        text: str = encoding.decode(row)
    except (KeyError, OverflowError):
        raise InvalidTokenId(
            f"input[{index}] contains a token id that is not in the encoding {name}; {_REMEDY}", param="input"
        ) from None
    return text


Items = tuple[tuple[str, ...], tuple[tuple[int, ...], ...]]
"""Texts, and rows of token ids; one of the two is empty."""

INLINE_BYTES = 2**16
"""Larger bodies are decoded on a thread. On the event loop this size takes at most 1.4 ms; a thread costs 0.1 ms."""

_PARALLEL_BYTES = 2**20
"""Larger bodies are decoded one at a time on one thread of their own: each holds the GIL for up to a second, so two at
once would be no faster and take twice the memory."""

_ITEMS_FIELDS: dict[Any, tuple[str, ...]] = {
    EmbeddingRequest: ("input",), TeiRequest: ("inputs",), TeiTokenizeRequest: ("inputs",), OllamaRequest: ("input",),
    CohereRequest: ("texts", "inputs"), CohereV1Request: ("texts", "inputs"), InfinityRequest: ("input",),
    RerankRequest: ("documents",), EitherRerankRequest: ("documents", "texts"), PredictRequest: ("inputs",),
    ScoreRequest: ("text_1", "text_2"), ClassifyRequest: ("input",), TeiOutputsRequest: ("inputs",),
}  # fmt: skip
"""The fields of each request that hold its texts or token ids."""

_IDS_BEGIN = re.compile(rb"\[[ \t\r\n]*[-0-9]")
_ARRAY = ord("[")
_WHOLE = -1
"""As `truncate_prompt_tokens`: all tokens that the model reads."""

_executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="decode")


class StrictRequest(Request[Any, Any, Any]):
    """Decodes a JSON body directly into the Struct that the handler declares as `data`.

    Litestar's own decoding parses twice, and accepts `"256"` for 256.
    """

    async def json(self) -> Any:
        body = await self.body()
        # Requests are in reference cycles, so their bodies would stay until the next garbage collection: ten of 58 MiB,
        # one after the other, took 580 MiB.
        self._body = self._connection_state.body = b""
        wanted = self.route_handler.parsed_data_field.annotation  # type: ignore[union-attr]  # only called for handlers that declare data
        if len(body) <= INLINE_BYTES:
            return decode_body(body, wanted)
        return await decode_large_body(body, wanted)

    async def body(self) -> bytes:
        """Return the body; as Litestar does, but without an asynchronous generator, which takes 16 calls more.

        Raises:
            RequestEntityTooLarge: announced or received, it is larger than the route allows.
            ClientLeft: the client disconnected before the end.
            InvalidJson: there is none.
        """
        if self._body is Empty:
            self._body = self._connection_state.body = await self._receive_body()
        body = self._body
        if not body and self.route_handler.parsed_data_field.is_required:  # type: ignore[union-attr]  # as above
            raise InvalidJson("Empty request body: send a JSON object")
        return body

    async def _receive_body(self) -> bytes:
        max_bytes = self.route_handler.resolve_request_max_body_size() or math.inf
        for name, value in self.scope["headers"]:
            if name == b"content-length" and value.isdigit() and int(value) > max_bytes:
                raise RequestEntityTooLarge
        chunks, num_bytes = [], 0
        while True:
            event: Any = await self.receive()
            if event["type"] == "http.disconnect":
                raise ClientLeft
            chunk = event["body"]
            chunks.append(chunk)
            num_bytes += len(chunk)
            if num_bytes > max_bytes:
                raise RequestEntityTooLarge
            if not event.get("more_body", False):
                return chunk if len(chunks) == 1 else b"".join(chunks)


async def decode_large_body(body: bytes, wanted: Any) -> Any:
    """Decode a body as `decode_body` does, on a thread."""
    executor = None if len(body) <= _PARALLEL_BYTES else _executor
    return await asyncio.get_running_loop().run_in_executor(executor, decode_body, body, wanted)


def decode_body(body: bytes, wanted: Any) -> Any:
    """Decode a body into the Struct `wanted`.

    Raises:
        InvalidJson, InvalidValue, InvalidTokenId; for a large body also TooManyInputs.
    """
    try:
        if wanted is PredictRequest or (len(body) > INLINE_BYTES and wanted in _ITEMS_FIELDS):
            # msgspec does not say which pair is too long
            return _decode_in_stages(body, wanted)
        return _decoder(wanted).decode(body)
    except _UNDECODABLE as error:
        raise _explained(error, body, wanted=wanted) from None


_UNDECODABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


@contextmanager
def _translate_errors(content: Any, place: str) -> Iterator[None]:
    """Raise msgspec's errors inside the block as errors of the API; see `_explained`."""
    try:
        yield
    except _UNDECODABLE as error:
        raise _explained(error, content, place) from None


def _explained(error: Exception, content: Any, place: str = "", wanted: Any = None) -> InvalidRequest:
    """Return an error of msgspec as an error of the API.

    Args:
        content: what is being decoded.
        place: its path in the body.
        wanted: its type, if it is the whole body.
    """
    if isinstance(error, msgspec.ValidationError):
        return explain_invalid_value(error, place, wanted, content)
    if isinstance(error, msgspec.DecodeError):
        return InvalidJson(explain_invalid_json(error, content))
    if isinstance(error, UnicodeDecodeError):
        return InvalidJson("Invalid JSON: the body is not UTF-8")
    return InvalidJson("Invalid JSON: the body is nested too deeply")


@cache
def _decoder(wanted: Any) -> msgspec.json.Decoder[Any]:
    return msgspec.json.Decoder(wanted)


# A large body is decoded in stages, because msgspec holds the GIL during a call, and builds a whole list before it
# checks the length. 58 MiB in one call: `[[1],[1],…]` 8.1 s, `[1,1,…]` 0.7 s. In stages: 0.1 s for one pass that builds
# nothing, then one call per item.


class _Stages(Struct, frozen=True):
    """The decoders of one request type.

    Attributes:
        envelope: decodes the request, with its items left as raw JSON.
        whole: decode a whole field each.
        items: decode one item of a field each.
        allows_ids: whether an item may be token ids.
    """

    envelope: msgspec.json.Decoder[Any]
    whole: dict[str, msgspec.json.Decoder[Any]]
    items: dict[str, msgspec.json.Decoder[Any]]
    allows_ids: bool


@cache
def _stages(wanted: Any) -> _Stages:
    fields = {field.name: field for field in structs.fields(wanted) if field.name in _ITEMS_FIELDS[wanted]}
    raw = [
        (name, msgspec.Raw) if field.required else (name, msgspec.Raw, msgspec.Raw(b"null"))
        for name, field in fields.items()
    ]
    envelope = msgspec.defstruct("Envelope", raw, bases=(wanted,), frozen=True, kw_only=True)
    return _Stages(
        envelope=msgspec.json.Decoder(envelope),
        whole={name: msgspec.json.Decoder(field.type) for name, field in fields.items()},
        items={name: msgspec.json.Decoder(_item_type(field.type)) for name, field in fields.items()},
        allows_ids=wanted in (EmbeddingRequest, InfinityRequest, TeiRequest, TeiOutputsRequest),
    )


def _item_type(annotation: Any) -> Any:
    """Return the type of the items of the list in an annotation; None without a list."""
    args = get_args(annotation)
    return args[0] if get_origin(annotation) is list else next(filter(None, map(_item_type, args)), None)


_first_items = msgspec.json.Decoder(
    msgspec.defstruct(
        "FirstItems",
        [(f"item_{index}", msgspec.Raw, msgspec.UNSET) for index in range(MAX_INPUTS + 1)],
        array_like=True,
        frozen=True,
    )
)
"""Splits an array into its first items as raw JSON; an array-like Struct skips items that it has no field for."""


def _decode_in_stages(body: bytes, wanted: Any) -> Any:
    stages = _stages(wanted)
    envelope = stages.envelope.decode(body)
    items = {field: _decode_items(stages, memoryview(getattr(envelope, field)), field) for field in stages.whole}
    rest = {name: getattr(envelope, name) for name in wanted.__struct_fields__ if name not in items}
    return wanted(**rest, **items)


def _decode_items(stages: _Stages, raw: memoryview, field: str) -> Any:
    with _translate_errors(raw, field):
        if stages.allows_ids and _IDS_BEGIN.match(raw):
            return [_decode_item(stages, raw, field, field)]
        if raw[0] == _ARRAY:
            return _decode_split_input(stages, raw, field)
        return stages.whole[field].decode(raw)


def _decode_split_input(stages: _Stages, raw: memoryview, field: str) -> list[Any]:
    found = [memoryview(item) for item in structs.astuple(_first_items.decode(raw)) if item is not msgspec.UNSET]
    if len(found) > MAX_INPUTS:
        raise TooManyInputs(
            f"{field} has at least {len(found)} items (maximum {MAX_INPUTS} per request); split the request",
            param=field,
        )
    items: list[Any] = []
    num_ids = 0
    for index, item in enumerate(found):
        place = f"{field}[{index}]"
        with _translate_errors(item, place):
            items.append(_decode_item(stages, item, field, place))
        num_ids += len(items[-1]) if isinstance(items[-1], tuple) else 0
        if num_ids > MAX_IDS:
            raise InvalidValue(
                f"{field} has at least {num_ids} token ids (maximum {MAX_IDS} per request); split the request",
                param=field,
            )
    return items


def _decode_item(stages: _Stages, raw: memoryview, field: str, place: str) -> Any:
    """Decode a text or its token ids; ids are counted before the list is built."""
    if stages.allows_ids and len(raw) > 2 * MAX_IDS_OF_TEXT and raw[0] == _ARRAY:
        num_ids = bytes(raw).count(b",") + 1
        if num_ids > MAX_IDS_OF_TEXT:
            raise InvalidValue(
                f"{place} has {num_ids} token ids (maximum {MAX_IDS_OF_TEXT} per text); shorten it", param=field
            )
    return stages.items[field].decode(raw)


def embed_call(request: EmbeddingRequest, model_id: str, *, load_timeout_s: float) -> EmbedCall:
    """Build the engine's call for a request.

    Raises:
        EmptyInput, TooManyInputs, InvalidValue.
    """
    texts, token_ids = _split_input(request.input)
    limit = request.truncate_prompt_tokens
    if request.prompt is not None and (request.input_type is not None or request.instruction is not None):
        raise InvalidValue("prompt cannot be combined with input_type or instruction: send one of them", param="prompt")
    return EmbedCall(
        model_id=model_id,
        texts=texts,
        token_ids=token_ids,
        dimensions=request.dimensions,
        input_type=request.input_type,
        instruction=request.instruction,
        prompt=request.prompt,
        truncate=request.truncate or ("end" if limit is not None else None),
        max_tokens=limit if limit != _WHOLE else None,
        normalize=request.normalize,
        keep_alive_s=None if request.keep_alive is None else keep_alive_s(request.keep_alive),
        load_timeout_s=load_timeout_s,
        expect_space=request.expect_space,
        is_flex=request.service_tier == "flex",
    )


def _split_input(given: Input) -> Items:
    """Split `input` into texts and token ids. It has four forms: a text, texts, ids of a text, ids of texts."""
    if isinstance(given, str) and len(given) > 0:
        return (given,), ()
    items = [given] if isinstance(given, str) else given
    if not items:
        raise EmptyInput("input is empty: send at least one text", param="input")
    kinds = {type(item) for item in items}
    if len(kinds) > 1:
        raise InvalidValue("input mixes texts and token ids: send one kind per request", param="input")
    if kinds == {int}:
        return (), (tuple(items),)  # type: ignore[arg-type]  # all of one kind, just checked
    if len(items) > MAX_INPUTS:
        raise TooManyInputs(
            f"input has {len(items)} items (maximum {MAX_INPUTS} per request); split the request", param="input"
        )
    if not all(items):
        raise EmptyInput(f"input[{items.index(next(i for i in items if not i))}] is empty", param="input")  # type: ignore[arg-type]  # as above
    if kinds == {str}:
        return tuple(items), ()  # type: ignore[arg-type]  # as above
    return (), tuple(tuple(ids) for ids in items)  # type: ignore[arg-type]  # as above


def keep_alive_s(given: KeepAlive | None) -> float | None:
    """Return the seconds of a request's `keep_alive`; None if it has none.

    Raises:
        InvalidValue.
    """
    if given is None:
        return None
    try:
        return parse_keep_alive_s(given)
    except ValueError as error:
        raise InvalidValue(f"keep_alive must be {error}", param="keep_alive") from None
