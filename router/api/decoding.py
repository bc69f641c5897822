"""Request bytes → Structs and `EmbedCall`. Strict: a string is not a number, and a request holds one kind of input.

Checked here is what needs no model, so that a hopeless request never loads one; widths, prompts and token ids are
the engine's to judge.
"""

import asyncio
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from typing import Any

import msgspec
from litestar import Request
from litestar.exceptions import InternalServerException
from msgspec import Struct, structs

from engines.errors import DimensionsNotSupported, InvalidRequest, InvalidTokenId, InvalidValue
from engines.types import EmbedCall
from router.config.quantities import parse_keep_alive_s
from router.errors import ClientLeft, EmptyInput, InvalidJson, TooManyInputs
from router.schemas.compat import CohereRequest, OllamaRequest, TeiRequest
from router.schemas.inference import MAX_IDS, MAX_IDS_OF_TEXT, MAX_INPUTS, MAX_WIDTH, EmbeddingRequest, Input, TokenId

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


Items = tuple[tuple[str, ...], tuple[tuple[int, ...], ...]]
"""Texts and token ids; one of the two is empty."""


_INLINE_BYTES = 2**16
"""A larger body is decoded on a thread. Here that takes 1.4 ms at the most; a thread and back costs 0.1 ms."""


_SHARED_BYTES = 2**20
"""A larger body is decoded on a thread of its own, one after the other: each takes up to a second of the interpreter,
so that two at once are no faster, and take twice the memory."""


_ITEMS_FIELDS: dict[Any, str] = {
    EmbeddingRequest: "input", TeiRequest: "inputs", CohereRequest: "texts", OllamaRequest: "input",
}  # fmt: skip
"""Where a request holds its texts or token ids."""


_MISSING = re.compile(r"Object missing required field `(?P<field>\w+)`")


_BEYOND_64_BITS = re.compile(r"Expected `int` [<>]= -?9223372036854775\d+|Integer value out of range", re.ASCII)


_TOO_WIDE = re.compile(rf"Expected `int` <= {MAX_WIDTH}|Integer value out of range")


_IDS_BEGIN = re.compile(rb"\[[ \t\r\n]*[-0-9]")


_ARRAY = ord("[")


_FAULTY_BYTE = re.compile(r"\(byte (?P<at>\d+)\)")


_HALF_A_PAIR = re.compile(
    rb"\\u[dD][89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F])|(?<!\\u[dD][89abAB][0-9a-fA-F]{2})\\u[dD][c-fC-F]"
)


_NEAR_BYTES = 16
"""How far from half of a surrogate pair msgspec finds fault with what follows it."""


_decoding = ThreadPoolExecutor(max_workers=1, thread_name_prefix="decode")


class StrictRequest(Request[Any, Any, Any]):
    """Decodes a JSON body straight into the Struct that the handler declares as `data`, which documents it too.

    Litestar's own way decodes twice, and takes `"256"` for 256.
    """

    async def json(self) -> Any:
        body = await self.body()
        # Requests refer to themselves in circles, so a body would stay until the garbage collector comes by: ten of
        # 58 MiB, one after the other, took 580 MiB.
        self._body = self._connection_state.body = b""
        wanted = self.route_handler.parsed_data_field.annotation  # type: ignore[union-attr]  # only called for handlers that declare data
        if len(body) <= _INLINE_BYTES:
            return decode_body(body, wanted)
        executor = None if len(body) <= _SHARED_BYTES else _decoding
        return await asyncio.get_running_loop().run_in_executor(executor, decode_body, body, wanted)

    async def body(self) -> bytes:
        try:
            body = await super().body()
        except InternalServerException:
            raise ClientLeft from None
        if not body and self.route_handler.parsed_data_field.is_required:  # type: ignore[union-attr]  # as above
            raise InvalidJson("The body is empty: send a JSON object")
        return body


def decode_body(body: bytes, wanted: Any) -> Any:
    """The Struct that a body holds.

    Raises:
        InvalidJson, InvalidValue, InvalidTokenId; of a large body also TooManyInputs.
    """
    with _told(body):
        if len(body) > _INLINE_BYTES and wanted in _ITEMS_FIELDS:
            return _decode_in_stages(body, wanted)
        return _decoder(wanted).decode(body)


