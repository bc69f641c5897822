"""The cores that a process may run on, for the server's settings and the threads of engines alike."""

import os

import pytest

from engines.affinity import num_usable_cores, usable_cores
from router.config.settings import Settings


def test_the_cores_are_those_that_the_operating_system_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {5, 2, 3})

    assert (usable_cores(), num_usable_cores(), Settings().thread_pool_size) == ([2, 3, 5], 3, 3)


def test_without_an_answer_they_are_those_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 7)

    assert (usable_cores(), num_usable_cores()) == ([], 7)
