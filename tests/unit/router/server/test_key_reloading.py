"""The key file is reloaded while the server runs; a file with mistakes changes nothing."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import cast

import pytest
from msgspec import Struct
from structlog.testing import capture_logs

from router.auth.guards import Keyring
from router.auth.key_file import KeysError
from router.config.settings import Settings
from router.server.reloader import open_keyring, watch_keys
from router.server.state import ServerState
from tests.testkit.servers import limited, write_keys


class FakeState(Struct):
    """The part of `ServerState` that the reload needs."""

    settings: Settings
    keyring: Keyring

    def ids(self) -> list[str]:
        return [key.id for key in self.keyring.keys]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_keys(tmp_path / "keys.yaml", {"web": {}, "lab": {}})


@asynccontextmanager
async def watched(path: Path) -> AsyncIterator[FakeState]:
    settings = Settings(keys_file=path, api_key="env")
    state = FakeState(settings, open_keyring(settings))
    task = asyncio.create_task(watch_keys(cast(ServerState, state), 0.005))
    await asyncio.sleep(0.03)
    try:
        yield state
    finally:
        task.cancel()


def put(path: Path, text: str | None, *, is_kept: bool = False) -> None:
    """Write the file, before its old content if `is_kept`; None deletes it."""
    if text is None:
        path.unlink()
    else:
        path.write_text(text + (path.read_text() if is_kept else ""))


async def until(is_true: Callable[[], bool]) -> None:
    while not is_true():  # noqa: ASYNC110 - the watch has no event to wait for
        await asyncio.sleep(0.002)


async def test_keys_come_go_and_change(path: Path) -> None:
    with capture_logs() as lines:
        async with watched(path) as state:
            before = state.ids()
            write_keys(path, {"lab": {"max_concurrent": 1}, "new": {}})
            await until(lambda: "new" in state.ids())
            after = state.ids()

    assert before == ["web", "lab", "API_KEY"]
    assert after == ["lab", "new", "API_KEY"]
    assert lines == [
        {"event": "keys.reloaded", "log_level": "info", "added": ["new"], "removed": ["web"], "changed": ["lab"]}
    ]


@pytest.mark.parametrize("broken", ["- id: web\n  sha256: ey-secret\n", "no list", "[", None])
async def test_a_file_with_mistakes_changes_nothing_and_is_reported_once(path: Path, broken: str | None) -> None:
    with capture_logs() as lines:
        async with watched(path) as state:
            put(path, broken)
            await until(lambda: bool(lines))
            await asyncio.sleep(0.05)
            loaded_ids = state.ids()
            write_keys(path, {"web": {}, "lab": {}})
            await asyncio.sleep(0.05)

    assert loaded_ids == ["web", "lab", "API_KEY"]
    assert [line["event"] for line in lines] == ["keys.invalid"]
    assert lines[0]["log_level"] == "error"
    assert "secret" not in str(lines)
    assert str(path.parent) not in str(lines)


async def test_a_file_that_is_being_written_is_not_read(path: Path) -> None:
    """Truncated after an entry it would be valid and lack keys; so it must be unchanged between two polls."""
    async with watched(path) as state:
        with path.open("a") as file:
            for _ in range(40):
                file.write("# more\n" if file.tell() % 2 else "# and more\n")
                file.flush()
                await asyncio.sleep(0.004)
        first = state.keyring
        write_keys(path, {"web": {}})
        await until(lambda: state.ids() == ["web", "API_KEY"])

    assert state.keyring is not first


async def test_a_change_without_effect_is_not_reported(path: Path) -> None:
    with capture_logs() as lines:
        async with watched(path) as state:
            first = state.keyring
            put(path, "# a comment\n", is_kept=True)
            await asyncio.sleep(0.06)

    assert state.keyring is first
    assert lines == []


async def test_a_change_before_the_watch_began_is_seen(path: Path) -> None:
    settings = Settings(keys_file=path)
    state = FakeState(settings, open_keyring(settings))
    write_keys(path, {"early": {}})
    task = asyncio.create_task(watch_keys(cast(ServerState, state), 0.005))
    await until(lambda: state.ids() == ["early"])
    task.cancel()


def test_a_server_does_not_start_with_a_bad_file(path: Path) -> None:
    path.write_text("- id: web\n")
    with pytest.raises(KeysError):
        open_keyring(Settings(keys_file=path))


def test_a_running_server_lets_new_keys_in_and_revoked_ones_out(path: Path) -> None:
    with limited(Settings(keys_file=path)) as server:
        before = [server.embed(name).status_code for name in ("web", "lab", "new")]
        write_keys(path, {"lab": {}, "new": {}})
        began = time.monotonic()
        while server.embed("new").status_code != 200 and time.monotonic() < began + 20:
            time.sleep(0.01)
        after = [server.embed(name).status_code for name in ("web", "lab", "new")]

    assert before == [200, 200, 401]
    assert after == [401, 200, 200]
