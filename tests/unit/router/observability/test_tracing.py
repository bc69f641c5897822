"""Traces: spans of requests, the caller's context, and export to a collector."""

import queue
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from structlog.testing import capture_logs

from engines.errors import EngineFailed
from router.app import create_app
from router.config.settings import Settings, SettingsError
from tests.testkit.backends import ScriptedBackend
from tests.testkit.servers import REGISTRY, serving_in_thread

ROOT = Path(__file__).parents[4]
EMBED = "/v1/embeddings"
TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
PARENT_ID = "b7ad6b7169203331"


class Collector:
    """Receives OTLP over HTTP, as Jaeger, Tempo and the OpenTelemetry collector do."""

    def __init__(self) -> None:
        received: queue.Queue[tuple[str, bytes]] = queue.Queue()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                received.put((self.path, self.rfile.read(int(self.headers["content-length"]))))
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                """Log nothing."""

        self.received = received
        self._server = HTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def batch(self) -> ExportTraceServiceRequest:
        """Wait for the first batch."""
        path, body = self.received.get(timeout=10)
        assert path == "/v1/traces"
        request = ExportTraceServiceRequest()
        request.ParseFromString(body)
        return request

    def spans(self) -> dict[str, Span]:
        """Return the spans by name; they are sent when the test's server ends."""
        return {
            span.name: span
            for resource in self.batch().resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        }


@pytest.fixture
def collector() -> Iterator[Collector]:
    collector = Collector()
    yield collector
    collector.close()


def run_requests(collector: Collector, backend: ScriptedBackend, *requests: httpx.Request) -> list[httpx.Response]:
    """Start a server, send these requests, and stop it."""
    app = create_app(Settings(otlp_endpoint=collector.url), REGISTRY, backend)
    with serving_in_thread(app) as url, httpx.Client() as client:
        for request in requests:
            request.url = httpx.URL(url + request.url.path)
        return [client.send(request) for request in requests]


def embed(**headers: str) -> httpx.Request:
    return httpx.Request(
        "POST", f"http://localhost{EMBED}", json={"input": ["abc", "de"], "model": "mini"}, headers=headers
    )


def attributes(span: Span) -> dict[str, object]:
    return {each.key: each.value.string_value or each.value.int_value for each in span.attributes}


def test_a_request_leaves_a_span_with_its_parts_in_the_callers_trace(
    collector: Collector, backend: ScriptedBackend
) -> None:
    with capture_logs() as lines:
        run_requests(collector, backend, embed(traceparent=f"00-{TRACE_ID}-{PARENT_ID}-01", **{"x-request-id": "r-1"}))
    spans = collector.spans()
    root = spans.pop(f"POST {EMBED}")
    (line,) = [line for line in lines if line["event"] == "request.done"]

    assert root.trace_id.hex() == line["trace_id"] == TRACE_ID
    assert root.parent_span_id.hex() == PARENT_ID
    assert root.kind == Span.SpanKind.SPAN_KIND_SERVER
    assert attributes(root) == {
        "http.request.method": "POST", "http.route": EMBED, "http.response.status_code": 200,
        "embedyard.request_id": "r-1", "embedyard.code": "ok", "embedyard.model": "mini", "embedyard.inputs": 2,
        "embedyard.tokens": 5,
    }  # fmt: skip
    assert set(spans) == {"auth", "lease", "tokenize", "queue", "forward", "encode"}
    for span in spans.values():
        assert span.parent_span_id == root.span_id
        assert span.start_time_unix_nano >= root.start_time_unix_nano
    assert spans["forward"].end_time_unix_nano - spans["forward"].start_time_unix_nano == pytest.approx(30.5e6, abs=2e3)
    assert spans["queue"].start_time_unix_nano == pytest.approx(spans["tokenize"].end_time_unix_nano, abs=2e3)


def test_a_context_longer_than_any_is_not_read(collector: Collector, backend: ScriptedBackend) -> None:
    """OpenTelemetry's pattern is quadratic: 64 KiB of spaces blocked the server for seconds."""
    parent = f"00-{TRACE_ID}-{PARENT_ID}-01"
    long = ",".join(f"{key}={'1' * 200}" for key in "abc")
    models = httpx.Request("GET", "http://localhost/v1/models", headers={"traceparent": parent, "tracestate": long})
    run_requests(collector, backend, embed(traceparent=parent, tracestate="a=1"), models)
    spans = collector.spans()

    assert [spans[name].trace_state for name in (f"POST {EMBED}", "GET /v1/models")] == ["a=1", ""]
    assert spans["GET /v1/models"].trace_id.hex() == TRACE_ID


def test_a_request_without_a_context_begins_a_trace_and_its_log_line_names_it(
    collector: Collector, backend: ScriptedBackend
) -> None:
    with capture_logs() as lines:
        run_requests(collector, backend, embed(traceparent="nonsense"))
    root = collector.spans()[f"POST {EMBED}"]
    (line,) = [line for line in lines if line["event"] == "request.done"]

    assert root.parent_span_id == b""
    assert root.trace_id.hex() == line["trace_id"]


def test_a_caller_that_does_not_sample_gets_no_spans(collector: Collector, backend: ScriptedBackend) -> None:
    run_requests(collector, backend, embed(traceparent=f"00-{TRACE_ID}-{PARENT_ID}-00"), embed())

    spans = collector.batch().resource_spans[0].scope_spans[0].spans
    assert len([span for span in spans if span.name == f"POST {EMBED}"]) == 1
    assert all(span.trace_id.hex() != TRACE_ID for span in spans)


def test_a_failure_is_an_error_of_the_span(collector: Collector, backend: ScriptedBackend) -> None:
    backend.failures["mini"] = EngineFailed("it failed")
    (answer,) = run_requests(collector, backend, embed())
    root = collector.spans()[f"POST {EMBED}"]

    assert answer.status_code == 500
    assert root.status.code == 2
    assert attributes(root)["embedyard.code"] == "internal_error"


def test_probes_leave_no_trace(collector: Collector, backend: ScriptedBackend) -> None:
    run_requests(collector, backend, httpx.Request("GET", "http://localhost/health"), embed())

    assert not any("/health" in name for name in collector.spans())


def test_the_service_has_a_name(
    collector: Collector, backend: ScriptedBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OTEL_SERVICE_NAME", raising=False)
    run_requests(collector, backend, embed())
    monkeypatch.setenv("OTEL_SERVICE_NAME", "vectors")
    run_requests(collector, backend, embed())

    names = [{each.key: each.value.string_value for each in collector.batch().resource_spans[0].resource.attributes}
             for _ in range(2)]  # fmt: skip
    assert [name["service.name"] for name in names] == ["embedyard", "vectors"]
    assert names[0]["service.version"]


def test_without_a_collector_opentelemetry_is_not_even_imported() -> None:
    code = "import sys, router.app; sys.exit('opentelemetry' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_traces_without_opentelemetry_are_refused_with_the_cure(
    backend: ScriptedBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "router.observability.tracing", None)

    with pytest.raises(SettingsError, match=r"pip install 'embedyard\[otel\]'"):
        create_app(Settings(otlp_endpoint="http://localhost:4318"), REGISTRY, backend)
