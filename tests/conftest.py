"""Configures all tests: no console log, and libraries exempt from garbage collection, as both would cost minutes."""

import gc
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
_LOGGING = {name: value for name, value in structlog.get_config().items() if name != "processors"}


@pytest.fixture(autouse=True)
def the_suites_logging() -> None:
    """Restore the level and the logger: `embedyard embed` in one test hid the events of all later ones.

    The list of processors stays: `capture_logs` of a fixture of a wider scope may have changed it.
    """
    structlog.configure(**_LOGGING)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the slow files first: a worker that got one last would run on after the others have finished."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def pytest_collection_finish() -> None:
    """Freeze the collected objects as `embedyard serve` does: every unload ends with a full garbage collection."""
    gc.collect()
    gc.freeze()
    gc.enable()
