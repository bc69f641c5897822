"""Snapshots are exported as metrics."""

from engines.types import HostSnapshot, ModelInfo, ModelStatus, State
from router.observability import metrics
from router.observability.exporter import ServerSample, samples, working_set_bytes

NOW_S = 10_000.0


def model(name: str, state: State = "ready", **more: object) -> ModelStatus:
    return ModelStatus(model_id=name, state=state, host_id="cpu", device="cpu", source="s", **more)  # type: ignore[arg-type]  # fields by name


def host(*models: ModelStatus) -> HostSnapshot:
    return HostSnapshot(
        host_id="cpu", device="cpu", total_bytes=1000, budget_bytes=800, used_bytes=300, workspace_bytes=100,
        free_bytes=400, residents=("a",), models=models,
    )  # fmt: skip


def test_the_working_set_is_what_recent_traffic_wants_in_memory_or_not() -> None:
    resident = model("a", need_bytes=100, workspace_bytes=30, last_used_at=NOW_S - 10)
    evicted = model("b", "cold", need_bytes=50, last_used_at=NOW_S - 599)
    wanted = model("c", "waiting_space", need_bytes=20, waiters=1)
    forgotten = model("d", need_bytes=1000, workspace_bytes=500, last_used_at=NOW_S - 601)
    never = model("e", "cold", need_bytes=1000)

    assert working_set_bytes(host(resident, evicted, wanted, forgotten, never), NOW_S) == 100 + 50 + 20 + 30
    assert working_set_bytes(host(), NOW_S) == 0


def test_everything_read_at_a_scrape_has_a_value_with_the_declared_labels() -> None:
    reading = ServerSample(
        hosts=[host(model("a", leases=2, waiters=3, queue_items=4, weight_bytes=5))],
        faults=frozenset(), is_ready=True, version="1.2", now_s=NOW_S, batches={"completed": 2},
    )  # fmt: skip
    values = {metric: (labels, value) for metric, labels, value in samples(reading)}

    assert set(values) == set(metrics.READ_AT_SCRAPE)
    for metric, (labels, _) in values.items():
        assert len(labels) == len(metric.labels), metric.name
    assert values[metrics.LEASES] == (("a", "cpu"), 2)
    assert values[metrics.WAITERS] == (("a", "cpu"), 3)
    assert values[metrics.QUEUE_DEPTH] == (("a", "cpu"), 4)
    assert values[metrics.MODEL_BYTES] == (("a", "cpu"), 5)
    assert values[metrics.BUILD_INFO] == (("1.2",), 1)


def test_a_model_on_its_slowest_path_says_so() -> None:
    info = ModelInfo(dimensions=4, max_tokens=9, dtype="float32", attention="unpadded", is_fallback=True)
    reading = ServerSample(
        hosts=[host(model("a", info=info), model("b"))], faults=frozenset(), is_ready=True, version="1", now_s=NOW_S,
    )  # fmt: skip
    values = {labels: value for metric, labels, value in samples(reading) if metric is metrics.FALLBACK}

    assert values == {("a", "cpu"): 1, ("b", "cpu"): 0}


def test_a_device_that_is_down_says_so() -> None:
    reading = ServerSample(hosts=[host()], faults=frozenset({"cpu"}), is_ready=False, version="1", now_s=NOW_S)
    values = {metric: value for metric, _, value in samples(reading)}

    assert (values[metrics.DEVICE_UP], values[metrics.READY]) == (0, 0)
