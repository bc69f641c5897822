"""For every test: the log stays off the screen, and libraries out of the collector's sight; both would cost minutes."""

import gc
from typing import Any, NoReturn

import pytest
import structlog
from hypothesis import settings

settings.register_profile("suite", deadline=None)  # how long an example takes depends on who else uses the machine
settings.load_profile("suite")

_LONGEST = (
    "test_ray", "test_first_vector", "test_dashboard", "test_hub_faults", "test_chaos", "test_soak", "test_yard",
    "test_parity", "test_minilm", "test_leaving", "test_readme", "test_pool_storms",
)  # fmt: skip
"""Files that take twenty seconds or more: a worker that finds one of them at the end works on while the others rest."""


def _drop(*_: Any) -> NoReturn:
    raise structlog.DropEvent


structlog.configure(processors=[_drop], logger_factory=structlog.ReturnLoggerFactory())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first."""
    rank = {name: place for place, name in enumerate(_LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))


def pytest_collection_finish() -> None:
    """As `embedyard serve` does before it serves: every unload of a model ends with a full collection."""
    gc.collect()
    gc.freeze()
