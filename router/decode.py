"""Request bytes → Structs and `EmbedCall`. Strict: a string is not a number, and a request holds one kind of input.

Checked here is what needs no model, so that a hopeless request never loads one; widths, prompts and token ids are
the engine's to judge.
"""

import re
from functools import cache
from typing import Any

import msgspec
from litestar import Request
from litestar.exceptions import InternalServerException

from engines.errors import InvalidValue
from engines.records import EmbedCall
from router.errors import ClientLeft, EmptyInput, InvalidJson, TooManyInputs
from router.schema import MAX_INPUTS, EmbeddingRequest, Input
from router.units import parse_keep_alive_s

Items = tuple[tuple[str, ...], tuple[tuple[int, ...], ...]]
"""Texts and token ids; one of the two is empty."""

_FAULT = re.compile(r"(?P<what>.*?)(?: - at `(?P<path>\$.*)`)?", re.DOTALL)
_MISSING = re.compile(r"Object missing required field `(?P<field>\w+)`")


class StrictRequest(Request[Any, Any, Any]):
    """Decodes a JSON body straight into the Struct that the handler declares as `data`, which documents it too.

    Litestar's own way decodes twice, and takes `"256"` for 256.
    """

    async def json(self) -> Any:
        body = await self.body()
        try:
            return _decoder(self.route_handler.parsed_data_field.annotation).decode(body)  # type: ignore[union-attr]  # only called for handlers that declare data
        except msgspec.ValidationError as error:
            raise _invalid_value(error) from None
        except msgspec.DecodeError as error:
            raise InvalidJson(f"The body is not JSON: {error}") from None
        except UnicodeDecodeError:
            raise InvalidJson("The body is not JSON: it is not UTF-8") from None
        except RecursionError:
            raise InvalidJson("The body is nested too deeply to be read") from None

    async def body(self) -> bytes:
        try:
            body = await super().body()
        except InternalServerException:
            raise ClientLeft from None
        if not body and self.route_handler.parsed_data_field.is_required:  # type: ignore[union-attr]  # as above
            raise InvalidJson("The body is empty: send a JSON object")
        return body


@cache
def _decoder(wanted: Any) -> msgspec.json.Decoder[Any]:
    return msgspec.json.Decoder(wanted)


def _invalid_value(error: msgspec.ValidationError) -> InvalidValue:
    """msgspec says "Expected `int`, got `str` - at `$.dimensions`": the field, and then the fault."""
    fault = _FAULT.fullmatch(str(error))
    what, path = (fault["what"], fault["path"]) if fault else (str(error), None)
    if missing := _MISSING.match(what):
        return InvalidValue(f"{missing['field']}: is required", param=missing["field"])
    where = (path or "$").removeprefix("$").removeprefix(".")
    return InvalidValue(f"{where or 'body'}: {what}", param=re.split(r"[.\[]", where)[0] or None)


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
