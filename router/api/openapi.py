"""Builds the OpenAPI document: Litestar's, with msgspec's JSON Schemas of the requests and responses.

Litestar's own schemas of Structs lose bounds and defaults, and mark an optional body as required.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
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
from router.schemas import admin, batches, compat, inference, ollama, outputs, scoring

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
    "model_not_allowed", "rate_limit_exceeded", "too_many_requests", "task_not_supported", "space_mismatch",
)  # fmt: skip
"""Error codes of every route that runs a model."""

_WIRE = (
    inference.EmbeddingRequest, inference.EmbeddingResponse, inference.ErrorEnvelope, inference.Model,
    inference.ModelList, admin.Slot, admin.SlotList, admin.ModelSlots, admin.PreloadRequest, admin.EvictRequest,
    admin.Memory, admin.LastMinute, admin.ModelTraffic, admin.Status, Plan, Changes, *compat.WIRE,
    *scoring.WIRE, *ollama.WIRE, *batches.WIRE, *outputs.WIRE,
)  # fmt: skip
_UPLOAD = {
    "required": True,
    "content": {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "required": ["purpose", "file"],
                "properties": {
                    "purpose": {"type": "string", "enum": ["batch"]},
                    "file": {"type": "string", "format": "binary"},
                    "expires_after[seconds]": {"type": "integer", "minimum": 3600, "maximum": 2592000},
                },
            }
        }
    },
}
"""The body of `POST /v1/files`, which its handler reads as it arrives."""
_REQUEST_EXAMPLE = {"model": "all-MiniLM-L6-v2", "input": ["The cat sits outside", "A man is playing guitar"]}


def failures(*codes: str) -> dict[int, ResponseSpec]:
    """Return the error responses of a route by status, each code with an example from the error table.

    Two codes are added to every route: `internal_error`, and `invalid_value` for an invalid parameter or Host header.
    """
    return _failures(codes, inference.ErrorEnvelope, _envelope)


def ollama_failures(*codes: str) -> dict[int, ResponseSpec]:
    """Return the error responses of a route of Ollama's, where the error is a string."""
    return _failures(codes, ollama.OllamaError, lambda message, _: ollama.OllamaError(error=message))


def _failures(
    codes: Sequence[str], body: type[msgspec.Struct], example: Callable[[str, ErrorRow], msgspec.Struct]
) -> dict[int, ResponseSpec]:
    by_status: defaultdict[int, list[Example]] = defaultdict(list)
    for error, row in TABLE.items():
        is_new = all(example.summary != row.code for example in by_status[row.status])
        if row.code in {*codes, "internal_error", "invalid_value"} and is_new:
            message = (getdoc(error) or "").partition("\n")[0]
            value = msgspec.to_builtins(example(message, row))
            by_status[row.status].append(Example(summary=row.code, value=value))
    return {
        status: ResponseSpec(
            body,
            generate_examples=False,
            description=f"`code`: {', '.join(example.summary or '' for example in examples)}",
            examples=examples,
        )
        for status, examples in by_status.items()
        if examples
    }


def _envelope(message: str, row: ErrorRow) -> inference.ErrorEnvelope:
    return inference.ErrorEnvelope(
        error=inference.ErrorDetail(message=message, type=row.type, param=None, code=row.code)
    )


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
        paths["/v1/files"] |= {"post": paths["/v1/files"]["post"] | {"requestBody": _UPLOAD}}
        return super().render(request, openapi_schema | {"components": components, "paths": paths})


def wire_schemas(structs: Sequence[type[msgspec.Struct]]) -> dict[str, Any]:
    """Return the JSON Schemas of requests and responses by name."""
    _, schemas = msgspec.json.schema_components(structs, ref_template="#/components/schemas/{name}")
    request = schemas["EmbeddingRequest"]
    request["properties"]["input"]["anyOf"] = inference.INPUT_FORMS
    request["examples"] = [_REQUEST_EXAMPLE]
    items = [{"$ref": f"#/components/schemas/{name}"} for name in ("Embedding", "TextOutputs")]
    schemas["EmbeddingResponse"]["properties"]["data"]["items"] = {"anyOf": items}
    return schemas


def _corrected(operation: dict[str, Any]) -> dict[str, Any]:
    """Add what Litestar's document cannot say: optional bodies, `param: null` in examples, lines or one JSON object."""
    for response in operation["responses"].values():
        if lines := response.get("content", {}).get("application/x-ndjson"):
            response["content"]["application/json"] = lines
        for content in response.get("content", {}).values():
            for example in content.get("examples", {}).values():
                if isinstance(example["value"]["error"], dict):
                    example["value"]["error"].setdefault("param", None)
    body = operation.get("requestBody")
    if body and {"type": "null"} in body["content"]["application/json"]["schema"].get("oneOf", ()):
        return operation | {"requestBody": body | {"required": False}}
    return operation
