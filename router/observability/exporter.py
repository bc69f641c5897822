"""`MetricsExporter`: writes `GET /metrics`: recorded values, and states and bytes from the hosts' snapshots."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

from msgspec import Struct
from prometheus_client import Metric as Family
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.exposition import choose_encoder

from engines.types import HostSnapshot, ModelStatus
from router.observability import metrics
from router.observability.metrics import Metric
from router.observability.recorder import MetricsRecorder

_RECENT_S = 600.0


class ServerSample(Struct, frozen=True):
    """State of the server at one scrape.

    `faults`: host ids whose device is down. `now_s`: Unix time. `batches`: how many there are by status.
    """

    hosts: Sequence[HostSnapshot]
    faults: frozenset[str]
    is_ready: bool
    version: str
    now_s: float
    is_limit_storage_up: bool = True
    batches: Mapping[str, int] = {}


class MetricsExporter:
    """Writes one response. Touches nothing of the event loop, so that it can run on a thread."""

    def __init__(self, recorder: MetricsRecorder, sample: ServerSample) -> None:
        self._recorder = recorder
        self._sample = sample

    def text(self, accept: str) -> tuple[bytes, str]:
        """Return the body and its content type, in the format of the `Accept` header."""
        try:
            encode, content_type = choose_encoder(accept)
        except (TypeError, ValueError):  # prometheus-client fails on malformed versions
            encode, content_type = choose_encoder("")
        return encode(self), content_type

    def collect(self) -> Iterator[Family]:
        """Yield all metric families to prometheus-client."""
        yield from self._recorder.registry.collect()
        read = [metric for metric in metrics.ALL if metric in metrics.READ_AT_SCRAPE]
        families = {metric: GaugeMetricFamily(metric.name, metric.meaning, labels=metric.labels) for metric in read}
        for metric, labels, value in samples(self._sample):
            families[metric].add_metric(labels, value)
        yield from families.values()


def samples(sample: ServerSample) -> Iterator[tuple[Metric, tuple[str, ...], float]]:
    """Yield every value that is read at a scrape, with its labels."""
    yield metrics.BUILD_INFO, (sample.version,), 1.0
    yield metrics.READY, (), float(sample.is_ready)
    yield metrics.LIMIT_STORAGE_UP, (), float(sample.is_limit_storage_up)
    for status, count in sample.batches.items():
        yield metrics.BATCHES, (status,), float(count)
    for host in sample.hosts:
        yield metrics.DEVICE_UP, (host.host_id,), float(host.host_id not in sample.faults)
        yield from _of_host(host, sample.now_s)
        for model in host.models:
            yield from _of_model(model)


def _of_host(host: HostSnapshot, now_s: float) -> Iterator[tuple[Metric, tuple[str, ...], float]]:
    for metric, value in (
        (metrics.RESIDENTS, len(host.residents)),
        (metrics.USED_BYTES, host.used_bytes),
        (metrics.WORKSPACE_BYTES, host.workspace_bytes),
        (metrics.FREE_BYTES, host.free_bytes),
        (metrics.BUDGET_BYTES, host.budget_bytes),
        (metrics.HOST_USED_BYTES, host.host_used_bytes),
        (metrics.HOST_BUDGET_BYTES, host.host_budget_bytes),
        (metrics.DEVICE_BYTES, host.total_bytes),
        (metrics.WORKING_SET_BYTES, working_set_bytes(host, now_s)),
        (metrics.HOST_RESTARTS, host.restarts),
    ):
        yield metric, (host.host_id,), float(value)


def _of_model(model: ModelStatus) -> Iterator[tuple[Metric, tuple[str, ...], float]]:
    labels = (model.model_id, model.host_id)
    yield metrics.MODEL_STATE, (*labels, model.state), 1.0
    yield metrics.QUEUE_DEPTH, labels, float(model.queue_items)
    yield metrics.LEASES, labels, float(model.leases)
    yield metrics.WAITERS, labels, float(model.waiters)
    yield metrics.FALLBACK, labels, float(model.info is not None and model.info.is_fallback)
    yield metrics.MODEL_BYTES, labels, float(model.weight_bytes)


def working_set_bytes(host: HostSnapshot, now_s: float) -> int:
    """Sum the weights of all recently used models, in memory or not, and the largest workspace."""
    recent = [model for model in host.models if _is_recent(model, now_s)]
    return sum(model.need_bytes for model in recent) + _largest_workspace(recent)


def _is_recent(model: ModelStatus, now_s: float) -> bool:
    in_use = model.leases + model.waiters > 0
    return in_use or (model.last_used_at is not None and now_s - model.last_used_at <= _RECENT_S)


def _largest_workspace(models: Iterable[ModelStatus]) -> int:
    return max((model.workspace_bytes for model in models), default=0)
