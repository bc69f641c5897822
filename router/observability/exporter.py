"""What `GET /metrics` answers: the counted values, and states and bytes as the hosts' snapshots have them now."""

from collections.abc import Iterable, Iterator, Sequence

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
    """The server at one moment. `faults`: host ids whose device is down. `now_s`: Unix time."""

    hosts: Sequence[HostSnapshot]
    faults: frozenset[str]
    is_ready: bool
    version: str
    now_s: float
    is_limit_storage_up: bool = True


class MetricsExporter:
    """One answer. Nothing in it belongs to the event loop, so that it can be written on a thread."""

    def __init__(self, meters: MetricsRecorder, reading: ServerSample) -> None:
        self._meters = meters
        self._reading = reading

    def text(self, accept: str) -> tuple[bytes, str]:
        """The body and its content type, in the format that suits the `Accept` header."""
        try:
            encode, content_type = choose_encoder(accept)
        except (TypeError, ValueError):  # prometheus-client compares versions that are none
            encode, content_type = choose_encoder("")
        return encode(self), content_type

    def collect(self) -> Iterator[Family]:
        """All families, as prometheus-client wants them."""
        yield from self._meters.registry.collect()
        read = [metric for metric in metrics.ALL if metric in metrics.READ_AT_SCRAPE]
        families = {metric: GaugeMetricFamily(metric.name, metric.meaning, labels=metric.labels) for metric in read}
        for metric, labels, value in samples(self._reading):
            families[metric].add_metric(labels, value)
        yield from families.values()


def samples(reading: ServerSample) -> Iterator[tuple[Metric, tuple[str, ...], float]]:
    """Every value that is read at a scrape, with its labels."""
    yield metrics.BUILD_INFO, (reading.version,), 1.0
    yield metrics.READY, (), float(reading.is_ready)
    yield metrics.LIMIT_STORAGE_UP, (), float(reading.is_limit_storage_up)
    for host in reading.hosts:
        yield metrics.DEVICE_UP, (host.host_id,), float(host.host_id not in reading.faults)
        yield from _of_host(host, reading.now_s)
        for model in host.models:
            yield from _of_model(model)


def _of_host(host: HostSnapshot, now_s: float) -> Iterator[tuple[Metric, tuple[str, ...], float]]:
    for metric, value in (
        (metrics.RESIDENTS, len(host.residents)),
        (metrics.USED_BYTES, host.used_bytes),
        (metrics.WORKSPACE_BYTES, host.workspace_bytes),
        (metrics.FREE_BYTES, host.free_bytes),
        (metrics.BUDGET_BYTES, host.budget_bytes),
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
    """Weights of all models used lately, in memory or not, and the largest workspace beside them."""
    recent = [model for model in host.models if _is_recent(model, now_s)]
    return sum(model.need_bytes for model in recent) + _largest_workspace(recent)


def _is_recent(model: ModelStatus, now_s: float) -> bool:
    in_use = model.leases + model.waiters > 0
    return in_use or (model.last_used_at is not None and now_s - model.last_used_at <= _RECENT_S)


def _largest_workspace(models: Iterable[ModelStatus]) -> int:
    return max((model.workspace_bytes for model in models), default=0)
