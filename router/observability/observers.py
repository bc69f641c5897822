"""`Observers`: passes every request to metrics, traffic, log and traces, once, when it has ended."""

import asyncio
from typing import Protocol

from router.config.settings import Settings, SettingsError
from router.observability.logs import log_request
from router.observability.recorder import MetricsRecorder
from router.observability.request_context import RequestContext
from router.observability.traffic import Traffic
from router.version import embedyard_version

_NOT_INSTALLED = (
    "OTEL_EXPORTER_OTLP_ENDPOINT is set, but OpenTelemetry is not installed: pip install 'embedyard[otel]', or unset it"
)


class TraceRecorder(Protocol):
    """The interface of `Traces`; a protocol, because OpenTelemetry is optional."""

    def record(self, context: RequestContext) -> None:
        """Export a request that has ended."""

    def close(self) -> None:
        """Send what is left; may block for seconds."""


def open_observers(settings: Settings, recorder: MetricsRecorder, traffic: Traffic) -> "Observers":
    """Create the observers; with traces when the settings name a collector.

    Raises:
        SettingsError: a collector is set, but OpenTelemetry is not installed.
    """
    if settings.otlp_endpoint is None:
        return Observers(recorder, traffic)
    try:
        from router.observability.tracing import open_traces
    except ImportError as error:
        raise SettingsError((_NOT_INSTALLED,)) from error
    return Observers(recorder, traffic, open_traces(settings.otlp_endpoint, embedyard_version()))


class Observers:
    """Calls all observers."""

    def __init__(self, recorder: MetricsRecorder, traffic: Traffic, traces: TraceRecorder | None = None) -> None:
        self._recorder = recorder
        self._traffic = traffic
        self._traces = traces

    async def aclose(self) -> None:
        """Send the remaining traces."""
        if self._traces is not None:
            await asyncio.to_thread(self._traces.close)

    def begin(self, context: RequestContext) -> None:
        """Count a request as in flight."""
        self._recorder.in_flight.inc()

    def end(self, context: RequestContext) -> None:
        """Record a request that was answered, or whose client has disconnected."""
        self._recorder.in_flight.dec()
        if self._traces is not None:
            self._traces.record(context)
        log_request(context)
        self._recorder.record(context)
        self._traffic.record(context)
