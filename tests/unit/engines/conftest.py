"""Makes slow fixtures once per session."""

from collections.abc import Iterator

import pytest

from benchmarks.lib.engine_kit import Kit


@pytest.fixture(scope="session")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kit]:
    """Make real models on a real scheduler."""
    kit = Kit(tmp_path_factory.mktemp("models"))
    yield kit
    kit.close()
