"""Tests what the CPU time of a request says of more cores and more server processes."""

import os
import time
from pathlib import Path

import pytest

from benchmarks.http.edges import Spent, bound, servers_for, spent

REQUEST = Spent(0.0004, 0.0001, 0.0015)
"""The CPU time of one request, 2 ms in all."""


def test_few_cores_are_bound_by_all_work_and_many_by_the_event_loop() -> None:
    assert bound(REQUEST, 2, 1) == pytest.approx(1000)
    assert bound(REQUEST, 16, 1) == pytest.approx(2500)
    assert bound(REQUEST, 16, 2) == pytest.approx(5000)


def test_as_many_servers_as_keep_the_cores_busy() -> None:
    assert [servers_for(REQUEST, cores) for cores in (2, 4, 8, 16)] == [1, 1, 2, 4]


@pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="reads Linux's times of threads")
def test_the_first_thread_is_the_event_loop() -> None:
    before = spent(os.getpid())
    began_s = time.thread_time()
    while time.thread_time() - began_s < 0.05:
        pass
    used = spent(os.getpid()).since(before, 2)

    assert used.loop_s == pytest.approx(0.025, rel=0.5)
    assert used.worker_s == 0
