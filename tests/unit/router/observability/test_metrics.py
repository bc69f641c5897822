"""`GET /metrics`: values, labels and access."""

import subprocess
import sys
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs
from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics, generate_latest
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics

from engines.errors import LoadFailed, ModelLoading, QueueFull
from engines.types import Batch, Embeddings, Timings
from router.config.settings import Settings
from router.observability import metrics
from router.observability.recorder import MetricsRecorder
from router.observability.request_context import RequestContext
from tests.testkit.exposition import Exposition
from tests.testkit.servers import Served, serve

EMBED = "/v1/embeddings"
ANSWER = Embeddings(
    vectors=b"", dimensions=8, token_counts=(3, 5), truncated=(1,),
    timings=Timings(load_s=2.0, tokenize_s=0.003, queue_s=0.02, forward_s=0.3),
    batches=(Batch(texts=2, tokens=8, computed_tokens=10), Batch(texts=40, tokens=300, computed_tokens=300)),
    deduplicated=1, cache_hits=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def keyed() -> Iterator[Served]:
    yield from serve(Settings(host="0.0.0.0", api_key="embed-key", admin_api_key="admin-key"))


def scrape(served: Served, key: str = "") -> Exposition:
    answer = served.client.get("/metrics", headers={"authorization": f"Bearer {key}"} if key else {})
    assert answer.status_code == 200
    return Exposition(answer.text)


def count(served: Served, model: str, status: int, code: str) -> float:
    labels = {"route": EMBED, "model": model, "status": str(status), "code": code}
    return scrape(served)("embedyard_requests_total", **labels)


def test_every_declared_metric_is_exposed_and_no_other(served: Served) -> None:
    families = scrape(served).families
    declared = {metric.name.removesuffix("_total"): metric for metric in metrics.ALL}

    assert {name for name in families if name.startswith("embedyard_")} == set(declared)
    for name, metric in declared.items():
        assert families[name].type == metric.kind
        assert families[name].documentation == metric.meaning
    assert "process_resident_memory_bytes" in families


def test_names_follow_the_conventions() -> None:
    for metric in metrics.ALL:
        assert metric.name.startswith("embedyard_")
        assert (metric.kind == "counter") == metric.name.endswith("_total")
        assert bool(metric.buckets) == (metric.kind == "histogram")
        assert list(metric.buckets) == sorted(metric.buckets)
        assert not metric.name.endswith(("_ms", "_kb", "_mb"))
    assert len({metric.name for metric in metrics.ALL}) == len(metrics.ALL)
    assert (metrics.FORWARD_SECONDS.buckets[0], metrics.FORWARD_SECONDS.buckets[-1]) == (0.0005, 60.0)


def test_a_request_is_counted_by_model_status_and_code(served: Served) -> None:
    before = count(served, "BAAI/bge-m3", 200, "ok"), count(served, "mini", 400, "empty_input")
    served.client.post(EMBED, json={"input": "a", "model": "org/deep/alias"})
    served.client.post(EMBED, json={"input": "a", "model": "BAAI/bge-m3"})
    served.client.post(EMBED, json={"input": "", "model": "mini"})

    assert count(served, "BAAI/bge-m3", 200, "ok") == before[0] + 2
    assert count(served, "mini", 400, "empty_input") + count(served, "", 400, "empty_input") == before[1] + 1


def test_what_a_client_types_never_becomes_a_label(served: Served) -> None:
    served.client.post(EMBED, json={"input": "a", "model": "evil-1"})
    served.client.get("/v1/models/evil-2")
    served.client.get("/evil-3")
    served.client.request("EVIL", "/v1/models")
    exposition = scrape(served)

    assert not any(
        "evil" in value.lower() for label in ("model", "route", "code") for value in exposition.label_values(label)
    )
    assert exposition("embedyard_requests_total", route=EMBED, model="", status="404", code="model_not_found") >= 1
    assert exposition("embedyard_requests_total", route="other", model="", status="404", code="not_found") >= 1


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (QueueFull("full"), 429, "queue_full"),
        (ModelLoading("soon"), 503, "model_loading"),
        (LoadFailed("no"), 503, "model_load_failed"),
    ],
)
def test_refusals_are_counted_by_reason(served: Served, error: Exception, status: int, reason: str) -> None:
    served.backend.failures["mini"] = error
    before = scrape(served)("embedyard_rejected_total", model="mini", reason=reason)
    answer = served.client.post(EMBED, json={"input": "a"})

    assert answer.status_code == status
    assert scrape(served)("embedyard_rejected_total", model="mini", reason=reason) == before + 1


