"""`/admin`: what is in memory, and an operator's commands."""

from collections.abc import AsyncIterator
from typing import Annotated, Any
from urllib.parse import unquote

from litestar import Controller, Request, Response, get, post
from litestar.di import NamedDependency, Provide
from litestar.openapi import ResponseSpec
from litestar.params import FromPath, FromQuery, HeaderParameter, JSONBody
from litestar.response import ServerSentEvent
from litestar.response.sse import ServerSentEventMessage
from msgspec import structs

from engines.spec import ModelSpec
from engines.types import Event, HostSnapshot, Plan
from router.api.decoding import StrictRequest
from router.api.event_stream import event_messages, parse_last_event_id, preload_messages, wants_stream
from router.api.models import slots_by_model
from router.api.openapi import BEARER, BODY, GUARDED, LOADING, failures
from router.auth.guards import requires
from router.observability.traffic import STEP_S, traffic_of
from router.registry.registry import Changes
from router.schemas.admin import (
    DeviceMemory,
    EvictRequest,
    LastMinute,
    Memory,
    ModelSlots,
    ModelTraffic,
    PreloadRequest,
    SlotList,
)
from router.server.application import while_client_stays
from router.server.reloader import reloader_of
from router.server.state import ServerState, provide_any_spec, state_of

_EVENT_STREAM = ResponseSpec(
    str,
    media_type="text/event-stream",
    generate_examples=False,
    description="Events named `state` and `progress`, their data the JSON of one event; comments keep it open",
)


