"""The file that a server writes for `embedyard replay`."""

from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs
from structlog.testing import capture_logs

from engines.trace import read_trace
from engines.types import BaseResult, HostSnapshot, ModelStatus, Timings
from router.observability.replay_trace import ReplayTrace
from router.observability.request_context import RequestContext

LOADED = ModelStatus(
    model_id="a",
    state="ready",
    host_id="cpu",
    device="cpu",
    source="x",
    weight_bytes=500,
    workspace_bytes=20,
    load_s=1.5,
)


def snapshot(*models: ModelStatus) -> HostSnapshot:
    return HostSnapshot(
        host_id="cpu", device="cpu", total_bytes=1000, budget_bytes=800, used_bytes=0, workspace_bytes=0, free_bytes=0,
        residents=(), models=models,
    )  # fmt: skip


async def _send(message: Any) -> None:
    """Sends nothing."""


def context(
    model_id: str, *, tokens: tuple[int, ...] = (3, 4), is_answered: bool = True, load_s: float = 9.0
) -> RequestContext:
    scope: Any = {"type": "http", "method": "POST", "headers": [], "path_template": "/v1/embeddings"}
    found = RequestContext(scope, _send)
    found.set_model(model_id)
    if is_answered:
        timings = Timings(load_s=load_s, tokenize_s=0.25, queue_s=0.5, forward_s=1.0)
        found.record_result(BaseResult(token_counts=tokens, timings=timings), found.began_s)
    return found


def test_a_model_is_described_once_and_before_its_first_request(tmp_path: Path) -> None:
    file = ReplayTrace(tmp_path / "day.jsonl", lambda: [snapshot(LOADED)])
    asked = [context("a"), context("a", tokens=(10,))]
    for each in asked:
        file.record(each)
    file.close()

    with (tmp_path / "day.jsonl").open("rb") as lines:
        trace = read_trace(lines)
    assert trace.models["a"].weight_bytes == 500
    assert trace.models["a"].load_s == 1.5
    assert [(each.tokens, each.seconds) for each in trace.requests] == [(7, 1.75), (10, 1.75)]
    assert abs(trace.requests[0].at_s - asked[0].began_ns / 1e9) < 0.01
    assert (tmp_path / "day.jsonl").read_text().count('"kind":"model"') == 1


def test_a_model_is_described_again_once_it_has_come_back_from_main_memory(tmp_path: Path) -> None:
    status = LOADED
    file = ReplayTrace(tmp_path / "day.jsonl", lambda: [snapshot(status)])
    file.record(context("a"))
    file.record(context("a"))
    status = structs.replace(LOADED, wake_s=0.12, wakes=1)
    for _ in range(2):
        file.record(context("a"))
    file.close()

    with (tmp_path / "day.jsonl").open("rb") as lines:
        assert read_trace(lines).models["a"].wake_s == 0.12
    assert (tmp_path / "day.jsonl").read_text().count('"kind":"model"') == 2


def test_requests_that_find_their_model_ready_do_not_ask_the_hosts_again(tmp_path: Path) -> None:
    asked: list[int] = []

    def snapshots() -> list[HostSnapshot]:
        asked.append(1)
        return [snapshot(LOADED)]

    file = ReplayTrace(tmp_path / "day.jsonl", snapshots)
    for _ in range(3):
        file.record(context("a", load_s=0.0001))
    file.close()

    assert asked == [1]


def test_the_wait_for_the_model_is_no_part_of_the_seconds_and_refused_requests_are_left_out(tmp_path: Path) -> None:
    file = ReplayTrace(tmp_path / "day.jsonl", list)
    file.record(context("a", is_answered=False))
    file.close()

    assert (tmp_path / "day.jsonl").read_bytes() == b""


def test_a_full_file_makes_place_for_one_that_describes_the_models_again(tmp_path: Path) -> None:
    file = ReplayTrace(tmp_path / "day.jsonl", lambda: [snapshot(LOADED)], max_bytes=300)
    for _ in range(4):
        file.record(context("a"))
    file.close()

    older, newer = ((tmp_path / name).read_bytes() for name in ("day.jsonl.1", "day.jsonl"))
    assert older.startswith(b'{"kind":"model"')
    assert newer.startswith(b'{"kind":"model"')
    assert (older + newer).count(b'"kind":"request"') <= 4


def test_a_file_that_was_removed_is_begun_anew_once_it_is_full(tmp_path: Path) -> None:
    file = ReplayTrace(tmp_path / "day.jsonl", lambda: [snapshot(LOADED)], max_bytes=300)
    (tmp_path / "day.jsonl").unlink()
    for _ in range(6):
        file.record(context("a"))
    file.close()

    assert (tmp_path / "day.jsonl").read_bytes().startswith(b'{"kind":"model"')


def test_a_full_file_that_cannot_be_renamed_goes_on(tmp_path: Path) -> None:
    (tmp_path / "day.jsonl.1").mkdir()
    file = ReplayTrace(tmp_path / "day.jsonl", lambda: [snapshot(LOADED)], max_bytes=300)
    with capture_logs() as logs:
        for _ in range(9):
            file.record(context("a"))
        file.close()

    assert (tmp_path / "day.jsonl").read_bytes().count(b'"kind":"request"') == 9
    assert "replay.not_written" in {log["event"] for log in logs}


@pytest.mark.parametrize("waiting", [(True,), (True, False)], ids=["each line alone", "two lines at once"])
def test_a_full_disk_is_logged_once_and_stops_no_server(
    monkeypatch: pytest.MonkeyPatch, waiting: tuple[bool, ...]
) -> None:
    with capture_logs() as logs:
        file = ReplayTrace(Path("/dev/full"), lambda: [snapshot(LOADED)])
        monkeypatch.setattr(file._lines, "empty", partial(next, cycle(waiting)))
        for _ in range(50):
            file.record(context("a"))
        file.close()

    assert [log["reason"] for log in logs if log["event"] == "replay.not_written"] == ["No space left on device"]


def test_what_a_file_has_is_kept_when_the_server_starts_again(tmp_path: Path) -> None:
    for _ in range(2):
        file = ReplayTrace(tmp_path / "day.jsonl", lambda: [snapshot(LOADED)])
        file.record(context("a"))
        file.close()

    with (tmp_path / "day.jsonl").open("rb") as lines:
        assert len(read_trace(lines).requests) == 2
