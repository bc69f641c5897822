"""`MetricsRecorder`: holds the recorded metrics. Fed with requests when they end, and with events of the hosts.

Nothing else in the server counts: measurements come back with results and events, and are recorded here.
"""

from bisect import bisect_left
from collections.abc import AsyncIterator, Iterator
from itertools import accumulate
from typing import Any

from litestar.connection import ASGIConnection
from prometheus_client import CollectorRegistry, Counter, Gauge, disable_created_metrics
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

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

disable_created_metrics()  # type: ignore[no-untyped-call]  # a second, unused series for each counter


class Distribution:
    """Counts values by the bucket of a histogram that they fall in.

    Recorded by one thread; another may read it. prometheus-client's own histogram takes two locks and nine calls a
    value: a warm request records nine values, which took 8 % of the event loop's time.

    Args:
        bounds: upper bounds of the buckets, rising; values above the last are counted in one more.
    """

    __slots__ = ("_bounds", "_counts", "_total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._total = 0.0

    def observe(self, value: float) -> None:
        """Add a value; a bucket includes its upper bound."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._total += value

    def add_to(self, family: HistogramMetricFamily, labels: tuple[str, ...]) -> None:
        """Add the cumulative counts and the sum to a family."""
        names = [_bound_name(bound) for bound in (*self._bounds, float("inf"))]
        counts = accumulate(list(self._counts))
        family.add_metric(labels, list(zip(names, map(float, counts), strict=True)), self._total)


def _bound_name(bound: float) -> str:
    name: str = floatToGoString(bound)  # type: ignore[no-untyped-call]  # the library has no types for it
    return name


class Histograms(Collector):
    """Holds the distributions of all histograms of a server, by metric and labels."""

    def __init__(self) -> None:
        self._found: dict[Metric, dict[tuple[str, ...], Distribution]] = {
            metric: {} if metric.labels else {(): Distribution(metric.buckets)}
            for metric in metrics.ALL
            if metric.kind == "histogram"
        }

    def observe(self, metric: Metric, labels: tuple[str, ...], value: float) -> None:
        """Add a value."""
        of_metric = self._found[metric]
        distribution = of_metric.get(labels)
        if distribution is None:
            distribution = of_metric[labels] = Distribution(metric.buckets)
        distribution.observe(value)

    def collect(self) -> Iterator[HistogramMetricFamily]:
        """Yield each histogram with all its labels."""
        for metric, of_metric in self._found.items():
            family = HistogramMetricFamily(metric.name, metric.meaning, labels=metric.labels)
            for labels, distribution in list(of_metric.items()):
                distribution.add_to(family, labels)
            yield family


class MetricsRecorder:
    """Holds one server's values in `registry`, together with those of the process (memory, CPU, open files)."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._counters = {
            metric: Counter(metric.name, metric.meaning, metric.labels, registry=self.registry)
            for metric in metrics.ALL
            if metric.kind == "counter"
        }
        self._histograms = Histograms()
        self.registry.register(self._histograms)
        self.in_flight = Gauge(metrics.IN_FLIGHT.name, metrics.IN_FLIGHT.meaning, registry=self.registry)
        self._children: dict[tuple[Metric, tuple[str, ...]], Counter] = {}

    def add(self, metric: Metric, *labels: str, amount: float = 1.0) -> None:
        """Increment a counter; `labels` in the order of the declaration.

        The counter of these labels is cached: prometheus-client takes a lock and several calls per lookup.
        """
        child = self._children.get((metric, labels))
        if child is None:
            child = self._children[metric, labels] = self._counters[metric].labels(*labels)
        child.inc(amount)

    def observe(self, metric: Metric, *labels: str, value: float) -> None:
        """Add a value to a histogram; `labels` in the order of the declaration."""
        self._histograms.observe(metric, labels, value)

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
        labels = (model,)
        for stage in stages:
            metric = _STAGES.get(stage.name)
            if metric is not None:
                self._histograms.observe(metric, labels, stage.seconds)

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
        """Record an event. Five cases: 1. download progress  2. loaded or woken  3. evicted, also when it is parked
        4. a failure  5. none of these."""
        if event.kind == "progress":
            self._count_download(event)  # (1)
            return
        self._track_fetch(event)
        model, step = event.model_id, (event.source, event.target)
        if step == ("warming", "ready"):
            self._count_load(event)  # (2)
        elif step == ("waking", "ready"):
            self._recorder.add(metrics.WAKES, model, event.host_id)
            self._recorder.observe(metrics.WAKE_SECONDS, model, value=event.seconds)
        elif step in (("draining", "unloading"), ("draining", "parking")):
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
