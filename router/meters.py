"""The values of the metrics that are counted: from visits when they end, and from the events of the hosts.

Nothing else in the server counts: what is measured below comes back with answers and events, and ends here.
"""

from collections.abc import Callable
from typing import TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics
from prometheus_client.process_collector import ProcessCollector

from engines.records import Batch, Embeddings
from router import metrics
from router.metrics import Metric
from router.visit import PROBES, Stage, Visit

_REFUSALS = (429, 503)
_STAGES = {
    "lease": metrics.LOAD_WAIT_SECONDS,
    "tokenize": metrics.TOKENIZE_SECONDS,
    "queue": metrics.QUEUE_SECONDS,
    "forward": metrics.FORWARD_SECONDS,
    "encode": metrics.ENCODE_SECONDS,
}
Child = TypeVar("Child")

disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series for each counter, of no use here


class Meters:
    """One server's values. `registry` holds them, and those of the process (memory, CPU, open files)."""

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
        """Count; `labels` in the order of the declaration."""
        self._child(metric, labels, self._counters[metric].labels).inc(amount)

    def observe(self, metric: Metric, *labels: str, value: float) -> None:
        """One value of a histogram."""
        if labels:
            self._child(metric, labels, self._histograms[metric].labels).observe(value)
        else:
            self._histograms[metric].observe(value)

    def record(self, visit: Visit) -> None:
        """A visit that has ended."""
        self.add(metrics.REQUESTS, visit.route or "other", visit.model, str(visit.status), visit.code)
        if visit.status in _REFUSALS and visit.route not in PROBES:
            self.add(metrics.REJECTED, visit.model, visit.code)
        if visit.answer is not None and visit.status == 200:
            self.observe(metrics.REQUEST_SECONDS, visit.model, value=visit.seconds)
            self._record_stages(visit.model, visit.stages)
            self._record_answer(visit.model, visit.answer)

    def _record_stages(self, model: str, stages: list[Stage]) -> None:
        for stage in stages:
            metric = _STAGES.get(stage.name)
            if metric is not None:
                self.observe(metric, model, value=stage.seconds)

    def _record_answer(self, model: str, answer: Embeddings) -> None:
        self.add(metrics.INPUTS, model, amount=len(answer.token_counts))
        self.add(metrics.PROMPT_TOKENS, model, amount=sum(answer.token_counts))
        if answer.truncated:
            self.add(metrics.TRUNCATED, model, amount=len(answer.truncated))
        if answer.reused:
            self.add(metrics.REUSED, model, amount=answer.reused)
        if answer.recalled:
            self.add(metrics.CACHED, model, amount=answer.recalled)
        for batch in answer.batches:
            self._record_batch(model, batch)

    def _record_batch(self, model: str, batch: Batch) -> None:
        self.observe(metrics.BATCH_TEXTS, model, value=batch.texts)
        self.observe(metrics.BATCH_TOKENS, model, value=batch.tokens)
        self.observe(metrics.PACKING, model, value=batch.tokens / max(1, batch.computed_tokens))

    def _child(self, metric: Metric, labels: tuple[str, ...], make: Callable[..., Child]) -> Child:
        """The values under these labels, looked up once: prometheus-client takes a lock and several calls to."""
        child = self._children.get((metric, labels))
        if child is None:
            child = self._children[metric, labels] = make(*labels)
        return child  # type: ignore[return-value]  # a metric has children of one type
