"""Reloads the registry and the key file while the server runs: on demand, on SIGHUP, or when a file changes.

All or nothing: a file with mistakes changes nothing. The pool applies the changes to models in memory.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import structlog
from msgspec import structs

from engines.errors import EngineError
from engines.types import Budget, HostBudget
from router.auth.guards import Connection, Keyring, keyring_of
from router.auth.key_file import KeysError, read_keys
from router.config.settings import Settings
from router.registry.opening import open_registry
from router.registry.registry import Changes, Registry, RegistryError, diff
from router.server.state import ServerState

log = structlog.get_logger()

KEYS_POLL_INTERVAL_S = 0.4
"""A change is applied when the file is the same in two polls in a row, so it takes up to three polls."""


def open_keyring(settings: Settings) -> Keyring:
    """Load the keys from the settings and from the key file.

    Raises:
        KeysError: with every mistake in the file.
    """
    return keyring_of(settings, read_keys(settings.keys_file) if settings.keys_file else ())


@asynccontextmanager
async def watched_keys(server_state: ServerState) -> AsyncIterator[None]:
    """Reload the keyring when the key file changes, while the block runs; does nothing without a key file."""
    watch = asyncio.create_task(watch_keys(server_state)) if server_state.settings.keys_file else None
    try:
        yield
    finally:
        if watch is not None:
            watch.cancel()
            with suppress(asyncio.CancelledError):
                await watch


async def watch_keys(server_state: ServerState, interval_s: float = KEYS_POLL_INTERVAL_S) -> None:
    """Load the key file whenever it differs from what was loaded last. Runs until it is cancelled.

    Loads it after the first poll, too: the file may have changed since the server started.
    """
    path = server_state.settings.keys_file
    if path is None:
        return
    seen: FileFingerprint | None = await asyncio.to_thread(fingerprint_file, path)
    loaded: FileFingerprint | str | None = "nothing yet"
    while True:
        await asyncio.sleep(interval_s)
        before, seen = seen, await asyncio.to_thread(fingerprint_file, path)
        if seen == before and seen != loaded:
            loaded = seen
            await _reload(server_state)


async def _reload(server_state: ServerState) -> None:
    try:
        keyring = await asyncio.to_thread(open_keyring, server_state.settings)
    except KeysError as error:
        log.error("keys.invalid", mistakes=[str(mistake) for mistake in error.mistakes])
        return
    except Exception:  # keep watching
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


POLL_INTERVAL_S = 1.0
"""A stat takes microseconds and works on every file system."""


class FileFingerprint(NamedTuple):
    """Identifies a version of a file. The inode is for editors that replace the file."""

    mtime_ns: int
    size_bytes: int
    inode: int


def fingerprint_file(path: Path) -> FileFingerprint | None:
    """Take the file's fingerprint; None when it does not exist."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return FileFingerprint(stat.st_mtime_ns, stat.st_size, stat.st_ino)


class Reloader:
    """Reloads the registry of `ServerState`; nothing else replaces it."""

    def __init__(self, server_state: ServerState) -> None:
        self._server_state = server_state
        self._settings = server_state.settings
        self._last: asyncio.Task[Changes] | None = None
        self._loaded: FileFingerprint | str | None = "nothing yet"

    async def reload(self) -> Changes:
        """Load the file now and apply it; continues when the caller is cancelled.

        Reloads never overlap: a second one loads the file again after the first.

        Raises:
            RegistryError: with every mistake; nothing was changed.
            ShuttingDown: the server is shutting down.
        """
        self._last = task = asyncio.create_task(self._after(self._last))
        task.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
        return await asyncio.shield(task)

    async def reload_and_log(self) -> None:
        """Reload, and log errors instead of raising them."""
        try:
            await self.reload()
        except RegistryError as error:
            mistakes = [str(mistake) for mistake in error.mistakes]
            log.error("registry.invalid", file=self._settings.registry.name, mistakes=mistakes)
        except EngineError as error:
            log.warning("registry.not_reloaded", reason=str(error))
        except Exception:  # keep watching
            log.exception("registry.not_reloaded")

    async def watch(self, interval_s: float = POLL_INTERVAL_S) -> None:
        """Reload whenever the file differs from what was loaded last. Runs until it is cancelled.

        A half-written file may be valid, so a change is applied only when the file is the same in two polls.
        """
        seen: FileFingerprint | None = None
        while True:
            await asyncio.sleep(interval_s)
            before, seen = seen, await asyncio.to_thread(fingerprint_file, self._settings.registry)
            if seen == before and seen != self._loaded:
                await self.reload_and_log()

    async def _after(self, previous: asyncio.Task[Changes] | None) -> Changes:
        if previous is not None:
            await asyncio.wait({previous})
        self._loaded = await asyncio.to_thread(fingerprint_file, self._settings.registry)
        needs_file = self._server_state.registry.is_from_file
        registry = await asyncio.to_thread(open_registry, self._settings, needs_file=needs_file)
        changes = diff(self._server_state.registry, registry)
        host_budget = self._new_host_budget(registry)
        await self._server_state.backend.reload(registry.models, self._new_budget(registry, changes), host_budget)
        if registry.eviction != self._server_state.registry.eviction:
            log.warning("registry.needs_restart", key="memory.eviction")
        if host_budget is not None:
            log.info("registry.host_budget_changed", host_budget=str(host_budget))
        self._server_state.registry = registry
        if not changes.is_empty:
            log.info("registry.reloaded", **structs.asdict(changes))
        return changes

    def _new_budget(self, registry: Registry, changes: Changes) -> Budget | None:
        """Return the new budget; None when unchanged, or overridden by `MEMORY_BUDGET`."""
        return registry.memory_budget if changes.is_budget_changed and self._settings.memory_budget is None else None

    def _new_host_budget(self, registry: Registry) -> HostBudget | None:
        """Return the new main memory for parked models; None when unchanged, or overridden by `HOST_MEMORY_BUDGET`."""
        is_changed = registry.host_memory_budget != self._server_state.registry.host_memory_budget
        if not is_changed or self._settings.host_memory_budget is not None:
            return None
        return registry.host_memory_budget or "auto"


def reloader_of(connection: Connection) -> Reloader:
    """Return the reloader of the server that a connection belongs to."""
    reloader: Reloader = connection.app.state.reloader
    return reloader
