"""Who hears of every request: metrics, traffic, log, and traces where they are on. Each is told once, at its end."""

import asyncio
from typing import Protocol

from router.config.settings import Settings, SettingsError
from router.observability.logs import log_request
from router.observability.recorder import MetricsRecorder
from router.observability.request_context import RequestContext
from router.observability.traffic import Traffic
from router.version import embedyard_version

_NOT_INSTALLED = (
    "OTEL_EXPORTER_OTLP_ENDPOINT asks for traces, but OpenTelemetry is not installed: pip install 'embedyard[otel]', "
    "or leave it out"
)


class Recorder(Protocol):
    """Traces; a protocol, because OpenTelemetry is installed only where it is wanted."""

    def record(self, visit: RequestContext) -> None:
        """A visit that has ended."""

    def close(self) -> None:
        """Send what is left; may block for some seconds."""


def open_observers(settings: Settings, meters: MetricsRecorder, traffic: Traffic) -> "Observers":
    """Traces are on when the settings name a collector.

    Raises:
        SettingsError: they do, but OpenTelemetry is not installed.
    """
    if settings.otlp_endpoint is None:
        return Observers(meters, traffic)
    try:
        from router.observability.tracing import open_traces
    except ImportError as error:
        raise SettingsError((_NOT_INSTALLED,)) from error
    return Observers(meters, traffic, open_traces(settings.otlp_endpoint, embedyard_version()))


class Observers:
    """All of them together."""

    def __init__(self, meters: MetricsRecorder, traffic: Traffic, traces: Recorder | None = None) -> None:
        self._meters = meters
        self._traffic = traffic
        self._traces = traces

    async def aclose(self) -> None:
        """What has not been sent is, unless nobody takes it."""
        if self._traces is not None:
            await asyncio.to_thread(self._traces.close)

    def begin(self, visit: RequestContext) -> None:
        """A request has come in."""
        self._meters.in_flight.inc()

    def end(self, visit: RequestContext) -> None:
        """It has been answered, or its client has left."""
        self._meters.in_flight.dec()
        if self._traces is not None:
            self._traces.record(visit)
        log_request(visit)
        self._meters.record(visit)
        self._traffic.record(visit)
