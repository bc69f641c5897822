"""`Traces`: exports one span per request and one per stage, built from the request context when the request has ended.

Nothing below the API depends on tracing: its timings come back with the results. A caller's W3C trace context is
continued. OpenTelemetry's own `OTEL_*` variables set the sampling and the service name.
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
"""Maximum length of `traceparent` and of `tracestate`; W3C requires no more. OpenTelemetry splits the latter with a
pattern that is quadratic in a run of spaces: 2.7 s for 64 KiB."""
_FLUSH_S = 5.0
"""How long shutdown waits for a collector that does not respond."""


def open_traces(endpoint: str, version: str) -> "Traces":
    """Create traces that send spans to the collector at `endpoint`: OTLP over HTTP, in batches, from a thread."""
    exporter = OTLPSpanExporter(endpoint=f"{endpoint.rstrip('/')}/v1/traces")
    return Traces(BatchSpanProcessor(exporter), version)


class Traces:
    """Converts request contexts to spans."""

    def __init__(self, processor: SpanProcessor, version: str) -> None:
        resource = Resource.create({"service.version": version})
        if str(resource.attributes["service.name"]).startswith("unknown_service"):  # OTEL_SERVICE_NAME is not set
            resource = resource.merge(Resource({"service.name": _SERVICE}))
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer(_SERVICE, version)
        self._propagator = TraceContextTextMapPropagator()

    def record(self, context: RequestContext) -> None:
        """Export the spans of a request that has ended, and set its trace id. Probes are not traced."""
        if context.route in PROBES:
            return
        given = {name: header(context.scope, name.encode()) for name in ("traceparent", "tracestate")}
        trace_headers = {name: text for name, text in given.items() if len(text) <= _MAX_CONTEXT_CHARS}
        span = self._tracer.start_span(
            f"{context.method} {context.route}".rstrip(),
            context=self._propagator.extract(trace_headers),
            kind=SpanKind.SERVER,
            start_time=context.began_ns,
            attributes=_attributes(context),
        )
        context.trace_id = f"{span.get_span_context().trace_id:032x}"
        if span.is_recording():
            self._record_stages(context, span)
        if context.status >= 500:
            span.set_status(Status(StatusCode.ERROR, context.code))
        span.end(_ns(context, context.ended_s))

    def _record_stages(self, context: RequestContext, span: trace.Span) -> None:
        inside = trace.set_span_in_context(span)
        for stage in context.stages:
            child = self._tracer.start_span(stage.name, context=inside, start_time=_ns(context, stage.began_s))
            child.end(_ns(context, stage.began_s + stage.seconds))

    def close(self) -> None:
        """Send the remaining spans; blocks for a bounded time."""
        sending = threading.Thread(target=self._provider.shutdown, daemon=True)
        sending.start()
        sending.join(_FLUSH_S)


def _ns(context: RequestContext, at_s: float) -> int:
    """Convert a `perf_counter` time to Unix nanoseconds; the wall clock is read once per request."""
    return context.began_ns + round((at_s - context.began_s) * 1e9)


def _attributes(context: RequestContext) -> dict[str, AttributeValue]:
    found: dict[str, AttributeValue] = {
        "http.request.method": context.method,
        "http.route": context.route,
        "http.response.status_code": context.status,
        "embedyard.request_id": context.request_id,
        "embedyard.code": context.code,
    }
    if context.model:
        found["embedyard.model"] = context.model
    if context.key_id:
        found["embedyard.key"] = context.key_id
    if context.answer is not None:
        found["embedyard.inputs"] = len(context.answer.token_counts)
        found["embedyard.tokens"] = sum(context.answer.token_counts)
    return found
