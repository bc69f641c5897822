"""The registry read again while the server runs: on demand, on SIGHUP, or because the file has changed.

All or nothing: a file with mistakes changes nothing. What a change means for models in memory is the pool's business.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import structlog
from msgspec import structs

from engines.errors import EngineError
from engines.types import Budget
from router.auth.guards import Connection, Keyring, keyring_of
from router.auth.key_file import KeysError, read_keys
from router.config.settings import Settings
from router.registry.registry import Changes, Registry, RegistryError, diff, open_registry
from router.server.state import ServerState

log = structlog.get_logger()


LOOK_AT_KEYS_EVERY_S = 0.4
"""A change counts when the file has lain still between two looks, so it takes up to three of them."""


def open_keyring(settings: Settings) -> Keyring:
    """The keys of the settings, and those of the file that they name.

    Raises:
        KeysError: with every mistake in the file.
    """
    return keyring_of(settings, read_keys(settings.keys_file) if settings.keys_file else ())


@asynccontextmanager
async def keys_watched(server_state: ServerState) -> AsyncIterator[None]:
    """Inside, the yard's keyring follows the file, if there is one."""
    watch = asyncio.create_task(watch_keys(server_state)) if server_state.settings.keys_file else None
    try:
        yield
    finally:
        if watch is not None:
            watch.cancel()
            with suppress(asyncio.CancelledError):
                await watch


async def watch_keys(server_state: ServerState, every_s: float = LOOK_AT_KEYS_EVERY_S) -> None:
    """Read the file whenever it differs from what was read last. Runs until it is cancelled.

    The first look leads to a reading, too: the file may have changed since the server began to start.
    """
    path = server_state.settings.keys_file
    if path is None:
        return
    seen: FileFingerprint | None = await asyncio.to_thread(fingerprint_file, path)
    read: FileFingerprint | str | None = "nothing yet"
    while True:
        await asyncio.sleep(every_s)
        before, seen = seen, await asyncio.to_thread(fingerprint_file, path)
        if seen == before and seen != read:
            read = seen
            await _reload(server_state)


async def _reload(server_state: ServerState) -> None:
    try:
        keyring = await asyncio.to_thread(open_keyring, server_state.settings)
    except KeysError as error:
        log.error("keys.invalid", mistakes=[str(mistake) for mistake in error.mistakes])
        return
    except Exception:  # the watch goes on
        log.exception("keys.not_reloaded")
        return
    if keyring.keys == server_state.keyring.keys:
        return
    before = {key.id: key for key in server_state.keyring.keys}
    after = {key.id: key for key in keyring.keys}
    server_state.keyring = keyring
    log.info(
        "keys.reloaded",
        added=[name for name in after if name not in before],
        removed=[name for name in before if name not in after],
        changed=[name for name in after if name in before and after[name] != before[name]],
    )


LOOK_EVERY_S = 1.0
"""Between two looks at the file; a stat costs microseconds, and needs nothing that every disk does not have."""


class FileFingerprint(NamedTuple):
    """What a file's content cannot change without. The inode is for editors that put a new file in its place."""

    mtime_ns: int
    size_bytes: int
    inode: int


def fingerprint_file(path: Path) -> FileFingerprint | None:
    """The file now; None where there is none."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return FileFingerprint(stat.st_mtime_ns, stat.st_size, stat.st_ino)


class Reloader:
    """Brings the yard's registry up to date. It alone replaces it."""

    def __init__(self, server_state: ServerState) -> None:
        self._server_state = server_state
        self._settings = server_state.settings
        self._last: asyncio.Task[Changes] | None = None
        self._read: FileFingerprint | str | None = "nothing yet"

    async def reload(self) -> Changes:
        """Read the file now, and serve what it says; goes on when the caller leaves.

        Reloads never overlap: one that is asked for meanwhile reads the file once more after this one.

        Raises:
            RegistryError: with every mistake; nothing has changed.
            ShuttingDown: too late.
        """
        self._last = task = asyncio.create_task(self._after(self._last))
        task.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
        return await asyncio.shield(task)

    async def reload_and_log(self) -> None:
        """The same where nobody waits for an answer; what was wrong goes to the log."""
        try:
            await self.reload()
        except RegistryError as error:
            mistakes = [str(mistake) for mistake in error.mistakes]
            log.error("registry.invalid", file=self._settings.registry.name, mistakes=mistakes)
        except EngineError as error:
            log.warning("registry.not_reloaded", reason=str(error))
        except Exception:  # the watch goes on
            log.exception("registry.not_reloaded")

    async def watch(self, every_s: float = LOOK_EVERY_S) -> None:
        """Reload whenever the file differs from what was read last. Runs until it is cancelled.

        A file that is being written may be right and yet not whole, so it must have lain still since the last look.
        """
        seen: FileFingerprint | None = None
        while True:
            await asyncio.sleep(every_s)
            before, seen = seen, await asyncio.to_thread(fingerprint_file, self._settings.registry)
            if seen == before and seen != self._read:
                await self.reload_and_log()

    async def _after(self, previous: asyncio.Task[Changes] | None) -> Changes:
        if previous is not None:
            await asyncio.wait({previous})
        self._read = await asyncio.to_thread(fingerprint_file, self._settings.registry)
        registry = await asyncio.to_thread(open_registry, self._settings)
        changes = diff(self._server_state.registry, registry)
        await self._server_state.backend.reload(registry.models, self._new_budget(registry, changes))
        self._server_state.registry = registry
        if not changes.is_empty:
            log.info("registry.reloaded", **structs.asdict(changes))
        return changes

    def _new_budget(self, registry: Registry, changes: Changes) -> Budget | None:
        """`MEMORY_BUDGET` overrules the file."""
        return registry.memory_budget if changes.is_budget_changed and self._settings.memory_budget is None else None


def reloader_of(connection: Connection) -> Reloader:
    """Return the reloader of the server that a connection belongs to."""
    reloader: Reloader = connection.app.state.reloader
    return reloader
