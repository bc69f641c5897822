"""`MetricsRecorder`: holds the recorded metrics. Fed with requests when they end, and with events of the hosts.

Nothing else in the server counts: measurements come back with results and events, and are recorded here.
"""

from bisect import bisect_left
from collections.abc import AsyncIterator, Iterator
from itertools import accumulate
from typing import Any

from litestar.connection import ASGIConnection
from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from engines.types import BaseResult, Batch, Event
from router.observability import metrics
from router.observability.metrics import Metric
from router.observability.request_context import PROBES, RequestContext

Family = CounterMetricFamily | GaugeMetricFamily | HistogramMetricFamily

_REFUSALS = (429, 503)

_STAGES = {
    "lease": metrics.LOAD_WAIT_SECONDS,
    "tokenize": metrics.TOKENIZE_SECONDS,
    "queue": metrics.QUEUE_SECONDS,
    "forward": metrics.FORWARD_SECONDS,
    "encode": metrics.ENCODE_SECONDS,
}


class Distribution:
    """Counts values by the bucket of a histogram that they fall in.

    Recorded by one thread; another may read it. prometheus-client's own histogram takes two locks and nine calls a
    value, and its counter one lock and four calls: a warm request records fourteen values.

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


class Series(dict[Metric, Distribution]):
    """The distributions of all histograms for one set of labels, each made when it is first asked for."""

    __slots__ = ()

    def __missing__(self, metric: Metric) -> Distribution:
        distribution = self[metric] = Distribution(metric.buckets)
        return distribution


class Values(Collector):
    """Holds the counters and histograms of a server, by metric and labels. One thread records; another may collect.

    Attributes:
        num_in_flight: requests inside the server now.
    """

    def __init__(self) -> None:
        self._totals: dict[Metric, dict[tuple[str, ...], float]] = {
            metric: {} if metric.labels else {(): 0.0} for metric in metrics.ALL if metric.kind == "counter"
        }
        self._histograms = [metric for metric in metrics.ALL if metric.kind == "histogram"]
        unlabelled = Series((metric, Distribution(metric.buckets)) for metric in self._histograms if not metric.labels)
        self._series: dict[tuple[str, ...], Series] = {(): unlabelled}
        self.num_in_flight = 0

    def add(self, metric: Metric, labels: tuple[str, ...], amount: float = 1.0) -> None:
        """Increment a counter."""
        totals = self._totals[metric]
        totals[labels] = totals.get(labels, 0.0) + amount

    def series(self, labels: tuple[str, ...]) -> Series:
        """Return the distributions of these labels; histograms without labels have `()`."""
        series = self._series.get(labels)
        if series is None:
            series = self._series[labels] = Series()
        return series

    def collect(self) -> Iterator[Family]:
        """Yield each metric with all its labels."""
        for metric, totals in self._totals.items():
            counter = CounterMetricFamily(metric.name, metric.meaning, labels=metric.labels)
            for labels, total in list(totals.items()):
                counter.add_metric(labels, total)
            yield counter
        yield GaugeMetricFamily(metrics.IN_FLIGHT.name, metrics.IN_FLIGHT.meaning, value=self.num_in_flight)
        found = list(self._series.items())
        for metric in self._histograms:
            family = HistogramMetricFamily(metric.name, metric.meaning, labels=metric.labels)
            for labels, series in found:
                if (distribution := series.get(metric)) is not None:
                    distribution.add_to(family, labels)
            yield family


class MetricsRecorder:
    """Holds one server's values in `registry`, together with those of the process (memory, CPU, open files)."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.values = Values()
        self.registry.register(self.values)

    def add(self, metric: Metric, *labels: str, amount: float = 1.0) -> None:
        """Increment a counter; `labels` in the order of the declaration."""
        self.values.add(metric, labels, amount)

    def observe(self, metric: Metric, *labels: str, value: float) -> None:
        """Add a value to a histogram; `labels` in the order of the declaration."""
        self.values.series(labels)[metric].observe(value)

    def record(self, context: RequestContext) -> None:
        """Record a request that has ended."""
        route, model, values = context.route, context.model, self.values
        values.add(metrics.REQUESTS, (route or "other", model, str(context.status), context.code))
        if context.status in _REFUSALS and route not in PROBES:
            values.add(metrics.REJECTED, (model, context.code))
        if context.answer is not None and context.status == 200:
            series = values.series((model,))
            series[metrics.REQUEST_SECONDS].observe(context.seconds)
            for stage in context.stages:
                metric = _STAGES.get(stage.name)
                if metric is not None:
                    series[metric].observe(stage.seconds)
            for batch in context.answer.batches:
                _record_batch(series, batch)
            self._count_inputs((model,), context.answer)

    def _count_inputs(self, labels: tuple[str], result: BaseResult) -> None:
        values = self.values
        values.add(metrics.INPUTS, labels, len(result.token_counts))
        values.add(metrics.PROMPT_TOKENS, labels, sum(result.token_counts))
        if result.truncated:
            values.add(metrics.TRUNCATED, labels, len(result.truncated))
        if result.deduplicated:
            values.add(metrics.REUSED, labels, result.deduplicated)
        if result.cache_hits:
            values.add(metrics.CACHED, labels, result.cache_hits)


def _record_batch(series: Series, batch: Batch) -> None:
    series[metrics.BATCH_TEXTS].observe(batch.texts)
    series[metrics.BATCH_TOKENS].observe(batch.tokens)
    series[metrics.PACKING].observe(batch.tokens / max(1, batch.computed_tokens))


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