@contextmanager
def _told(content: Any, place: str = "") -> Iterator[None]:
    """Inside, what msgspec raises on `content` becomes our errors; `place` is where in the body the content stands."""
    try:
        yield
    except msgspec.ValidationError as error:
        raise _invalid_value(error, place) from None
    except msgspec.DecodeError as error:
        raise InvalidJson(_why_no_json(error, content)) from None
    except UnicodeDecodeError:
        raise InvalidJson("The body is not JSON: it is not UTF-8") from None
    except RecursionError:
        raise InvalidJson("The body is nested too deeply to be read") from None


@cache
def _decoder(wanted: Any) -> msgspec.json.Decoder[Any]:
    return msgspec.json.Decoder(wanted)


def _invalid_value(error: msgspec.ValidationError, place: str) -> InvalidRequest:
    """msgspec says "Expected `int`, got `str` - at `$.dimensions`": the field, and then the fault.

    The fault may quote what the client sent, at any length, so it is searched from its end.
    """
    what, _, path = str(error).rpartition(" - at `$")
    what, path = (what, path.removesuffix("`")) if what else (path, "")
    if missing := _MISSING.match(what):
        return InvalidValue(f"{missing['field']}: is required", param=missing["field"])
    where = place + path.removeprefix(".")
    param = re.split(r"[.\[]", where, maxsplit=1)[0] or None
    if param in _ITEMS_FIELDS.values() and _BEYOND_64_BITS.match(what):
        return InvalidTokenId(f"{where} holds a number of more than 64 bits, which is no token id", param=param)
    refusal = DimensionsNotSupported if _TOO_WIDE.match(what) else InvalidValue
    return refusal(f"{where or 'body'}: {what}", param=param)


def _why_no_json(error: msgspec.DecodeError, content: Any) -> str:
    fault = _FAULTY_BYTE.search(str(error))
    at = int(fault["at"]) if fault else len(content)
    if _HALF_A_PAIR.search(content[max(0, at - _NEAR_BYTES) : at + _NEAR_BYTES]):
        return (
            "The body holds half of a surrogate pair (\\ud800 to \\udfff), which is no character: send both halves, or "
            "\\ufffd in its place"
        )
    return f"The body is not JSON: {error}"


# A large body is decoded in stages, because msgspec holds the interpreter's lock for a whole call, and builds a whole
# list before it looks at its length. 58 MiB in one call: `[[1],[1],…]` 8.1 s, `[1,1,…]` 0.7 s. In stages: 0.1 s (once
# over everything, without building anything), then one item a call.


class _Stages(Struct, frozen=True):
    """How a request is decoded in stages. `envelope`: the same Struct, its items as they came."""

    field: str
    envelope: msgspec.json.Decoder[Any]
    whole: msgspec.json.Decoder[Any]
    item: msgspec.json.Decoder[Any]
    is_of_ids: bool


@cache
def _stages(wanted: Any) -> _Stages:
    field = _ITEMS_FIELDS[wanted]
    is_of_ids = wanted is EmbeddingRequest
    envelope = msgspec.defstruct("Envelope", [(field, msgspec.Raw)], bases=(wanted,), frozen=True, kw_only=True)
    return _Stages(
        field=field,
        envelope=msgspec.json.Decoder(envelope),
        whole=msgspec.json.Decoder(wanted.__annotations__[field]),
        item=msgspec.json.Decoder(str | TokenId | tuple[TokenId, ...] if is_of_ids else str),
        is_of_ids=is_of_ids,
    )


_first_items = msgspec.json.Decoder(
    msgspec.defstruct(
        "FirstItems",
        [(f"item_{index}", msgspec.Raw, msgspec.UNSET) for index in range(MAX_INPUTS + 1)],
        array_like=True,
        frozen=True,
    )
)
"""Of an array no more than its first items, as they came: what an array-like Struct has no field for is skipped."""


