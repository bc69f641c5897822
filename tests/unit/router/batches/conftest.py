"""One folder and its database: SQLite, and PostgreSQL where it is installed."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import create_engine

from router.batches.database import METADATA
from tests.testkit.batches import BatchWorld
from tests.testkit.postgres_server import postgres_server


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    with postgres_server() as url:
        yield url


@pytest.fixture(params=["sqlite", "postgresql"])
def world(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[BatchWorld]:
    url = request.getfixturevalue("postgres") if request.param == "postgresql" else None
    if url is not None:
        engine = create_engine(url)
        METADATA.drop_all(engine)
        engine.dispose()
    world = BatchWorld(tmp_path, url)
    yield world
    world.engine.dispose()
