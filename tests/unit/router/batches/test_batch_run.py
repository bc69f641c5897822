"""Tests runs of batches: order, bad lines, cancellation, expiry and takeover."""

import asyncio
import io
from collections import Counter
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from router.batches.folder import DataFolder
from router.batches.journal import BatchJournal, LineResult, line_id
from router.batches.leases import LEASE_S, LeaseLost
from router.batches.lines import LineReader
from router.batches.parts import LineAnswer, LineWork, RunPolicy
from tests.testkit.batches import (
    BATCH,
    HOUR_S,
    INPUT_ID,
    MAX_LINE_BYTES,
    OWNER,
    BatchWorld,
    echo,
    line,
    make_run,
    parsed,
    run_here,
)  # fmt: skip

TEN = "\n".join(line(f"id-{number}", f"text {number}") for number in range(10)).encode()


async def test_the_output_has_the_lines_in_the_order_of_the_input(world: BatchWorld) -> None:
    world.add(TEN)

    async def backwards(work: LineWork) -> LineAnswer:
        await asyncio.sleep(0.001 * (10 - int(work.body.rpartition(b" ")[2].strip(b'"}'))))
        return LineAnswer(200, work.body)

    await run_here(world, backwards)

    batch = world.batch()
    assert (batch.status, batch.total, batch.completed, batch.failed) == ("completed", 10, 10, 0)
    assert batch.in_progress_at is not None and batch.finalizing_at is not None and batch.completed_at is not None
    rows = parsed(world.output())
    assert [row["custom_id"] for row in rows] == [f"id-{number}" for number in range(10)]
    assert rows[3]["response"] == {
        "status_code": 200,
        "request_id": rows[3]["id"],
        "body": {"model": "mini", "input": "text 3"},
    }
    assert {row["error"] for row in rows} == {None}
    assert len({row["id"] for row in rows}) == 10
    assert batch.error_file_id is None


async def test_bad_lines_land_in_the_error_file_and_the_others_run(world: BatchWorld) -> None:
    huge = line("huge", "x" * MAX_LINE_BYTES)
    rows = [
        "\ufeff" + line("first"), "", "{", "[1]", line("get", method="GET"), line("far", url="/v1/rerank"), "   ",
        huge, line("first"), line(""), line("last"), '{"custom_id":"lone","method":"POST"}', '{"custom_id": 7}',
    ]  # fmt: skip
    world.add("\r\n".join(rows).encode())

    await run_here(world)

    assert [row["custom_id"] for row in parsed(world.output())] == ["first", "last"]
    found = [(row["custom_id"], row["error"]["code"], row["response"]) for row in parsed(world.errors())]
    assert found == [
        (None, "invalid_json", None),
        (None, "invalid_value", None),
        ("get", "invalid_value", None),
        ("far", "invalid_value", None),
        (None, "body_too_large", None),
        ("first", "duplicate_custom_id", None),
        (None, "invalid_value", None),
        ("lone", "invalid_value", None),
        (None, "invalid_value", None),
    ]
    batch = world.batch()
    assert (batch.status, batch.total, batch.completed, batch.failed) == ("completed", 11, 2, 9)
    assert sum(number for outcome, number in world.counted if outcome == "failed") == 9


async def test_a_refused_line_has_its_answer_in_the_error_file(world: BatchWorld) -> None:
    world.add(line("a").encode())

    async def refuse(work: LineWork) -> LineAnswer:
        return LineAnswer(404, b'{"error":{"code":"model_not_found"}}')

    await run_here(world, refuse)

    (row,) = parsed(world.errors())
    assert row["response"]["status_code"] == 404
    assert row["response"]["body"] == {"error": {"code": "model_not_found"}}
    assert world.output() == b""


@pytest.mark.parametrize(("status", "failures", "completed"), [(429, 50, 1), (503, 7, 1), (503, 8, 0)])
async def test_a_line_is_tried_again_while_the_server_has_no_room(
    world: BatchWorld, status: int, failures: int, completed: int
) -> None:
    world.add(line("a").encode())
    left = [failures]

    async def busy(work: LineWork) -> LineAnswer:
        left[0] -= 1
        return LineAnswer(status, b"{}", retry_after_s=0.0) if left[0] >= 0 else LineAnswer(200, b"{}")

    await run_here(world, busy)

    assert world.batch().completed == completed


async def test_an_outage_costs_no_line_until_one_was_in_vain(world: BatchWorld) -> None:
    world.add(TEN)
    tries = Counter[str]()

    async def down(work: LineWork) -> LineAnswer:
        tries[work.request_id] += 1
        return LineAnswer(503, b"{}", retry_after_s=60.0)

    await run_here(world, down, outage_s=900.0)

    counts = [tries[line_id(BATCH.id, number)] for number in range(1, 11)]
    assert world.batch().failed == 10
    assert max(counts) * 30 >= 900  # seconds: a pause has at most 30
    assert counts[-1] == 8