def _decode_in_stages(body: bytes, wanted: Any) -> Any:
    stages = _stages(wanted)
    envelope = stages.envelope.decode(body)
    raw = memoryview(getattr(envelope, stages.field))
    with _told(raw, stages.field):
        if stages.is_of_ids and _IDS_BEGIN.match(raw):
            items: Any = [_decode_item(stages, raw, stages.field)]
        elif raw[0] == _ARRAY:
            items = _decode_items(stages, raw)
        else:
            items = stages.whole.decode(raw)
    rest = {name: getattr(envelope, name) for name in wanted.__struct_fields__ if name != stages.field}
    return wanted(**rest, **{stages.field: items})


def _decode_items(stages: _Stages, raw: memoryview) -> list[Any]:
    found = [memoryview(item) for item in structs.astuple(_first_items.decode(raw)) if item is not msgspec.UNSET]
    if len(found) > MAX_INPUTS:
        raise TooManyInputs(
            f"{stages.field} holds more than {MAX_INPUTS} items, and a request {MAX_INPUTS} at most: split it",
            param=stages.field,
        )
    items: list[Any] = []
    num_ids = 0
    for index, item in enumerate(found):
        place = f"{stages.field}[{index}]"
        with _told(item, place):
            items.append(_decode_item(stages, item, place))
        num_ids += len(items[-1]) if isinstance(items[-1], tuple) else 0
        if num_ids > MAX_IDS:
            raise InvalidValue(
                f"{stages.field} holds more than {MAX_IDS} token ids, and a request {MAX_IDS} at most: split it",
                param=stages.field,
            )
    return items


def _decode_item(stages: _Stages, raw: memoryview, place: str) -> Any:
    """A text, or its token ids; those are counted before they are built."""
    if len(raw) > 2 * MAX_IDS_OF_TEXT and raw[0] == _ARRAY:
        num_ids = bytes(raw).count(b",") + 1
        if num_ids > MAX_IDS_OF_TEXT:
            raise InvalidValue(
                f"{place} holds {num_ids} token ids, and a text {MAX_IDS_OF_TEXT} at most: cut it", param=stages.field
            )
    return stages.item.decode(raw)


def embed_call(request: EmbeddingRequest, model_id: str, *, load_timeout_s: float) -> EmbedCall:
    """The call that a request asks for.

    Raises:
        EmptyInput, TooManyInputs, InvalidValue.
    """
    texts, token_ids = _items(request.input)
    if request.prompt is not None and (request.input_type is not None or request.instruction is not None):
        raise InvalidValue("prompt excludes input_type and instruction: send one of them", param="prompt")
    return EmbedCall(
        model_id=model_id,
        texts=texts,
        token_ids=token_ids,
        dimensions=request.dimensions,
        input_type=request.input_type,
        instruction=request.instruction,
        prompt=request.prompt,
        truncate=request.truncate,
        normalize=request.normalize,
        keep_alive_s=_keep_alive_s(request),
        load_timeout_s=load_timeout_s,
    )


def _items(given: Input) -> Items:
    """There are four forms: a text, texts, the token ids of a text, token ids of texts."""
    items = [given] if isinstance(given, str) else given
    if not items:
        raise EmptyInput("input is an empty list: send at least one text", param="input")
    kinds = {type(item) for item in items}
    if len(kinds) > 1:
        raise InvalidValue("input mixes texts and token ids: send one kind a request", param="input")
    if kinds == {int}:
        return (), (tuple(items),)  # type: ignore[arg-type]  # all of one kind, just checked
    if len(items) > MAX_INPUTS:
        raise TooManyInputs(
            f"input holds {len(items)} items, and a request {MAX_INPUTS} at most: split it", param="input"
        )
    if not all(items):
        raise EmptyInput(f"input {items.index(next(i for i in items if not i))} is empty", param="input")  # type: ignore[arg-type]  # as above
    if kinds == {str}:
        return tuple(items), ()  # type: ignore[arg-type]  # as above
    return (), tuple(tuple(ids) for ids in items)  # type: ignore[arg-type]  # as above


def _keep_alive_s(request: EmbeddingRequest) -> float | None:
    if request.keep_alive is None:
        return None
    try:
        return parse_keep_alive_s(request.keep_alive)
    except ValueError as error:
        raise InvalidValue(f"keep_alive: needs {error}", param="keep_alive") from None
