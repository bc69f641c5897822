"""Builds the OpenAPI document: Litestar's, with msgspec's JSON Schemas of the requests and responses.

Litestar's own schemas of Structs lose bounds and defaults, and mark an optional body as required.
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
from router.errors import TABLE, ErrorRow
from router.registry.registry import Changes
from router.schemas import admin, compat, inference, scoring

BEARER = [{"BearerToken": list[str]()}]
GUARDED = ("invalid_api_key", "insufficient_scope")
"""Error codes of every route that needs a key."""
BODY = ("invalid_json", "invalid_value", "body_too_large")
"""Error codes of every route that reads a body."""
LOADING = (
    "model_too_large", "model_loading", "model_load_failed", "out_of_memory", "shutting_down", "device_down",
    "host_lost",
)  # fmt: skip
"""Error codes of every route that may load a model."""

EMBEDDING = (
    *GUARDED, *BODY, *LOADING, "empty_input", "too_many_inputs", "context_length_exceeded", "dimensions_not_supported",
    "prompt_not_found", "invalid_token_id", "model_not_found", "queue_full", "non_finite_embedding",
    "model_not_allowed", "rate_limit_exceeded", "too_many_requests", "task_not_supported",
)  # fmt: skip
"""Error codes of every route that runs a model."""

_WIRE = (
    inference.EmbeddingRequest, inference.EmbeddingResponse, inference.ErrorEnvelope, inference.Model,
    inference.ModelList, admin.Slot, admin.SlotList, admin.ModelSlots, admin.PreloadRequest, admin.EvictRequest,
    admin.Memory, admin.LastMinute, admin.ModelTraffic, admin.Status, Plan, Changes, *compat.WIRE,
    *scoring.WIRE,
)  # fmt: skip
_TEXT = {"type": "string", "minLength": 1}
_IDS = {
    "type": "array", "minItems": 1, "maxItems": inference.MAX_IDS_OF_TEXT, "items": {"type": "integer", "minimum": 0},
}  # fmt: skip
_MANY = {"type": "array", "minItems": 1, "maxItems": inference.MAX_INPUTS}
_INPUT_FORMS = [_TEXT, _MANY | {"items": _TEXT}, _IDS, _MANY | {"items": _IDS}]
_REQUEST_EXAMPLE = {"model": "all-MiniLM-L6-v2", "input": ["The cat sits outside", "A man is playing guitar"]}


def failures(*codes: str) -> dict[int, ResponseSpec]:
    """Return the error responses of a route by status, each code with an example from the error table.

    Two codes are added to every route: `internal_error`, and `invalid_value` for an invalid parameter or Host header.
    """
    by_status: defaultdict[int, list[Example]] = defaultdict(list)
    for error, row in TABLE.items():
        is_new = all(example.summary != row.code for example in by_status[row.status])
        if row.code in {*codes, "internal_error", "invalid_value"} and is_new:
            by_status[row.status].append(_example(error, row))
    return {
        status: ResponseSpec(
            inference.ErrorEnvelope,
            generate_examples=False,
            description=f"`code`: {', '.join(example.summary or '' for example in examples)}",
            examples=examples,
        )
        for status, examples in by_status.items()
        if examples
    }


def _example(error: type[Exception], row: ErrorRow) -> Example:
    message = (getdoc(error) or "").partition("\n")[0]
    detail = inference.ErrorDetail(message=message, type=row.type, param=None, code=row.code)
    return Example(summary=row.code, value=msgspec.to_builtins(inference.ErrorEnvelope(error=detail)))


class OpenApiJson(JsonRenderPlugin):
    """Renders `openapi.json` with the schemas that the decoder uses."""

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
    """Return the JSON Schemas of requests and responses by name."""
    _, schemas = msgspec.json.schema_components(structs, ref_template="#/components/schemas/{name}")
    request = schemas["EmbeddingRequest"]
    request["properties"]["input"]["anyOf"] = _INPUT_FORMS
    request["examples"] = [_REQUEST_EXAMPLE]
    return schemas


def _corrected(operation: dict[str, Any]) -> dict[str, Any]:
    """Mark a nullable body as optional, and put `param: null` back into examples, which Litestar drops."""
    for response in operation["responses"].values():
        for content in response.get("content", {}).values():
            for example in content.get("examples", {}).values():
                example["value"]["error"].setdefault("param", None)
    body = operation.get("requestBody")
    if body and {"type": "null"} in body["content"]["application/json"]["schema"].get("oneOf", ()):
        return operation | {"requestBody": body | {"required": False}}
    return operation