async def test_a_model_that_returns_within_an_outage_loses_no_line(world: BatchWorld) -> None:
    world.add(TEN)
    tries = Counter[str]()

    async def quarantined(work: LineWork) -> LineAnswer:
        tries[work.request_id] += 1
        is_down = tries[work.request_id] <= 20  # pauses of 30 s: ten minutes
        return LineAnswer(503, b"{}", retry_after_s=600.0) if is_down else LineAnswer(200, b"{}")

    await run_here(world, quarantined, outage_s=RunPolicy(max_line_bytes=1, retention_s=1).outage_s)

    assert (world.batch().completed, world.batch().failed) == (10, 0)


async def test_lines_that_wait_are_logged_with_the_reason_and_the_time_left(world: BatchWorld) -> None:
    world.add(TEN)
    tries = Counter[str]()
    error = (
        b'{"error":{"message":"model is quarantined","type":"server_error","param":null,"code":"model_load_failed"}}'
    )

    async def quarantined(work: LineWork) -> LineAnswer:
        tries[work.request_id] += 1
        return LineAnswer(503, error, retry_after_s=20.0) if tries[work.request_id] == 1 else LineAnswer(200, b"{}")

    with capture_logs() as logged:
        await run_here(world, quarantined)

    waiting = [each for each in logged if each["event"] == "batch.waiting"]
    assert [(each["batch"], each["retry_in_s"], each["reason"]) for each in waiting] == [
        (BATCH.id, 20.0, "model is quarantined")
    ]
    assert world.batch().completed == 10


@pytest.mark.parametrize(("text", "code"), [(b"", "empty_file"), (b" \n\n \t\r\n", "empty_file")])
async def test_a_file_without_lines_fails_the_batch(world: BatchWorld, text: bytes, code: str) -> None:
    world.add(text)

    await run_here(world)

    batch = world.batch()
    assert batch.status == "failed" and batch.failed_at is not None
    assert batch.errors is not None and [error.code for error in batch.errors] == [code]


