"""`/admin`: the state of models and devices, and the commands that change it."""

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

from engines.errors import ModelNotFound
from engines.spec import ModelSpec
from engines.types import HostSnapshot, Plan
from router.api.decoding import StrictRequest
from router.api.event_stream import event_messages, events_of_model, parse_last_event_id, preload_messages, wants_stream
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
    description="Events named `state` and `progress`; `data` is one event as JSON. Comments keep the connection open.",
)


class AdminController(Controller):
    """The API of operators and the dashboard."""

    path = "/admin"
    tags = ("admin",)
    guards = (requires("admin"),)
    security = BEARER
    dependencies = {"spec": Provide(provide_any_spec, sync_to_thread=False)}  # noqa: RUF012 - as Litestar types it

    @get("/models", responses=failures(*GUARDED), summary="List the slots")
    async def list_slots(self, request: Request[Any, Any, Any]) -> SlotList:
        """Lists every model on every device."""
        return SlotList(data=[slot for slots in slots_by_model(state_of(request)).values() for slot in slots])

    @get("/models/{model_id:str}", responses=failures(*GUARDED, "model_not_found"), summary="Show the slots of a model")
    async def retrieve_slots(self, request: Request[Any, Any, Any], spec: NamedDependency[ModelSpec]) -> ModelSlots:
        """Shows one model on every device."""
        return _model_slots(state_of(request), spec)

    @post(
        "/models/{model_id:str}/preload",
        status_code=200,
        request_class=StrictRequest,
        responses={
            202: ResponseSpec(
                ModelSlots, generate_examples=False, description="The load was started; the answer does not wait for it"
            )
        }
        | failures(*GUARDED, *BODY, *LOADING, "model_not_found", "not_found"),
        summary="Load a model",
    )
    async def preload(
        self,
        request: Request[Any, Any, Any],
        spec: NamedDependency[ModelSpec],
        data: JSONBody[PreloadRequest | None] = None,
    ) -> Response[ModelSlots]:
        """Loads the model where it fits best, or on the given host. The load goes on if the client does not wait.

        With `Accept: text/event-stream` the answer is a stream of this model's events as in /admin/events, followed by
        one event `done` with its slots, or one event `error` with the error envelope.
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
        summary="Evict a model",
    )
    async def evict(
        self,
        request: Request[Any, Any, Any],
        spec: NamedDependency[ModelSpec],
        data: JSONBody[EvictRequest | None] = None,
    ) -> ModelSlots:
        """Waits for running requests, then frees the model on every device."""
        server_state, wanted = state_of(request), data or EvictRequest()
        await server_state.backend.evict(spec.model_id, force=wanted.force, timeout_s=wanted.timeout, to=wanted.to)
        return _model_slots(server_state, spec)

    @post(
        "/hosts/{host_id:str}/recycle",
        status_code=200,
        responses=failures(*GUARDED, "invalid_value", "not_found", "host_lost"),
        summary="Restart a host",
    )
    async def recycle(self, request: Request[Any, Any, Any], host_id: FromPath[str]) -> Memory:
        """Finishes the host's requests, ends its process, starts a new one and loads the models that were ready.

        This frees memory that leaked. Other hosts keep serving. Answers with all devices once the new process takes
        work.
        """
        backend = state_of(request).backend
        await backend.recycle(unquote(host_id))
        return Memory(devices=[_device(host) for host in backend.snapshots()])

    @get("/memory", responses=failures(*GUARDED), summary="Show the memory of the devices")
    async def memory(self, request: Request[Any, Any, Any]) -> Memory:
        """Shows the memory of each device, and its models in eviction order."""
        return Memory(devices=[_device(host) for host in state_of(request).backend.snapshots()])

    @get("/traffic", responses=failures(*GUARDED), summary="Show the traffic of the last minute")
    async def last_minute(self, request: Request[Any, Any, Any]) -> LastMinute:
        """Shows texts, tokens and latencies of the models that answered in the last minute."""
        found = traffic_of(request).last_minute().items()
        return LastMinute(step_s=STEP_S, data=[ModelTraffic(id=name, **structs.asdict(each)) for name, each in found])

    @get("/plan", responses=failures(*GUARDED, "invalid_value", "model_not_found"), summary="Plan a load")
    async def plan(self, request: Request[Any, Any, Any], model: FromQuery[str | None] = None) -> Plan:
        """Shows what loading a model would do, without loading it. Without `model`: the default model."""
        server_state = state_of(request)
        return await server_state.backend.plan(server_state.registry.resolve(model).model_id)

    @post(
        "/registry/reload",
        status_code=200,
        responses=failures(*GUARDED, "invalid_value", "shutting_down"),
        summary="Reload the registry",
    )
    async def reload_registry(self, request: Request[Any, Any, Any]) -> Changes:
        """Applies the whole file and lists the changes, or applies nothing and lists every mistake in the file."""
        return await reloader_of(request).reload()

    @get("/events", responses={200: _EVENT_STREAM} | failures(*GUARDED), summary="Follow the events")
    async def events(
        self,
        request: Request[Any, Any, Any],
        last_event_id: Annotated[str, HeaderParameter(name="Last-Event-ID")] = "",
    ) -> ServerSentEvent:
        """Streams state changes and download progress; with `Last-Event-ID` it starts after that event."""
        server_state = state_of(request)
        after = parse_last_event_id(last_event_id)
        return ServerSentEvent(event_messages(server_state.backend.events(after), after, server_state.draining))


def _preload_stream(
    request: Request[Any, Any, Any], server_state: ServerState, spec: ModelSpec, wanted: PreloadRequest
) -> AsyncIterator[ServerSentEventMessage]:
    async def preload() -> ModelSlots:
        await server_state.backend.preload(spec.model_id, pin=wanted.pin, wait=True, host_id=wanted.host)
        return _model_slots(server_state, spec)

    return preload_messages(request, events_of_model(server_state.backend.events(), spec.model_id), preload)


def _model_slots(server_state: ServerState, spec: ModelSpec) -> ModelSlots:
    slots = slots_by_model(server_state).get(spec.model_id)
    if not slots:  # a reload has removed the model while the command ran
        raise ModelNotFound(f"model {spec.model_id!r} is no longer in the registry")
    return ModelSlots(**structs.asdict(slots[0]), slots=slots)


def _device(host: HostSnapshot) -> DeviceMemory:
    return DeviceMemory(**{name: getattr(host, name) for name in DeviceMemory.__struct_fields__})
