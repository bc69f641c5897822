"""Tests what a server checks of its folder and database when it starts."""

import asyncio
import sqlite3
import time
from contextlib import closing
from pathlib import Path

import pytest

from router.batches import database
from router.batches import service as service_module
from router.batches.database import open_database
from router.batches.records import Page
from router.batches.service import BatchService, ServiceHooks
from router.config.settings import Settings, SettingsError
from router.errors import StorageUnavailable
from tests.testkit.batches import BATCH, BatchWorld
from tests.testkit.postgres_server import postgres_server

HOOKS = ServiceHooks(may_run=lambda _: True, on_line=lambda *_: None, on_end=lambda *_: None)


def open_service(folder: Path, database: str) -> None:
    BatchService(Settings(data_dir=folder, batch_database=database), HOOKS)._close()


def test_servers_on_one_database_must_share_one_folder(tmp_path: Path) -> None:
    shared = f"sqlite:///{tmp_path / 'shared.db'}"

    open_service(tmp_path / "one", shared)
    open_service(tmp_path / "one", shared)
    with pytest.raises(SettingsError, match="belongs to another DATA_DIR"):
        open_service(tmp_path / "two", shared)


def test_a_folder_with_the_files_of_a_backup_is_the_same_folder(tmp_path: Path) -> None:
    shared = f"sqlite:///{tmp_path / 'shared.db'}"
    open_service(tmp_path / "one", shared)
    (tmp_path / "two").mkdir()
    (tmp_path / "one" / "files").rename(tmp_path / "two" / "files")

    open_service(tmp_path / "two", shared)


def test_a_server_that_is_suspended_within_a_transaction_does_not_keep_its_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PostgreSQL ends the transaction after 10 s; here after one."""
    assert database._IDLE_TIMEOUT_S < database._LOCK_TIMEOUT_S, "others wait longer than it keeps its lock"
    monkeypatch.setattr(database, "_IDLE_TIMEOUT_S", 1.0)
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


async def test_while_a_suspended_server_locks_sqlite_all_calls_fail_soon_and_work_again_once_it_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also those that wait for a thread: forty calls on eight threads would take five times as long as the lock."""
    monkeypatch.setattr(database, "_BUSY_TIMEOUT_S", 1.5)
    monkeypatch.setattr(service_module, "_QUEUED_S", 0.2)
    service = BatchService(Settings(data_dir=tmp_path), HOOKS)
    page = Page(after=None, limit=10, is_ascending=False)
    with closing(sqlite3.connect(tmp_path / "batches.db", isolation_level=None)) as suspended:
        suspended.execute("BEGIN IMMEDIATE")
        calls = [service.batches("web", page) for _ in range(40)]
        failed = await asyncio.gather(*calls, return_exceptions=True)
        suspended.execute("ROLLBACK")
    found = await service.batches("web", page)
    await asyncio.to_thread(service._close)

    assert [type(error) for error in failed] == [StorageUnavailable] * 40
    assert {error.retry_after_s for error in failed if isinstance(error, StorageUnavailable)} == {5.0}
    assert sum("busy" in str(error) for error in failed) == 32
    assert found == ([], False)