def test_a_probe_that_fails_is_no_refused_request(served: Served) -> None:
    served.backend.is_draining = True
    served.client.get("/ready")

    assert scrape(served)("embedyard_rejected_total", model="", reason="shutting_down") == 0
    assert scrape(served)("embedyard_ready") == 0


def test_states_and_bytes_are_those_of_the_snapshot(served: Served) -> None:
    exposition = scrape(served)

    assert exposition("embedyard_ready") == 1
    assert exposition("embedyard_device_up", host="cpu") == 1
    assert exposition("embedyard_budget_bytes", host="cpu") == 800
    assert exposition("embedyard_used_bytes", host="cpu") == 300
    assert exposition("embedyard_model_state", model="mini", host="cpu", state="ready") == 1
    assert exposition("embedyard_model_bytes", model="mini", host="cpu") == 200
    assert exposition("embedyard_resident_models", host="cpu") == 2


def test_only_admins_read_it_from_elsewhere(keyed: Served) -> None:
    without, embed = (
        keyed.client.get("/metrics"),
        keyed.client.get("/metrics", headers={"authorization": "Bearer embed-key"}),
    )

    assert (without.status_code, without.json()["error"]["code"]) == (401, "invalid_api_key")
    assert (embed.status_code, embed.json()["error"]["code"]) == (403, "insufficient_scope")
    assert scrape(keyed, "admin-key")("embedyard_device_up", host="cpu") == 1


def test_prometheus_may_ask_for_openmetrics(served: Served) -> None:
    answer = served.client.get("/metrics", headers={"accept": "application/openmetrics-text; version=1.0.0"})

    assert answer.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0; ")
    assert served.client.get("/metrics").headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert answer.text.endswith("# EOF\n")


@pytest.mark.parametrize("kind", ["application/openmetrics-text", "text/plain"])
@pytest.mark.parametrize("version", ["x", "9" * 5000, "1.0.0-rc", "..", "1.x.0", ""], ids=lambda version: version[:8])
def test_an_odd_version_gets_some_format(served: Served, kind: str, version: str) -> None:
    answer = served.client.get("/metrics", headers={"accept": f"{kind}; version={version}; escaping=odd"})

    assert answer.status_code == 200
    assert "embedyard_requests" in answer.text


def ended_request(status: int, answer: Embeddings | None = ANSWER) -> RequestContext:
    async def send(message: object) -> None:
        raise NotImplementedError

    ended = RequestContext({"type": "http", "headers": [], "path": EMBED, "method": "POST"}, send)  # type: ignore[typeddict-item]  # what a ended_request reads of a scope
    ended.status, ended.model = status, "mini"
    if answer is not None:
        ended.record_result(answer, ended.began_s)
    ended.finish()
    return ended


def recorded(*visits: RequestContext) -> Exposition:
    recorder = MetricsRecorder()
    for ended in visits:
        recorder.record(ended)
    return Exposition(generate_latest(recorder.registry).decode())


