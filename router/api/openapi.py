"""The OpenAPI document: Litestar's, from the handlers, and in it the schemas of the wire as msgspec decodes them.

Litestar's own schemas of Structs lose bounds and defaults, and call an optional body required.
"""

from collections import defaultdict
from collections.abc import Sequence
from inspect import getdoc
from typing import Any

import msgspec
from litestar import MediaType, Request
from litestar.openapi import ResponseSpec
from litestar.openapi.plugins import JsonRenderPlugin
from litestar.openapi.spec import Example

from engines.types import Plan
from router.errors import TABLE, Row
from router.registry.registry import Changes
from router.schemas import admin
from router.schemas import compat as skin_schema
from router.schemas import inference as schema

BEARER = [{"BearerToken": list[str]()}]
GUARDED = ("invalid_api_key", "insufficient_scope")
"""Codes of every route that needs a key."""
BODY = ("invalid_json", "invalid_value", "body_too_large")
"""Codes of every route that reads a body."""
LOADING = (
    "model_too_large", "model_loading", "model_load_failed", "out_of_memory", "shutting_down", "device_down",
    "host_lost",
)  # fmt: skip
"""Codes of every route that may load a model."""

EMBEDDING = (
    *GUARDED, *BODY, *LOADING, "empty_input", "too_many_inputs", "context_length_exceeded", "dimensions_not_supported",
    "prompt_not_found", "invalid_token_id", "model_not_found", "queue_full", "non_finite_embedding",
    "model_not_allowed", "rate_limit_exceeded", "too_many_requests",
)  # fmt: skip
"""Codes of every route that embeds."""

_WIRE = (
    schema.EmbeddingRequest, schema.EmbeddingResponse, schema.ErrorEnvelope, schema.Model, schema.ModelList,
    admin.Slot, admin.SlotList, admin.ModelSlots, admin.PreloadRequest, admin.EvictRequest, admin.Memory,
    admin.LastMinute, admin.ModelTraffic,
    admin.Status, Plan, Changes, *skin_schema.WIRE,
)  # fmt: skip
_TEXT = {"type": "string", "minLength": 1}
_IDS = {
    "type": "array", "minItems": 1, "maxItems": schema.MAX_IDS_OF_TEXT, "items": {"type": "integer", "minimum": 0},
}  # fmt: skip
_MANY = {"type": "array", "minItems": 1, "maxItems": schema.MAX_INPUTS}
_INPUT_FORMS = [_TEXT, _MANY | {"items": _TEXT}, _IDS, _MANY | {"items": _IDS}]
_REQUEST_EXAMPLE = {"model": "all-MiniLM-L6-v2", "input": ["The cat sits outside", "A man is playing guitar"]}


def failures(*codes: str) -> dict[int, ResponseSpec]:
    """The failures of a route, by their codes, each with an example from the error table.

    Two are possible everywhere: a crash, and a parameter or a Host header that cannot be read.
    """
    by_status: defaultdict[int, list[Example]] = defaultdict(list)
    for error, row in TABLE.items():
        is_new = all(example.summary != row.code for example in by_status[row.status])
        if row.code in {*codes, "internal_error", "invalid_value"} and is_new:
            by_status[row.status].append(_example(error, row))
    return {
        status: ResponseSpec(
            schema.ErrorEnvelope,
            generate_examples=False,
            description=f"`code`: {', '.join(example.summary or '' for example in examples)}",
            examples=examples,
        )
        for status, examples in by_status.items()
        if examples
    }


def _example(error: type[Exception], row: Row) -> Example:
    message = (getdoc(error) or "").partition("\n")[0]
    detail = schema.ErrorDetail(message=message, type=row.type, param=None, code=row.code)
    return Example(summary=row.code, value=msgspec.to_builtins(schema.ErrorEnvelope(error=detail)))


class TrueDocument(JsonRenderPlugin):
    """`openapi.json` with schemas that say what the decoder does."""

    def __init__(self) -> None:
        super().__init__(path="/openapi.json", media_type=MediaType.JSON)

    def render(self, request: Request[Any, Any, Any], openapi_schema: dict[str, Any]) -> bytes:
        components = openapi_schema["components"] | {"schemas": wire_schemas(_WIRE)}
        paths = {
            path: {method: _corrected(operation) for method, operation in item.items()}
            for path, item in openapi_schema["paths"].items()
        }
        return super().render(request, openapi_schema | {"components": components, "paths": paths})


def wire_schemas(structs: Sequence[type[msgspec.Struct]]) -> dict[str, Any]:
    """The JSON Schemas of the wire, under their names."""
    _, schemas = msgspec.json.schema_components(structs, ref_template="#/components/schemas/{name}")
    request = schemas["EmbeddingRequest"]
    request["properties"]["input"]["anyOf"] = _INPUT_FORMS
    request["examples"] = [_REQUEST_EXAMPLE]
    return schemas


def _corrected(operation: dict[str, Any]) -> dict[str, Any]:
    """A body that may be null may be left out; and examples say `param: null`, which Litestar drops."""
    for response in operation["responses"].values():
        for content in response.get("content", {}).values():
            for example in content.get("examples", {}).values():
                example["value"]["error"].setdefault("param", None)
    body = operation.get("requestBody")
    if body and {"type": "null"} in body["content"]["application/json"]["schema"].get("oneOf", ()):
        return operation | {"requestBody": body | {"required": False}}
    return operation
