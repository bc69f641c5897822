"""The seconds of a parked model to its answer, on a CPU, where parked weights are copied as on a GPU."""

import resource
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from benchmarks.gpu import folders
from benchmarks.gpu.parts import loading, swap
from benchmarks.gpu.parts.swap import raise_lock_limit
from benchmarks.gpu.results import Device, PartResult, Record, RunResult
from benchmarks.gpu.runner import PartContext
from benchmarks.gpu.tables import failures, goal_rows
from engines.errors import SelfCheckFailed
from engines.models.parking import HostCopy


@pytest.fixture(scope="module", autouse=True)
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(folders, "ROOT", tmp_path_factory.mktemp("models"))
        patch.setitem(swap.RATE_BYTES, "small", 2**20)
        patch.setattr(swap, "raise_lock_limit", lambda: None)  # of the whole process
        torch.set_num_threads(1)
        yield


def recorded(part: Any, limit_s: float = 60.0) -> list[Record]:
    records: list[Record] = []
    part(PartContext("cpu", {"size": "small"}, records.append, limit_s))
    return records


def test_a_parked_model_is_timed_step_by_step_beside_the_rate_of_a_copy() -> None:
    rate, found = recorded(swap.run)

    assert rate["bytes_per_s"] > 0
    assert found["ok"]
    assert found["worst_cosine"] > 0.999999
    assert found["moved_bytes"] > 0.9 * folders.weight_bytes(folders.folder_of("small-qwen3"))
    assert found["copy_bound_s"] == found["moved_bytes"] / rate["bytes_per_s"]
    assert found["times"] == pytest.approx(found["parked_s"] / found["copy_bound_s"])
    assert len(found["rounds_s"]) == swap.MAX_ROUNDS
    assert found["graphs_back_s"] is None, "a CPU records no graphs"
    assert found["first_path"] == found["path"]
    assert min(found[key] for key in ("park_s", "copy_s", "check_s", "answer_s", "from_page_cache_s")) > 0


@pytest.mark.parametrize(("weight_bytes", "rounds"), [(1_200_000_000, 3), (8_000_000_000, 2), (30_000_000_000, 1)])
def test_the_largest_models_are_parked_less_often(weight_bytes: int, rounds: int) -> None:
    assert swap.rounds_of(weight_bytes) == rounds


def test_a_copy_that_comes_back_with_other_bytes_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    restore = HostCopy.restore

    def damaged(self: HostCopy) -> None:
        self._buffer.zero_()
        restore(self)

    monkeypatch.setattr(HostCopy, "restore", damaged)

    with pytest.raises(SelfCheckFailed):
        recorded(swap.run)


def test_a_model_that_would_take_longer_than_is_left_is_said_and_not_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    records: list[Record] = []
    context = PartContext("cpu", {"size": "small"}, records.append, 0.2)
    monkeypatch.setattr(loading, "timed", lambda work: work() or 1.0)

    loading.record_in_time(context, ["qwen3-0.6b", "qwen3-4b"], lambda name: {"model": name, "ok": True})

    assert records[0] == {"model": "qwen3-0.6b", "ok": True}
    assert (records[1]["ok"], records[1]["raised"]) == (None, "would take 7 s, 0 s are left")


def test_this_process_may_lock_as_much_as_it_is_allowed_to(monkeypatch: pytest.MonkeyPatch) -> None:
    limits: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda which: (8, 800))
    monkeypatch.setattr(resource, "setrlimit", lambda which, pair: limits.append(pair))

    raise_lock_limit()

    assert limits == [(800, 800)]


def swaps(times: float, *, ok: bool = True) -> list[Record]:
    one = {"from_page_cache_s": 1.52, "parked_s": 0.048, "copy_times": 1.04, "graphs_back_s": 1.4, "ok": True}
    return [
        {"what": "rate", "bytes_per_s": 5e10},
        {"model": "qwen3-0.6b", **one, "times": 1.2},
        {"model": "qwen3-4b", **one, "times": times, "ok": ok},
    ]


def row(records: list[Record], begin: str) -> tuple[str, ...]:
    device = Device(kind="cuda", name="NVIDIA H200")
    part = PartResult(state="done", records=records, measured_at="2026-12-01 10:00 UTC")
    results = [RunResult(device=device, parts={"swap": part})]
    return next(row for row in goal_rows(results) if row[0].startswith(begin))


@pytest.mark.parametrize(
    ("times", "ok", "state"), [(1.3, True, "met"), (1.31, True, "missed"), (1.2, False, "missed")]
)  # fmt: skip
def test_the_slowest_model_decides_whether_answers_come_at_the_rate_of_a_copy(
    times: float, ok: bool, state: str
) -> None:
    found = row(swaps(times, ok=ok), "parked, times its bytes")

    assert found[1:] == ("≤ 1.3", f"1.20 (1.04), {times:.2f} (1.04)", f"{state} on NVIDIA H200, 2026-12-01")


def test_the_seconds_of_both_temperatures_stand_beside_each_other() -> None:
    assert row(swaps(1.2), "seconds from a request to its answer")[2] == "1.5 / 0.05; 1.5 / 0.05"


def test_the_seconds_until_graphs_are_back_have_a_row_of_their_own() -> None:
    assert row(swaps(1.2), "parked, seconds from its answer")[2] == "1.40; 1.40"


def test_other_vectors_after_parking_are_a_failure() -> None:
    device = Device(kind="cuda", name="NVIDIA H200")
    result = RunResult(device=device, parts={"swap": PartResult(state="done", records=swaps(1.2, ok=False))})

    assert len(failures(result)) == 1
