"""`/health`, `/ready` and `/metrics`. The probes need no key."""

import asyncio
import time
from typing import Any

from litestar import Controller, Request, Response, get
from litestar.handlers import BaseRouteHandler
from litestar.openapi import ResponseSpec

from router.api.openapi import BEARER, GUARDED, failures
from router.auth.guards import Connection, is_cross_origin, requires
from router.limits.limiter import limiter_of
from router.observability.exporter import MetricsExporter, ServerSample
from router.observability.recorder import recorder_of
from router.schemas.admin import Status
from router.server.state import state_of
from router.version import embedyard_version

_TEXT = ResponseSpec(
    str, media_type="text/plain", generate_examples=False, description="Prometheus text format, or OpenMetrics"
)

_requires_admin = requires("admin")


async def _local_or_admin(connection: Connection, handler: BaseRouteHandler) -> None:
    """Require an admin key, except from programs on this machine if the server listens on loopback."""
    settings = state_of(connection).settings
    if not settings.is_loopback or is_cross_origin(connection, settings):
        await _requires_admin(connection, handler)


class MetricsController(Controller):
    """The metrics for Prometheus."""

    tags = ("health",)
    guards = (_local_or_admin,)
    security = BEARER

    @get("/metrics", responses={200: _TEXT} | failures(*GUARDED), summary="Scrape the metrics")
    async def metrics(self, request: Request[Any, Any, Any]) -> Response[bytes]:
        """Needs a key with the scope `admin`, unless the server listens on loopback."""
        server_state = state_of(request)
        sample = ServerSample(
            hosts=server_state.backend.snapshots(),
            faults=frozenset(server_state.backend.check()),
            is_ready=server_state.is_ready,
            version=embedyard_version(),
            now_s=time.time(),
            is_limit_storage_up=not limiter_of(request).store.is_down,
            batches=batches.counts if (batches := request.app.state.batches) is not None else {},
        )
        exporter = MetricsExporter(recorder_of(request), sample)
        body, content_type = await asyncio.to_thread(exporter.text, request.headers.get("accept", ""))
        if content_type.startswith("text/"):
            content_type = content_type.removesuffix("; charset=utf-8")  # Litestar adds its own
        return Response(body, media_type=content_type)


class HealthController(Controller):
    """The probes of load balancers and orchestrators."""

    tags = ("health",)

    @get("/health", responses=failures("device_down"), summary="Liveness probe")
    async def health(self, request: Request[Any, Any, Any]) -> Status:
        """Answers 200 while the process works, 503 with the reason if it must be restarted."""
        state_of(request).check_health()
        return Status(status="ok")

    @get("/ready", responses=failures("shutting_down", "device_down"), summary="Readiness probe")
    async def ready(self, request: Request[Any, Any, Any]) -> Status:
        """Answers 200 if the server takes new work, 503 while it drains or if no device works."""
        state_of(request).check_ready()
        return Status(status="ready")
