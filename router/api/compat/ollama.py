"""Ollama's `POST /api/embed`, `GET /api/tags` and `GET /api/ps`."""

import time
from datetime import UTC, datetime
from typing import Any

import msgspec
from litestar import Controller, MediaType, Request, Response, get
from litestar.params import JSONBody

from engines.spec import Truncate
from router.api.encoding import encode_rows
from router.api.inference import InferenceRoute, embed
from router.api.models import visible_slots
from router.api.openapi import BEARER, GUARDED, failures
from router.auth.guards import requires
from router.registry.registry import Registry
from router.schemas.admin import Slot
from router.schemas.compat import (
    OllamaDetails,
    OllamaModel,
    OllamaModels,
    OllamaProcesses,
    OllamaRequest,
    OllamaResponse,
    OllamaRunning,
)
from router.schemas.inference import EmbeddingRequest
from router.server.state import state_of

_LATEST = ":latest"
_TRUNCATE: dict[bool | None, Truncate] = {True: "end", False: "error"}


class OllamaController(Controller):
    """The API of Ollama."""

    path = "/api"
    tags = ("skins",)

    @InferenceRoute("/embed", summary="Embed texts (Ollama)", returns=OllamaResponse)
    async def ollama_embed(self, request: Request[Any, Any, Any], data: JSONBody[OllamaRequest]) -> Response[bytes]:
        """Loads the model first if it is not in memory."""
        started_at_s = time.perf_counter()
        answer = await embed(request, _to_embedding_request(data, state_of(request).registry))
        rows = await encode_rows(answer.embeddings)
        head = {
            "model": data.model,
            "total_duration": _nanoseconds(time.perf_counter() - started_at_s),
            "load_duration": _nanoseconds(answer.embeddings.timings.load_s),
            "prompt_eval_count": answer.num_tokens,
        }
        body = msgspec.json.encode(head)[:-1] + b',"embeddings":' + rows + b"}"
        return Response(body, media_type=MediaType.JSON, headers=answer.headers)

    @get(
        "/tags",
        guards=(requires("embed"),),
        security=BEARER,
        responses=failures(*GUARDED),
        summary="List the models (Ollama)",
    )
    async def ollama_tags(self, request: Request[Any, Any, Any]) -> OllamaModels:
        """Lists the models that the key may use, in memory or not."""
        return OllamaModels(
            models=[_model(slots[0], state_of(request).started_at_s) for slots in visible_slots(request).values()]
        )

    @get(
        "/ps",
        guards=(requires("embed"),),
        security=BEARER,
        responses=failures(*GUARDED),
        summary="List the models in memory (Ollama)",
    )
    async def ollama_ps(self, request: Request[Any, Any, Any]) -> OllamaProcesses:
        """Lists loaded models, one entry for each device that holds one."""
        slots = (slot for slots in visible_slots(request).values() for slot in slots)
        return OllamaProcesses(models=[_running(slot) for slot in slots if slot.state == "ready"])


def _to_embedding_request(data: OllamaRequest, registry: Registry) -> EmbeddingRequest:
    return EmbeddingRequest(
        input=data.input if isinstance(data.input, str) else [*data.input],
        model=_model_name(data.model, registry),
        dimensions=data.dimensions,
        truncate=_TRUNCATE.get(data.truncate),
        keep_alive=_keep_alive(data.keep_alive),
    )


def _model_name(name: str, registry: Registry) -> str:
    """Remove the tag `:latest`, which Ollama's clients add to names without a tag."""
    is_known = name in registry.models or name in registry.aliases
    return name if is_known else name.removesuffix(_LATEST)


def _keep_alive(given: float | str | None) -> float | str | None:
    """Translate every negative duration into -1: never unload when idle."""
    is_negative = (
        given[:1] == "-" and given[1:2].isdigit() if isinstance(given, str) else given is not None and given < 0
    )
    return -1 if is_negative else given


def _nanoseconds(seconds: float) -> int:
    return round(seconds * 1e9)


def _time(unix_s: float) -> str:
    return datetime.fromtimestamp(unix_s, UTC).isoformat()


def _details(slot: Slot) -> OllamaDetails:
    return OllamaDetails(quantization_level=slot.info.dtype if slot.info else "")


def _model(slot: Slot, started_at_s: int) -> OllamaModel:
    return OllamaModel(
        name=slot.id,
        model=slot.id,
        modified_at=_time(started_at_s),
        size=slot.need_bytes or slot.weight_bytes,
        digest=slot.revision or "",
        details=_details(slot),
    )


def _running(slot: Slot) -> OllamaRunning:
    is_timed = slot.keep_alive_s >= 0 and slot.last_used_at is not None
    return OllamaRunning(
        name=slot.id,
        model=slot.id,
        size=slot.weight_bytes,
        size_vram=slot.weight_bytes if slot.device.startswith("cuda") else 0,
        digest=slot.revision or "",
        details=_details(slot),
        expires_at=_time((slot.last_used_at or 0.0) + slot.keep_alive_s) if is_timed else None,
        context_length=slot.info.max_tokens if slot.info else 0,
    )
