"""Ollama's routes about models: `GET /api/tags`, `/api/ps` and `/api/version`, `POST /api/show` and `/api/pull`."""

from collections.abc import AsyncIterator
from contextlib import aclosing
from datetime import UTC, datetime
from hashlib import sha256
from typing import Any

import msgspec
from litestar import Controller, Request, Response, get, post
from litestar.openapi import ResponseSpec
from litestar.params import JSONBody
from litestar.response import Stream

from engines.errors import InvalidValue
from engines.spec import ModelSpec
from engines.types import Event
from router.api.compat.ollama import model_name, tagged_name
from router.api.decoding import StrictRequest
from router.api.event_stream import HEARTBEAT_S, Loading, events_of_model, follow_preload
from router.api.models import slots_by_model, visible_slots
from router.api.openapi import BEARER, BODY, GUARDED, LOADING, ollama_failures
from router.auth.guards import requires
from router.auth.model_access import resolve
from router.errors import describe
from router.observability.request_context import context_of
from router.schemas.admin import Slot
from router.schemas.ollama import (
    OllamaDetails,
    OllamaModel,
    OllamaModelName,
    OllamaModels,
    OllamaProcesses,
    OllamaProgress,
    OllamaPull,
    OllamaRunning,
    OllamaShown,
    OllamaVersion,
)
from router.server.application import while_client_stays
from router.server.state import ServerState, state_of

_VERSION = "0.12.0"
"""The version of Ollama whose API these routes follow; clients compare it with what they need."""
_FAMILY = "embedyard"
"""Prefix of the keys of `model_info`. Ollama has the architecture there, which only an engine knows."""
_LINES = ResponseSpec(
    OllamaProgress,
    media_type="application/x-ndjson",
    generate_examples=False,
    description="A line for each step; one JSON object at the end if `stream` is false",
)


class OllamaModelsController(Controller):
    """The routes of Ollama's API that list, show and load models."""

    path = "/api"
    tags = ("skins",)
    security = BEARER

    @get("/tags", guards=(requires("embed"),), responses=ollama_failures(*GUARDED), summary="List the models (Ollama)")
    async def ollama_tags(self, request: Request[Any, Any, Any]) -> OllamaModels:
        """Lists the models that the key may use, in memory or not."""
        found = visible_slots(request).values()
        return OllamaModels(models=[_model(slots[0], state_of(request).started_at_s) for slots in found])

    @get(
        "/ps",
        guards=(requires("embed"),),
        responses=ollama_failures(*GUARDED),
        summary="List the models in memory (Ollama)",
    )
    async def ollama_ps(self, request: Request[Any, Any, Any]) -> OllamaProcesses:
        """Lists loaded models, one entry for each device that holds one."""
        slots = (slot for slots in visible_slots(request).values() for slot in slots)
        return OllamaProcesses(models=[_running(slot) for slot in slots if slot.state == "ready"])

    @get(
        "/version",
        guards=(requires("embed"),),
        responses=ollama_failures(*GUARDED),
        summary="Show the version (Ollama)",
    )
    async def ollama_version(self) -> OllamaVersion:
        """Shows the version of Ollama whose API this is."""
        return OllamaVersion(version=_VERSION)

    @post(
        "/show",
        status_code=200,
        guards=(requires("embed"),),
        request_class=StrictRequest,
        responses=ollama_failures(*GUARDED, *BODY, "model_not_found", "model_not_allowed"),
        summary="Show a model (Ollama)",
    )
    async def ollama_show(self, request: Request[Any, Any, Any], data: JSONBody[OllamaModelName]) -> OllamaShown:
        """Shows what is known of the model without loading it."""
        server_state = state_of(request)
        spec = resolve(request, server_state.registry, model_name(_wanted(data), server_state.registry))
        slot = slots_by_model(server_state)[spec.model_id][0]
        return OllamaShown(
            details=_details(slot),
            model_info=_model_info(spec, slot),
            capabilities=("embedding",) if spec.task in (None, "embed") else (),
            modified_at=_time(server_state.started_at_s),
            license=spec.license,
        )

    @post(
        "/pull",
        status_code=200,
        guards=(requires("admin"),),
        request_class=StrictRequest,
        responses={200: _LINES} | ollama_failures(*GUARDED, *BODY, *LOADING, "model_not_found"),
        summary="Fetch and load a model (Ollama)",
    )
    async def ollama_pull(self, request: Request[Any, Any, Any], data: JSONBody[OllamaPull]) -> Response[Any]:
        """Fetches a model of the registry and loads it, as /admin/models/{model_id}/preload does."""
        server_state = state_of(request)
        spec = server_state.registry.resolve(model_name(_wanted(data), server_state.registry))
        context_of(request).set_model(spec.model_id)
        if data.stream is not False:
            return Stream(_pull(request, server_state, spec), media_type="application/x-ndjson")
        async with while_client_stays(request):
            await server_state.backend.preload(spec.model_id)
        return Response(OllamaProgress(status="success"))


