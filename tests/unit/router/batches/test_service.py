"""Tests what a server checks of its folder and database when it starts."""

import time
from pathlib import Path

import pytest

from router.batches.database import open_database
from router.batches.service import BatchService, ServiceHooks
from router.config.settings import Settings, SettingsError
from tests.testkit.batches import BATCH, BatchWorld
from tests.testkit.postgres_server import postgres_server

HOOKS = ServiceHooks(may_run=lambda _: True, on_line=lambda *_: None, on_end=lambda *_: None)


def open_service(folder: Path, database: str) -> None:
    BatchService(Settings(data_dir=folder, batch_database=database), HOOKS)._close()


def test_servers_on_one_database_must_share_one_folder(tmp_path: Path) -> None:
    database = f"sqlite:///{tmp_path / 'shared.db'}"

    open_service(tmp_path / "one", database)
    open_service(tmp_path / "one", database)
    with pytest.raises(SettingsError, match="belongs to another DATA_DIR"):
        open_service(tmp_path / "two", database)


def test_a_folder_with_the_files_of_a_backup_is_the_same_folder(tmp_path: Path) -> None:
    database = f"sqlite:///{tmp_path / 'shared.db'}"
    open_service(tmp_path / "one", database)
    (tmp_path / "two").mkdir()
    (tmp_path / "one" / "files").rename(tmp_path / "two" / "files")

    open_service(tmp_path / "two", database)


@pytest.mark.slow
def test_a_server_that_is_suspended_within_a_transaction_does_not_keep_its_lock(tmp_path: Path) -> None:
    """PostgreSQL ends the transaction after 10 s."""
    with postgres_server() as url:
        world = BatchWorld(tmp_path, url)
        world.add(b"{}")
        other = open_database(url)
        with other.connect() as suspended:
            suspended.exec_driver_sql("BEGIN")
            suspended.exec_driver_sql("UPDATE batches SET holder = 'zombie'")
            began_s = time.monotonic()

            cancelled = world.store.cancel(BATCH.owner, BATCH.id)

            assert cancelled.status == "cancelling" and cancelled.holder == ""
            assert time.monotonic() - began_s < 15
            suspended.invalidate()
        other.dispose()
        world.engine.dispose()
