"""Passes use the cores of idle device threads, unless other processes keep these busy."""

import threading
import time

from engines.device.cores import IdleCores
from engines.device.scheduler import DeviceScheduler
from tests.testkit.scheduling import ScriptedSource


class Clocks:
    """The time, and how long the calling thread has had a core."""

    def __init__(self) -> None:
        self.now_s = self.core_s = 100.0

    def cores(self) -> IdleCores:
        """Returns what reads them."""
        return IdleCores(lambda: self.now_s, lambda: self.core_s)

    def run(self, cores: IdleCores, wall_s: float, core_s: float, count: int = 1) -> None:
        """Runs passes on several cores."""
        for _ in range(count):
            started = cores.start()
            self.now_s, self.core_s = self.now_s + wall_s, self.core_s + core_s
            cores.end(started)


def test_a_pass_uses_all_idle_cores_while_its_thread_waits_for_none() -> None:
    clocks = Clocks()
    cores = clocks.cores()
    clocks.run(cores, 0.01, 0.009, count=100)

    assert [cores.limit(number) for number in (1, 2, 8)] == [1, 2, 8]


def test_a_pass_uses_half_of_them_after_its_thread_has_waited_for_taken_ones() -> None:
    clocks = Clocks()
    cores = clocks.cores()
    clocks.run(cores, 0.01, 0.0055, count=6)

    assert [cores.limit(number) for number in (1, 2, 8)] == [1, 1, 4]


def test_one_short_wait_decides_nothing() -> None:
    clocks = Clocks()
    cores = clocks.cores()
    clocks.run(cores, 0.01, 0.001)
    clocks.run(cores, 0.01, 0.01, count=20)

    assert cores.limit(2) == 2


def test_all_cores_are_tried_again_later() -> None:
    clocks = Clocks()
    cores = clocks.cores()
    clocks.run(cores, 0.1, 0.05)
    taken = cores.limit(2)
    clocks.now_s += 2.1
    tried = cores.limit(2)
    clocks.run(cores, 0.1, 0.05)

    assert (taken, tried, cores.limit(2)) == (1, 2, 1)


def test_a_batch_runs_on_its_own_core_after_one_that_waited_for_another() -> None:
    used: list[int] = []
    clocks, ended = Clocks(), threading.Semaphore(0)
    scheduler = DeviceScheduler("cores", num_threads=2, use_cores=used.append, idle_cores=clocks.cores())

    def wait_for_a_core() -> None:
        clocks.now_s += 0.2
        clocks.core_s += 0.1
        ended.release()

    for _ in range(2):
        while scheduler._num_free < 2:
            time.sleep(0.001)
        scheduler.attach(ScriptedSource(1, wait_for_a_core, uses_idle_cores=True))
        assert ended.acquire(timeout=10)
    scheduler.close()

    assert used[0] == 2
    assert 2 not in used[1:]


async def test_calls_on_the_device_may_wait_for_a_disk() -> None:
    clocks = Clocks()
    cores = clocks.cores()
    scheduler = DeviceScheduler("cores", num_threads=2, use_cores=lambda _: None, idle_cores=cores)

    def read() -> None:
        clocks.now_s += 1.0

    await scheduler.call(read)
    scheduler.close()

    assert cores.limit(2) == 2
