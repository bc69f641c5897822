"""Configures all tests: no console log, and libraries exempt from garbage collection, as both would cost minutes."""

import gc
import logging
import sys
from collections.abc import Iterator
from operator import itemgetter
from pathlib import Path
from typing import Any, NoReturn

import pytest
import structlog
from hypothesis import settings

gc.disable()  # until all is collected: walking what only grows took 6 of 16 s in each process
settings.register_profile("suite", deadline=None)  # an example's time depends on the load of the machine
settings.load_profile("suite")


def _drop(*_: Any) -> NoReturn:
    raise structlog.DropEvent


structlog.configure(processors=[_drop], logger_factory=structlog.ReturnLoggerFactory())
_LOGGING = structlog.get_config()
"""With the list of processors itself: `capture_logs` of a fixture of a wider scope changes it in place."""


@pytest.fixture(autouse=True)
def the_suites_logging() -> Iterator[None]:
    """Put back what the commands configure for their process.

    `embedyard embed` in one test hid the events of all later ones; `embedyard serve` had them rendered and written.
    """
    root = logging.getLogger()
    handlers, hook = [*root.handlers], sys.excepthook
    structlog.configure(**_LOGGING)
    yield
    structlog.configure(**_LOGGING)
    root.handlers[:], sys.excepthook = handlers, hook


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Spread the slow files over the first three quarters of the others, the longest limits ahead.

    Slow tests wait for processes that they start, while others compute: side by side they use all cores. And a worker
    that got a slow file last would run on alone.
    """
    files: dict[Path, list[pytest.Item]] = {}
    for item in items:
        files.setdefault(item.path, []).append(item)
    slow = sorted((tests for tests in files.values() if any(map(_is_slow, tests))), key=_limit_s, reverse=True)
    others = [tests for tests in files.values() if not any(map(_is_slow, tests))]
    step = 3 * len(others) / 4 / max(len(slow), 1)
    due = [(index * step, tests) for index, tests in enumerate(slow)]
    due += [(float(index), tests) for index, tests in enumerate(others)]
    items[:] = [item for _, tests in sorted(due, key=itemgetter(0)) for item in tests]


def _is_slow(item: pytest.Item) -> bool:
    return item.get_closest_marker("slow") is not None


def _limit_s(tests: list[pytest.Item]) -> float:
    limits = (item.get_closest_marker("timeout") for item in tests)
    return max((limit.args[0] for limit in limits if limit), default=0.0)


def pytest_collection_finish() -> None:
    """Freeze the collected objects as `embedyard serve` does: every unload ends with a full garbage collection."""
    gc.collect()
    gc.freeze()
    gc.enable()