class AdminController(Controller):
    """For operators and the dashboard."""

    path = "/admin"
    tags = ("admin",)
    guards = (requires("admin"),)
    security = BEARER
    dependencies = {"spec": Provide(provide_any_spec, sync_to_thread=False)}  # noqa: RUF012 - as Litestar types it

    @get("/models", responses=failures(*GUARDED), summary="List the slots")
    async def list_slots(self, request: Request[Any, Any, Any]) -> SlotList:
        """Every model on every device."""
        return SlotList(data=[slot for slots in slots_by_model(state_of(request)).values() for slot in slots])

    @get("/models/{model_id:str}", responses=failures(*GUARDED, "model_not_found"), summary="One model's slots")
    async def retrieve_slots(self, request: Request[Any, Any, Any], spec: NamedDependency[ModelSpec]) -> ModelSlots:
        """One model on every device."""
        return _model_slots(state_of(request), spec)

    @post(
        "/models/{model_id:str}/preload",
        status_code=200,
        request_class=StrictRequest,
        responses={202: ResponseSpec(ModelSlots, generate_examples=False, description="On its way; not waited for")}
        | failures(*GUARDED, *BODY, *LOADING, "model_not_found", "not_found"),
        summary="Load a model",
    )
    async def preload(
        self,
        request: Request[Any, Any, Any],
        spec: NamedDependency[ModelSpec],
        data: JSONBody[PreloadRequest | None] = None,
    ) -> Response[ModelSlots]:
        """It is loaded where it fits best, or on the host that is named; also when the client does not wait, or leaves.

        With `Accept: text/event-stream` the answer is a stream at once: this model's events as in /admin/events, then
        one event `done` with its slots, or one `error` with the error's envelope.
        """
        server_state, wanted = state_of(request), data or PreloadRequest()
        if wants_stream(request):
            return ServerSentEvent(_preload_stream(request, server_state, spec, wanted))  # type: ignore[return-value]  # a Response of another body
        async with while_client_stays(request):
            status = await server_state.backend.preload(
                spec.model_id, pin=wanted.pin, wait=wanted.wait, host_id=wanted.host
            )
        is_done = wanted.wait or status.state == "ready"
        return Response(_model_slots(server_state, spec), status_code=200 if is_done else 202)

    @post(
        "/models/{model_id:str}/evict",
        status_code=200,
        request_class=StrictRequest,
        responses=failures(*GUARDED, *BODY, "model_not_found", "model_in_use", "model_pinned"),
        summary="Free a model",
    )
    async def evict(
        self,
        request: Request[Any, Any, Any],
        spec: NamedDependency[ModelSpec],
        data: JSONBody[EvictRequest | None] = None,
    ) -> ModelSlots:
        """Running requests finish first; then it is freed on every device."""
        server_state, wanted = state_of(request), data or EvictRequest()
        await server_state.backend.evict(spec.model_id, force=wanted.force, timeout_s=wanted.timeout)
        return _model_slots(server_state, spec)

    @post(
        "/hosts/{host_id:str}/recycle",
        status_code=200,
        responses=failures(*GUARDED, "invalid_value", "not_found", "host_lost"),
        summary="Start a host anew",
    )
    async def recycle(self, request: Request[Any, Any, Any], host_id: FromPath[str]) -> Memory:
        """Its requests finish, its process ends, another one takes its place and loads what was ready: the sure cure
        for a leak. Other hosts serve on. Answers with all devices when the new one takes work.
        """
        backend = state_of(request).backend
        await backend.recycle(unquote(host_id))
        return Memory(devices=[_device(host) for host in backend.snapshots()])

    @get("/memory", responses=failures(*GUARDED), summary="Memory of the devices")
    async def memory(self, request: Request[Any, Any, Any]) -> Memory:
        """Each device's bytes, and its residents in eviction order."""
        return Memory(devices=[_device(host) for host in state_of(request).backend.snapshots()])

    @get("/traffic", responses=failures(*GUARDED), summary="The last minute")
    async def last_minute(self, request: Request[Any, Any, Any]) -> LastMinute:
        """Texts, tokens and latencies of the models that answered within it."""
        found = traffic_of(request).last_minute().items()
        return LastMinute(step_s=STEP_S, data=[ModelTraffic(id=name, **structs.asdict(each)) for name, each in found])

    @get("/plan", responses=failures(*GUARDED, "invalid_value", "model_not_found"), summary="Plan a load")
    async def plan(self, request: Request[Any, Any, Any], model: FromQuery[str | None] = None) -> Plan:
        """What loading a model would do, without doing it; without `model`, the default one."""
        server_state = state_of(request)
        return await server_state.backend.plan(server_state.registry.resolve(model).model_id)

    @post(
        "/registry/reload",
        status_code=200,
        responses=failures(*GUARDED, "invalid_value", "shutting_down"),
        summary="Read the registry again",
    )
    async def reload_registry(self, request: Request[Any, Any, Any]) -> Changes:
        """All or nothing: what was added, removed, changed in place, or replaced; or every mistake in the file."""
        return await reloader_of(request).reload()

    @get("/events", responses={200: _EVENT_STREAM} | failures(*GUARDED), summary="Follow what happens")
    async def events(
        self,
        request: Request[Any, Any, Any],
        last_event_id: Annotated[str, HeaderParameter(name="Last-Event-ID")] = "",
    ) -> ServerSentEvent:
        """State changes and download progress as they happen; `Last-Event-ID` brings what was missed."""
        server_state = state_of(request)
        after = parse_last_event_id(last_event_id)
        return ServerSentEvent(event_messages(server_state.backend.events(after), after, server_state.draining))


def _preload_stream(
    request: Request[Any, Any, Any], server_state: ServerState, spec: ModelSpec, wanted: PreloadRequest
) -> AsyncIterator[ServerSentEventMessage]:
    async def own_events() -> AsyncIterator[Event]:
        async for event in server_state.backend.events():
            if event.model_id == spec.model_id:
                yield event

    async def preload() -> ModelSlots:
        await server_state.backend.preload(spec.model_id, pin=wanted.pin, wait=True, host_id=wanted.host)
        return _model_slots(server_state, spec)

    return preload_messages(request, own_events(), preload)


def _model_slots(server_state: ServerState, spec: ModelSpec) -> ModelSlots:
    slots = slots_by_model(server_state)[spec.model_id]
    return ModelSlots(**structs.asdict(slots[0]), slots=slots)


def _device(host: HostSnapshot) -> DeviceMemory:
    return DeviceMemory(**{name: getattr(host, name) for name in DeviceMemory.__struct_fields__})
