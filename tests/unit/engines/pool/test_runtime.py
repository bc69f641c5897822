"""The lock that all loads of a process share, and how it reports a load that hangs."""

import asyncio
import threading

import pytest
from msgspec import structs

from engines.errors import LoadFailed
from engines.host import Host
from engines.pool.effect_runner import load_limit_s
from engines.pool.runtime import LoaderTask, LoadLock, Threads
from engines.pool.slot import MemoryNeed
from engines.testing.fakes import FakeLoader, fake_host, fake_runtime
from engines.types import EmbedCall
from tests.testkit.clocks import FakeClock


def call(model_id: str) -> EmbedCall:
    return EmbedCall(model_id=model_id, texts=("x",))


def test_a_task_hangs_when_it_runs_for_longer_than_it_may() -> None:
    clock = FakeClock(10.0)
    lock = LoadLock(clock)
    with lock.held(LoaderTask("the load of model 'a' on cuda:0", 600.0)):
        clock.advance(600)
        assert lock.hung() == ""
        clock.advance(1)
        assert lock.hung() == "the load of model 'a' on cuda:0 has been running for more than 600 s"

    assert (lock.hung(), lock.locked()) == ("", False)


def test_a_task_does_not_hang_because_the_process_stood_still() -> None:
    clock = FakeClock(10.0)
    lock = LoadLock(clock)
    with lock.held(LoaderTask("the load of model 'a' on cuda:0", 600.0)):
        clock.advance(3600)

        assert lock.hung(since_pause_s=0.0) == ""
        assert lock.hung(since_pause_s=601.0) != ""


def test_a_task_that_was_reported_hangs_until_it_ends_whatever_pauses_come() -> None:
    clock = FakeClock(10.0)
    lock = LoadLock(clock)
    with lock.held(LoaderTask("the load of model 'a' on cuda:0", 600.0)):
        clock.advance(601)
        reported = lock.hung()
        after_a_pause = lock.hung(since_pause_s=0.0)
    with lock.held(LoaderTask("the load of model 'b' on cuda:0", 600.0)):
        next_task = lock.hung(since_pause_s=0.0)

    assert reported == after_a_pause != ""
    assert next_task == ""


def test_a_load_may_take_as_long_as_a_slow_disk_needs_and_far_longer_than_the_last_one() -> None:
    assert load_limit_s(MemoryNeed(), 600.0) == 600.0
    assert load_limit_s(MemoryNeed(weight_bytes=20 * 10**9), 600.0) == 1600.0
    assert load_limit_s(MemoryNeed(load_s=90.0), 600.0) == 1500.0


async def test_when_a_load_hangs_the_other_hosts_of_the_process_say_so_too() -> None:
    """Two devices share one load lock: the loads of the second wait for a load of the first that hangs."""
    gate, begun = threading.Event(), threading.Event()
    clock = FakeClock(10.0)
    lock = LoadLock(clock)

    def pause(model_id: str) -> None:
        if model_id == "stuck":
            begun.set()
            assert gate.wait(20)

    def host(host_id: str, loader: FakeLoader) -> Host:
        runtime = structs.replace(fake_runtime(), workers=Threads(host_id, load_lock=lock))
        return fake_host("stuck", "cold", "warm", loader=loader, runtime=runtime, host_id=host_id)

    one, two = host("one", FakeLoader(pause=pause)), host("two", FakeLoader())
    await one.start()
    await two.start()
    await two.run(call("warm"))
    waiting = asyncio.create_task(one.run(call("stuck")))
    assert await asyncio.to_thread(begun.wait, 10)
    cold = asyncio.create_task(two.run(call("cold")))
    await asyncio.sleep(0)
    assert (one.check(), two.check()) == ("", "")

    clock.advance(601)
    words = [one.check(), two.check()]
    try:
        for task in (waiting, cold):
            with pytest.raises(
                LoadFailed, match="the load of model 'stuck' on one has been running for more than 600 s"
            ):
                await task
        assert len((await two.run(call("warm"))).token_counts) == 1
        assert [text.partition(":")[0] for text in words] == [
            f"nothing can be loaded on host {at}" for at in ("one", "two")
        ]
        assert "has been running" in one.snapshot().stuck
        assert (one.status("stuck").last_error or "").startswith("load_hangs: the load of model 'stuck'")
    finally:
        gate.set()
    async with asyncio.timeout(10):
        while one.check() or two.check():  # noqa: ASYNC110 - a thread lets go of the lock
            await asyncio.sleep(0.01)
    answers = [await two.run(call("cold")), await one.run(call("stuck"))]

    assert [len(answer.token_counts) for answer in answers] == [1, 1]
    await one.aclose()
    await two.aclose()
