"""What costs time is made once a session."""

from collections.abc import Iterator

import pytest

from benchmarks.lib.engine_kit import Kit


@pytest.fixture(scope="session")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kit]:
    """Real models on a real lane."""
    kit = Kit(tmp_path_factory.mktemp("models"))
    yield kit
    kit.close()
