"""`Observers`: passes every request to metrics, traffic, log and traces, once, when it has ended."""

import asyncio
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from engines.types import HostSnapshot
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
    """The interface of `Traces`, because OpenTelemetry is optional, and of `ReplayTrace`."""

    def record(self, context: RequestContext) -> None:
        """Record a request that has ended."""

    def close(self) -> None:
        """Send or write what is left; may block for seconds."""


def open_observers(
    settings: Settings, recorder: MetricsRecorder, traffic: Traffic, snapshots: Callable[[], Iterable[HostSnapshot]]
) -> "Observers":
    """Create the observers; with traces when the settings name a collector, or a file to replay from.

    Args:
        snapshots: of the hosts.

    Raises:
        SettingsError: a collector is set, but OpenTelemetry is not installed; or the file cannot be written.
    """
    recorders: list[TraceRecorder] = []
    if settings.otlp_endpoint is not None:
        try:
            from router.observability.tracing import open_traces
        except ImportError as error:
            raise SettingsError((_NOT_INSTALLED,)) from error
        recorders.append(open_traces(settings.otlp_endpoint, embedyard_version()))
    if settings.replay_trace is not None:
        from router.observability.replay_trace import ReplayTrace  # late: few servers write one

        try:
            recorders.append(ReplayTrace(settings.replay_trace, snapshots))
        except OSError as error:
            raise SettingsError((f"REPLAY_TRACE cannot be written: {error.strerror}",)) from error
    return Observers(recorder, traffic, recorders)


class Observers:
    """Calls all observers."""

    def __init__(self, recorder: MetricsRecorder, traffic: Traffic, traces: Sequence[TraceRecorder] = ()) -> None:
        self._recorder = recorder
        self._traffic = traffic
        self._traces = traces

    async def aclose(self) -> None:
        """Send and write the remaining traces."""
        for traces in self._traces:
            await asyncio.to_thread(traces.close)

    def begin(self, context: RequestContext) -> None:
        """Count a request as in flight."""
        self._recorder.values.num_in_flight += 1

    def end(self, context: RequestContext) -> None:
        """Record a request that was answered, or whose client has disconnected."""
        self._recorder.values.num_in_flight -= 1
        for traces in self._traces:
            traces.record(context)
        log_request(context)
        self._recorder.record(context)
        self._traffic.record(context)
