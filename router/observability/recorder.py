"""`MetricsRecorder`: holds the recorded metrics. Fed with requests when they end, and with events of the hosts.

Nothing else in the server counts: measurements come back with results and events, and are recorded here.
"""

from collections.abc import AsyncIterator, Callable
from typing import Any, TypeVar

from litestar.connection import ASGIConnection
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics
from prometheus_client.process_collector import ProcessCollector

from engines.types import BaseResult, Batch, Event
from router.observability import metrics
from router.observability.metrics import Metric
from router.observability.request_context import PROBES, RequestContext, Stage

_REFUSALS = (429, 503)

_STAGES = {
    "lease": metrics.LOAD_WAIT_SECONDS,
    "tokenize": metrics.TOKENIZE_SECONDS,
    "queue": metrics.QUEUE_SECONDS,
    "forward": metrics.FORWARD_SECONDS,
    "encode": metrics.ENCODE_SECONDS,
}

Child = TypeVar("Child")

disable_created_metrics()  # type: ignore[no-untyped-call]  # a second, unused series for each counter


class MetricsRecorder:
    """Holds one server's values in `registry`, together with those of the process (memory, CPU, open files)."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._counters: dict[Metric, Counter] = {}
        self._histograms: dict[Metric, Histogram] = {}
        for metric in metrics.ALL:
            if metric.kind == "counter":
                self._counters[metric] = Counter(metric.name, metric.meaning, metric.labels, registry=self.registry)
            elif metric.kind == "histogram":
                self._histograms[metric] = Histogram(
                    metric.name, metric.meaning, metric.labels, buckets=metric.buckets, registry=self.registry
                )
        self.in_flight = Gauge(metrics.IN_FLIGHT.name, metrics.IN_FLIGHT.meaning, registry=self.registry)
        self._children: dict[tuple[Metric, tuple[str, ...]], object] = {}

    def add(self, metric: Metric, *labels: str, amount: float = 1.0) -> None:
        """Increment a counter; `labels` in the order of the declaration."""
        self._child(metric, labels, self._counters[metric].labels).inc(amount)

    def observe(self, metric: Metric, *labels: str, value: float) -> None:
        """Add a value to a histogram."""
        if labels:
            self._child(metric, labels, self._histograms[metric].labels).observe(value)
        else:
            self._histograms[metric].observe(value)

    def record(self, context: RequestContext) -> None:
        """Record a request that has ended."""
        self.add(metrics.REQUESTS, context.route or "other", context.model, str(context.status), context.code)
        if context.status in _REFUSALS and context.route not in PROBES:
            self.add(metrics.REJECTED, context.model, context.code)
        if context.answer is not None and context.status == 200:
            self.observe(metrics.REQUEST_SECONDS, context.model, value=context.seconds)
            self._record_stages(context.model, context.stages)
            self._record_result(context.model, context.answer)

    def _record_stages(self, model: str, stages: list[Stage]) -> None:
        for stage in stages:
            metric = _STAGES.get(stage.name)
            if metric is not None:
                self.observe(metric, model, value=stage.seconds)

    def _record_result(self, model: str, result: BaseResult) -> None:
        self.add(metrics.INPUTS, model, amount=len(result.token_counts))
        self.add(metrics.PROMPT_TOKENS, model, amount=sum(result.token_counts))
        if result.truncated:
            self.add(metrics.TRUNCATED, model, amount=len(result.truncated))
        if result.deduplicated:
            self.add(metrics.REUSED, model, amount=result.deduplicated)
        if result.cache_hits:
            self.add(metrics.CACHED, model, amount=result.cache_hits)
        for batch in result.batches:
            self._record_batch(model, batch)

    def _record_batch(self, model: str, batch: Batch) -> None:
        self.observe(metrics.BATCH_TEXTS, model, value=batch.texts)
        self.observe(metrics.BATCH_TOKENS, model, value=batch.tokens)
        self.observe(metrics.PACKING, model, value=batch.tokens / max(1, batch.computed_tokens))

    def _child(self, metric: Metric, labels: tuple[str, ...], make: Callable[..., Child]) -> Child:
        """Return the values of these labels. Cached: prometheus-client takes a lock and several calls per lookup."""
        child = self._children.get((metric, labels))
        if child is None:
            child = self._children[metric, labels] = make(*labels)
        return child  # type: ignore[return-value]  # a metric has children of one type


class EventMetrics:
    """Records metrics from events."""

    def __init__(self, recorder: MetricsRecorder) -> None:
        self._recorder = recorder
        self._fetched_bytes: dict[str, int] = {}
        self._fetching: dict[str, set[str]] = {}

    async def follow(self, events: AsyncIterator[Event]) -> None:
        """Record events until the stream ends."""
        async for event in events:
            self.count(event)

    def count(self, event: Event) -> None:
        """Record an event. Five cases: 1. download progress  2. loaded  3. evicted  4. a failure  5. none of these."""
        if event.kind == "progress":
            self._count_download(event)  # (1)
            return
        self._track_fetch(event)
        model, step = event.model_id, (event.source, event.target)
        if step == ("warming", "ready"):
            self._count_load(event)  # (2)
        elif step == ("draining", "unloading"):
            self._recorder.add(metrics.EVICTIONS, model, event.reason)  # (3)
            self._recorder.observe(metrics.EVICTION_AGE_SECONDS, model, value=event.seconds)
        elif event.reason:
            self._recorder.add(metrics.LOAD_FAILURES, model, event.reason)  # (4)
        if event.missing_bytes and event.claimant is not None:
            self._recorder.add(metrics.TURNS, event.claimant)

    def _count_load(self, event: Event) -> None:
        self._recorder.add(metrics.LOADS, event.model_id, event.host_id)
        self._recorder.observe(metrics.LOAD_SECONDS, event.model_id, value=event.seconds)
        if event.estimated_bytes:
            ratio = event.measured_bytes / event.estimated_bytes
            self._recorder.observe(metrics.ESTIMATE_RATIO, event.model_id, value=ratio)

    def _track_fetch(self, event: Event) -> None:
        """Track which hosts fetch a model. They share a download, and each reports it; it ends with the last."""
        hosts = self._fetching.setdefault(event.model_id, set())
        if event.target == "fetching":
            hosts.add(event.host_id)
        elif event.source == "fetching":
            hosts.discard(event.host_id)
        if not hosts:
            self._fetched_bytes.pop(event.model_id, None)

    def _count_download(self, event: Event) -> None:
        counted_bytes = self._fetched_bytes.get(event.model_id, 0)
        if event.done_bytes > counted_bytes:
            self._recorder.add(metrics.DOWNLOAD_BYTES, event.model_id, amount=event.done_bytes - counted_bytes)
            self._fetched_bytes[event.model_id] = event.done_bytes


def recorder_of(connection: ASGIConnection[Any, Any, Any, Any]) -> MetricsRecorder:
    """Return the metrics of the server that a connection belongs to."""
    recorder: MetricsRecorder = connection.app.state.recorder
    return recorder
