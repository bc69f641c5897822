"""For every test: the log stays off the screen, and libraries out of the collector's sight; both would cost minutes."""

import gc
from typing import Any, NoReturn

import pytest
import structlog
from hypothesis import settings

settings.register_profile("suite", deadline=None)  # how long an example takes depends on who else uses the machine
settings.load_profile("suite")


def _drop(*_: Any) -> NoReturn:
    raise structlog.DropEvent


structlog.configure(processors=[_drop], logger_factory=structlog.ReturnLoggerFactory())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the slow files first: a worker that got one last would run on while the others have nothing left."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def pytest_collection_finish() -> None:
    """As `embedyard serve` does before it serves: every unload of a model ends with a full collection."""
    gc.collect()
    gc.freeze()
