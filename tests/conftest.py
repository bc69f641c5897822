"""Configures all tests: no console log, and libraries exempt from garbage collection, as both would cost minutes."""

import gc
import logging
import sys
from collections.abc import Iterator
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
    """Put the slow files first, the longest limits ahead: a worker that got one last would run on alone."""
    items.sort(key=_order)


def _order(item: pytest.Item) -> tuple[bool, float]:
    limit = item.get_closest_marker("timeout")
    return item.get_closest_marker("slow") is None, -limit.args[0] if limit else 0.0


def pytest_collection_finish() -> None:
    """Freeze the collected objects as `embedyard serve` does: every unload ends with a full garbage collection."""
    gc.collect()
    gc.freeze()
    gc.enable()
