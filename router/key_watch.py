"""The keys file read again while the server runs, whenever it changes: a revoked key is refused a second later.

A file with mistakes, or none at all, changes nothing: the keys from before stay, and the log says why.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import structlog

from router.auth import Keyring, keyring_of
from router.keys_file import KeysError, read_keys
from router.reload import Stamp, look
from router.settings import Settings
from router.yard import Yard

log = structlog.get_logger()

LOOK_EVERY_S = 0.4
"""A change counts when the file has lain still between two looks, so it takes up to three of them."""


def open_keyring(settings: Settings) -> Keyring:
    """The keys of the settings, and those of the file that they name.

    Raises:
        KeysError: with every mistake in the file.
    """
    return keyring_of(settings, read_keys(settings.keys_file) if settings.keys_file else ())


@asynccontextmanager
async def keys_watched(yard: Yard) -> AsyncIterator[None]:
    """Inside, the yard's keyring follows the file, if there is one."""
    watch = asyncio.create_task(watch_keys(yard)) if yard.settings.keys_file else None
    try:
        yield
    finally:
        if watch is not None:
            watch.cancel()
            with suppress(asyncio.CancelledError):
                await watch


async def watch_keys(yard: Yard, every_s: float = LOOK_EVERY_S) -> None:
    """Read the file whenever it differs from what was read last. Runs until it is cancelled.

    The first look leads to a reading, too: the file may have changed since the server began to start.
    """
    path = yard.settings.keys_file
    if path is None:
        return
    seen: Stamp | None = await asyncio.to_thread(look, path)
    read: Stamp | str | None = "nothing yet"
    while True:
        await asyncio.sleep(every_s)
        before, seen = seen, await asyncio.to_thread(look, path)
        if seen == before and seen != read:
            read = seen
            await _reload(yard)


async def _reload(yard: Yard) -> None:
    try:
        keyring = await asyncio.to_thread(open_keyring, yard.settings)
    except KeysError as error:
        log.error("keys.invalid", mistakes=[str(mistake) for mistake in error.mistakes])
        return
    except Exception:  # the watch goes on
        log.exception("keys.not_reloaded")
        return
    if keyring.keys == yard.keyring.keys:
        return
    before = {key.id: key for key in yard.keyring.keys}
    after = {key.id: key for key in keyring.keys}
    yard.keyring = keyring
    log.info(
        "keys.reloaded",
        added=[name for name in after if name not in before],
        removed=[name for name in before if name not in after],
        changed=[name for name in after if name in before and after[name] != before[name]],
    )