def _wanted(data: OllamaModelName) -> str:
    name = data.model or data.name
    if not name:
        raise InvalidValue("model is required", param="model")
    return name


async def _pull(request: Request[Any, Any, Any], server_state: ServerState, spec: ModelSpec) -> AsyncIterator[bytes]:
    """Load the model and yield a line for each step; the last line is `success` or an error."""

    async def preload() -> msgspec.Struct:
        return await server_state.backend.preload(spec.model_id)

    events = events_of_model(server_state.backend.events(), spec.model_id)
    progress = OllamaProgress(status="pulling manifest")
    async with aclosing(follow_preload(events, preload, HEARTBEAT_S)) as steps:
        async for step in steps:
            if isinstance(step, Event):
                progress = _progress(step, spec)
            elif step is not None:
                progress = _outcome(request, step)
            yield msgspec.json.encode(progress) + b"\n"


def _progress(event: Event, spec: ModelSpec) -> OllamaProgress:
    if event.kind != "progress" or not event.total_bytes:
        return OllamaProgress(status=event.target)
    return OllamaProgress(
        status=f"pulling {spec.model_id}",
        digest=f"sha256:{_fingerprint(spec.source, spec.revision)}",
        total=event.total_bytes,
        completed=event.done_bytes,
    )


def _outcome(request: Request[Any, Any, Any], loading: Loading) -> OllamaProgress:
    try:
        loading.result()
    except Exception as error:  # noqa: BLE001 - answered like the errors of every route
        return OllamaProgress(error=describe(request, error)[1].error.message)
    return OllamaProgress(status="success")


def _fingerprint(source: str, revision: str | None) -> str:
    """Return 64 hex digits for a model's files; Ollama's own client cuts digests and fails on shorter ones."""
    return sha256(f"{source}@{revision}".encode()).hexdigest()


def _digest(slot: Slot) -> str:
    return slot.revision or _fingerprint(slot.source, None)


def _time(unix_s: float) -> str:
    return datetime.fromtimestamp(unix_s, UTC).isoformat()


def _details(slot: Slot) -> OllamaDetails:
    return OllamaDetails(quantization_level=slot.info.dtype if slot.info else "")


def _model_info(spec: ModelSpec, slot: Slot) -> dict[str, str | int]:
    info = slot.info
    max_tokens = info.max_tokens if info else spec.max_tokens
    known: dict[str, str | int | None] = {
        "general.architecture": _FAMILY,
        "general.basename": spec.model_id,
        f"{_FAMILY}.context_length": max_tokens,
        f"{_FAMILY}.embedding_length": info.dimensions or None if info else None,
    }
    return {key: value for key, value in known.items() if value is not None}


def _model(slot: Slot, started_at_s: int) -> OllamaModel:
    return OllamaModel(
        name=tagged_name(slot.id),
        model=tagged_name(slot.id),
        modified_at=_time(started_at_s),
        size=slot.need_bytes or slot.weight_bytes or slot.fetch_total_bytes,
        digest=_digest(slot),
        details=_details(slot),
    )


def _running(slot: Slot) -> OllamaRunning:
    is_timed = slot.keep_alive_s >= 0 and slot.last_used_at is not None
    return OllamaRunning(
        name=tagged_name(slot.id),
        model=tagged_name(slot.id),
        size=slot.weight_bytes,
        size_vram=slot.weight_bytes if slot.device.startswith("cuda") else 0,
        digest=_digest(slot),
        details=_details(slot),
        expires_at=_time((slot.last_used_at or 0.0) + slot.keep_alive_s) if is_timed else None,
        context_length=slot.info.max_tokens if slot.info else 0,
    )