async def test_a_file_of_too_many_lines_fails_the_batch(world: BatchWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("router.batches.lines.scan_file.__defaults__", (9,))
    world.add(TEN)

    await run_here(world)

    errors = world.batch().errors
    assert errors is not None and [error.code for error in errors] == ["too_many_lines"]


class Gate:
    """Answers the first lines, and holds the others until they are cancelled."""

    def __init__(self, open_lines: int) -> None:
        self.left = open_lines
        self.held = asyncio.Event()
        self.cancelled = 0

    async def __call__(self, work: LineWork) -> LineAnswer:
        self.left -= 1
        if self.left >= 0:
            return await echo(work)
        self.held.set()
        try:
            await asyncio.Event().wait()
        finally:
            self.cancelled += 1
        raise AssertionError("the event is never set")


async def test_a_cancelled_batch_stops_at_once_and_keeps_what_is_done(world: BatchWorld) -> None:
    world.add(TEN)
    gate = Gate(3)
    with world.server(gate, poll_s=60.0) as runner:
        run = make_run(runner)
        task = asyncio.create_task(run.run())
        await gate.held.wait()
        assert world.store.cancel(OWNER, BATCH.id).status == "cancelling"
        run.nudge()
        async with asyncio.timeout(1.0):
            await task

    batch = world.batch()
    assert (batch.status, batch.completed) == ("cancelled", 3)
    assert [row["custom_id"] for row in parsed(world.output())] == ["id-0", "id-1", "id-2"]
    assert gate.cancelled > 0
    assert world.store.cancel(OWNER, BATCH.id).status == "cancelled"


async def test_another_servers_cancellation_is_seen_within_a_poll(world: BatchWorld) -> None:
    world.add(TEN)
    gate = Gate(0)
    with world.server(gate) as runner:
        task = asyncio.create_task(make_run(runner).run())
        await gate.held.wait()
        world.store.cancel(OWNER, BATCH.id)
        async with asyncio.timeout(1.0):
            await task

    assert world.batch().status == "cancelled"
    assert world.output() == b""


async def test_an_expired_batch_keeps_what_is_done_and_lists_the_rest(world: BatchWorld) -> None:
    world.add(TEN)
    gate = Gate(4)
    with world.server(gate) as runner:
        task = asyncio.create_task(make_run(runner).run())
        await gate.held.wait()
        world.now_s = HOUR_S
        await task

    batch = world.batch()
    assert (batch.status, batch.completed, batch.failed) == ("expired", 4, 6)
    assert [row["custom_id"] for row in parsed(world.output())] == [f"id-{number}" for number in range(4)]
    assert [(row["custom_id"], row["error"]["code"]) for row in parsed(world.errors())] == [
        (f"id-{number}", "batch_expired") for number in range(4, 10)
    ]


async def test_a_batch_ends_when_its_key_is_removed(world: BatchWorld) -> None:
    world.add(TEN)
    gate = Gate(2)
    with world.server(gate) as runner:
        task = asyncio.create_task(make_run(runner).run())
        await gate.held.wait()
        world.allowed.clear()
        await task

    batch = world.batch()
    assert batch.status == "failed" and batch.completed == 2
    assert batch.errors is not None and batch.errors[0].code == "invalid_api_key"


async def test_a_stopped_server_gives_the_batch_back_and_another_ends_it(world: BatchWorld) -> None:
    world.add(TEN)
    gate = Gate(5)
    with world.server(gate) as runner:
        run = make_run(runner)
        task = asyncio.create_task(run.run())
        await gate.held.wait()
        run.stop()
        await task
    assert (world.batch().status, world.batch().completed, world.batch().holder) == ("in_progress", 5, "")

    await run_here(world, holder="other")  # at once: no lease has to end

    assert world.batch().status == "completed"
    assert [row["custom_id"] for row in parsed(world.output())] == [f"id-{number}" for number in range(10)]


async def test_a_server_that_was_suspended_spoils_nothing(world: BatchWorld) -> None:
    world.add(TEN)
    gate = Gate(3)
    with world.server(gate, poll_s=60.0) as runner:
        task = asyncio.create_task(make_run(runner).run())
        await gate.held.wait()
        world.now_s += LEASE_S + 1
        await run_here(world, holder="other")
        expected = world.output()
        task.cancel()  # now it writes what it has
        await asyncio.gather(task, return_exceptions=True)

    assert world.batch().status == "completed"
    assert world.output() == expected
    assert len(parsed(expected)) == 10


async def test_a_lease_that_is_lost_within_a_write_is_logged_as_lost(world: BatchWorld) -> None:
    world.add(TEN)

    async def late(work: LineWork) -> LineAnswer:
        if not world.now_s:
            world.now_s += LEASE_S + 1
            assert world.leases_of("other").claim(Counter()) is not None
        return await echo(work)

    with capture_logs() as logged:
        await run_here(world, late, poll_s=60.0)

    assert [row["event"] for row in logged] == ["batch.lease_lost"]


async def test_a_lease_that_is_found_lost_while_nothing_is_written_is_logged(world: BatchWorld) -> None:
    world.add(TEN)
    gate = Gate(0)
    with capture_logs() as logged, world.server(gate) as runner:
        task = asyncio.create_task(make_run(runner).run())
        await gate.held.wait()
        world.now_s += LEASE_S + 1
        assert world.leases_of("other").claim(Counter()) is not None
        await task

    assert [row["event"] for row in logged] == ["batch.lease_lost"]


def test_a_server_that_was_suspended_while_it_published_replaces_nothing(world: BatchWorld) -> None:
    """It believes that the batch failed after three lines, as the clock or the keys of its machine say."""
    world.add(TEN)
    leases = world.leases_of("first")
    batch = leases.claim(Counter())
    assert batch is not None
    seen: list[bytes] = []

    class SlowFolder(DataFolder):
        def publish(self, source: Path, file_id: str) -> None:
            world.now_s += LEASE_S + 1
            asyncio.run(run_here(world, holder="other"))
            seen.append(world.output())
            super().publish(source, file_id)

    journal = BatchJournal(SlowFolder(world.root), leases, batch)
    reader = LineReader(io.BytesIO(TEN), 0, 1, MAX_LINE_BYTES)
    journal.append([LineResult(one.number, one.end, b"{}\n", is_completed=True) for one in reader.read(3, 10**6)])
    with pytest.raises(LeaseLost):
        journal.finish("failed", HOUR_S)
    journal.close()

    assert world.batch().status == "completed"
    assert [world.output()] == seen and len(parsed(seen[0][9:])) == 7
    assert {path.name for path in (world.root / "files").iterdir()} == {
        INPUT_ID, world.batch().output_file_id
    }  # fmt: skip


async def test_a_missing_input_file_is_named_as_the_reason(world: BatchWorld) -> None:
    world.add(TEN)
    world.folder.delete_files([INPUT_ID])

    with capture_logs() as logged:
        await run_here(world)

    assert [(row["event"], row.get("reason")) for row in logged] == [
        ("batch.stalled", "a file of this batch is not in DATA_DIR")
    ]


async def test_an_error_of_the_disk_delays_the_batch(world: BatchWorld) -> None:
    world.add(TEN)
    world.folder.file(BATCH.input_file_id).rename(world.root / "away")

    await run_here(world)
    assert world.batch().status == "validating"
    assert world.leases.claim(Counter()) is None

    (world.root / "away").rename(world.folder.file(BATCH.input_file_id))
    world.now_s += 31
    await run_here(world)
    assert world.batch().status == "completed"