@given(st.lists(st.one_of(st.floats(0, 100), st.sampled_from(metrics.QUEUE_SECONDS.buckets))))
def test_a_histogram_reads_as_that_of_prometheus_client(seconds: list[float]) -> None:
    disable_created_metrics()  # type: ignore[no-untyped-call]  # a second, unused series
    metric, recorder, registry = metrics.QUEUE_SECONDS, MetricsRecorder(), CollectorRegistry()
    reference = Histogram(metric.name, metric.meaning, metric.labels, buckets=metric.buckets, registry=registry)
    for value in seconds:
        recorder.observe(metric, "mini", value=value)
        reference.labels("mini").observe(value)

    for write in (generate_latest, generate_openmetrics):
        lines = write(recorder.registry).decode().splitlines()
        written = [line for line in lines if f"{metric.name}" in line]
        assert written == [line for line in write(registry).decode().splitlines() if f"{metric.name}" in line]


@given(st.lists(st.tuples(st.sampled_from(["mini", 'with "quotes"']), st.integers(0, 100))))
def test_a_counter_reads_as_that_of_prometheus_client(amounts: list[tuple[str, int]]) -> None:
    disable_created_metrics()  # type: ignore[no-untyped-call]  # a second, unused series
    metric, recorder, registry = metrics.PROMPT_TOKENS, MetricsRecorder(), CollectorRegistry()
    reference = Counter(metric.name, metric.meaning, metric.labels, registry=registry)
    for model, amount in amounts:
        recorder.add(metric, model, amount=amount)
        reference.labels(model).inc(amount)

    for write in (generate_latest, generate_openmetrics):
        name = metric.name.removesuffix("_total")
        written = [line for line in write(recorder.registry).decode().splitlines() if name in line]
        assert written == [line for line in write(registry).decode().splitlines() if name in line]


def test_an_answer_is_measured_part_by_part() -> None:
    exposition = recorded(ended_request(200), ended_request(200))

    for name, seconds in [("load_wait", 2.0), ("tokenize", 0.003), ("queue", 0.02), ("forward", 0.3)]:
        assert exposition(f"embedyard_{name}_seconds_sum", model="mini") == pytest.approx(2 * seconds)
        assert exposition(f"embedyard_{name}_seconds_count", model="mini") == 2
    assert exposition("embedyard_request_seconds_count", model="mini") == 2
    assert exposition("embedyard_inputs_total", model="mini") == 4
    assert exposition("embedyard_prompt_tokens_total", model="mini") == 16
    assert exposition("embedyard_truncated_inputs_total", model="mini") == 2
    assert exposition("embedyard_reused_inputs_total", model="mini") == 2
    assert exposition("embedyard_cached_inputs_total", model="mini") == 4


def test_batches_are_measured_with_their_padding() -> None:
    exposition = recorded(ended_request(200))

    assert exposition("embedyard_batch_texts_sum", model="mini") == 42
    assert exposition("embedyard_batch_tokens_sum", model="mini") == 308
    assert exposition("embedyard_packing_efficiency_ratio_bucket", model="mini", le="0.8") == 1
    assert exposition("embedyard_packing_efficiency_ratio_sum", model="mini") == pytest.approx(1.8)


def test_a_failed_request_is_counted_and_not_timed() -> None:
    exposition = recorded(ended_request(499), ended_request(500, None))

    assert exposition("embedyard_request_seconds_count", model="mini") == 0
    assert (
        exposition("embedyard_requests_total", route="other", model="mini", status="499", code="client_closed_request")
        == 1
    )


def test_an_answer_without_batches_of_its_own_adds_none() -> None:
    exposition = recorded(ended_request(200, structs.replace(ANSWER, batches=())))

    assert exposition("embedyard_batch_texts_count", model="mini") == 0


def test_the_module_prints_the_readmes_table() -> None:
    printed = subprocess.run(
        [sys.executable, "-m", "router.observability.metrics"], capture_output=True, text=True, check=True
    ).stdout.splitlines()

    assert len(printed) == len(metrics.ALL) + 2
    assert printed[2].startswith("| `embedyard_requests_total` | counter | `route` `model` `status` `code` |")
