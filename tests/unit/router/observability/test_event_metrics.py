"""Events are recorded as metrics."""

from collections.abc import Sequence

import pytest
from prometheus_client import generate_latest

from engines.types import Event, State
from router.observability.recorder import EventMetrics, MetricsRecorder
from tests.testkit.exposition import Exposition


def step(source: State, target: State, model: str = "m", host: str = "cpu", **more: object) -> Event:
    return Event(seq=1, time_s=0.0, host_id=host, model_id=model, kind="state", source=source, target=target, **more)  # type: ignore[arg-type]  # fields by name


def progress(done_bytes: int, model: str = "m", host: str = "cpu") -> Event:
    return Event(
        seq=1, time_s=0.0, host_id=host, model_id=model, kind="progress", source="fetching", target="fetching",
        done_bytes=done_bytes, total_bytes=100,
    )  # fmt: skip


def recorded(events: Sequence[Event]) -> Exposition:
    recorder = MetricsRecorder()
    counting = EventMetrics(recorder)
    for event in events:
        counting.count(event)
    return Exposition(generate_latest(recorder.registry).decode())


def test_a_load_is_counted_with_its_seconds_and_its_estimate() -> None:
    exposition = recorded(
        [
            step("loading", "warming"),
            step("warming", "ready", seconds=2.5, estimated_bytes=100, measured_bytes=120),
            step("draining", "ready"),  # an eviction was given up: nothing was loaded
        ]
    )

    assert exposition("embedyard_loads_total", model="m", host="cpu") == 1
    assert exposition("embedyard_load_seconds_sum", model="m") == 2.5
    assert exposition("embedyard_estimate_error_ratio_sum", model="m") == pytest.approx(1.2)


def test_a_parked_model_is_evicted_once_and_its_return_is_no_load() -> None:
    exposition = recorded(
        [
            step("draining", "parking", reason="room", seconds=30.0),
            step("parking", "parked"),
            step("parked", "waking"),
            step("waking", "ready", seconds=0.25),
        ]
    )

    assert exposition("embedyard_evictions_total", model="m", cause="room") == 1
    assert exposition("embedyard_wakes_total", model="m", host="cpu") == 1
    assert exposition("embedyard_wake_seconds_sum", model="m") == 0.25


def test_an_eviction_is_counted_by_cause_with_its_age() -> None:
    exposition = recorded(
        [
            step("ready", "draining", claimant="other", missing_bytes=7),
            step("draining", "unloading", reason="room", seconds=30.0, claimant="other"),
            step("unloading", "cold"),
            step("draining", "unloading", reason="idle", seconds=600.0),
        ]
    )

    assert exposition("embedyard_evictions_total", model="m", cause="room") == 1
    assert exposition("embedyard_evictions_total", model="m", cause="idle") == 1
    assert exposition("embedyard_eviction_age_seconds_sum", model="m") == 630
    assert exposition("embedyard_turns_total", model="other") == 1
    assert exposition("embedyard_load_failures_total", model="m", kind="room") == 0


def test_failures_are_counted_by_kind_also_those_that_are_tried_again() -> None:
    exposition = recorded(
        [
            step("loading", "cold", reason="out_of_memory"),
            step("loading", "failed", reason="out_of_memory"),
            step("fetching", "failed", reason="hub_unreachable"),
        ]
    )

    assert exposition("embedyard_load_failures_total", model="m", kind="out_of_memory") == 2
    assert exposition("embedyard_load_failures_total", model="m", kind="hub_unreachable") == 1


def test_a_download_that_two_hosts_share_is_counted_once() -> None:
    exposition = recorded(
        [
            step("absent", "fetching", host="cuda:0"),
            progress(40, host="cuda:0"),
            step("absent", "fetching", host="cuda:1"),
            progress(60, host="cuda:1"),
            progress(60, host="cuda:0"),
            progress(100, host="cuda:0"),
            step("fetching", "cold", host="cuda:0"),
            progress(100, host="cuda:1"),
            step("fetching", "cold", host="cuda:1"),
        ]
    )

    assert exposition("embedyard_download_bytes_total", model="m") == 100


def test_a_download_begun_anew_is_counted_anew() -> None:
    exposition = recorded(
        [
            step("absent", "fetching"), progress(80), step("fetching", "failed", reason="hub_unreachable"),
            step("failed", "absent"), step("absent", "fetching"), progress(100), step("fetching", "cold"),
        ]
    )  # fmt: skip

    assert exposition("embedyard_download_bytes_total", model="m") == 180
