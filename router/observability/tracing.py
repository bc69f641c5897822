"""Traces: one span for each request and one for each of its parts, made from the visit when it has ended.

Nothing below the edge knows of tracing: its times come back with the answers. A caller's W3C trace context is carried
on. OpenTelemetry's own `OTEL_*` variables say how to sample and what the service is called.
"""

import threading

from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue

from router.observability.request_context import PROBES, RequestContext, header

_SERVICE = "embedyard"
_MAX_CONTEXT_CHARS = 512
"""Of `traceparent` and of `tracestate`; W3C asks for no more. OpenTelemetry splits the latter by a pattern that takes
the square of its length on a run of spaces: 2.7 s for 64 KiB."""
_FLUSH_S = 5.0
"""How long the end of the server waits for a collector that does not answer."""


def open_traces(endpoint: str, version: str) -> "Traces":
    """Spans go to the collector at `endpoint`, by OTLP over HTTP, in batches, from a thread of their own."""
    exporter = OTLPSpanExporter(endpoint=f"{endpoint.rstrip('/')}/v1/traces")
    return Traces(BatchSpanProcessor(exporter), version)


class Traces:
    """Turns visits into spans."""

    def __init__(self, processor: SpanProcessor, version: str) -> None:
        resource = Resource.create({"service.version": version})
        if str(resource.attributes["service.name"]).startswith("unknown_service"):  # OTEL_SERVICE_NAME says nothing
            resource = resource.merge(Resource({"service.name": _SERVICE}))
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer(_SERVICE, version)
        self._propagator = TraceContextTextMapPropagator()

    def record(self, visit: RequestContext) -> None:
        """A visit that has ended; from now on it knows the id of its trace. Probes leave none."""
        if visit.route in PROBES:
            return
        given = {name: header(visit.scope, name.encode()) for name in ("traceparent", "tracestate")}
        carrier = {name: text for name, text in given.items() if len(text) <= _MAX_CONTEXT_CHARS}
        span = self._tracer.start_span(
            f"{visit.method} {visit.route}".rstrip(),
            context=self._propagator.extract(carrier),
            kind=SpanKind.SERVER,
            start_time=visit.began_ns,
            attributes=_attributes(visit),
        )
        visit.trace_id = f"{span.get_span_context().trace_id:032x}"
        if span.is_recording():
            self._record_stages(visit, span)
        if visit.status >= 500:
            span.set_status(Status(StatusCode.ERROR, visit.code))
        span.end(_ns(visit, visit.ended_s))

    def _record_stages(self, visit: RequestContext, span: trace.Span) -> None:
        inside = trace.set_span_in_context(span)
        for stage in visit.stages:
            child = self._tracer.start_span(stage.name, context=inside, start_time=_ns(visit, stage.began_s))
            child.end(_ns(visit, stage.began_s + stage.seconds))

    def close(self) -> None:
        """Send what is left; blocks, but not for long."""
        sending = threading.Thread(target=self._provider.shutdown, daemon=True)
        sending.start()
        sending.join(_FLUSH_S)


def _ns(visit: RequestContext, at_s: float) -> int:
    """A moment on the clock of the visit's stages as Unix nanoseconds; the wall clock is read once for each visit."""
    return visit.began_ns + round((at_s - visit.began_s) * 1e9)


def _attributes(visit: RequestContext) -> dict[str, AttributeValue]:
    found: dict[str, AttributeValue] = {
        "http.request.method": visit.method,
        "http.route": visit.route,
        "http.response.status_code": visit.status,
        "embedyard.request_id": visit.request_id,
        "embedyard.code": visit.code,
    }
    if visit.model:
        found["embedyard.model"] = visit.model
    if visit.key_id:
        found["embedyard.key"] = visit.key_id
    if visit.answer is not None:
        found["embedyard.inputs"] = len(visit.answer.token_counts)
        found["embedyard.tokens"] = sum(visit.answer.token_counts)
    return found
