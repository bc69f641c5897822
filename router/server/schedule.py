"""Preloads models at the times that the registry states (`preload_at`), in the server's local time."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from datetime import datetime, timedelta

import structlog
from cronsim import CronSim

from engines.errors import EngineError
from engines.spec import ModelSpec
from router.server.state import ServerState

log = structlog.get_logger()

CHECK_EVERY_S = 15.0
_MAX_SET_BACK = timedelta(hours=2)
"""A clock that is set back by more was corrected by hand; by less, summer time ended, and no time may come twice."""


class Schedule:
    """Remembers until when times have come, so that each comes once, whatever the clock does.

    Args:
        now: local time, without a time zone.
    """

    def __init__(self, now: datetime) -> None:
        self._until = now

    def due(self, specs: Iterable[ModelSpec], now: datetime) -> Sequence[ModelSpec]:
        """Return the models of which a time has come since the last call. Several times of one model count once: those
        of an hour that summer time skips, and those that passed while the machine slept."""
        since = self._until
        if now < since - _MAX_SET_BACK:
            self._until = now
            return ()
        self._until = max(since, now)
        return [spec for spec in specs if spec.preload_at is not None and next(CronSim(spec.preload_at, since)) <= now]


async def run_schedule(
    server_state: ServerState,
    now: Callable[[], datetime] = datetime.now,  # local time is what operators mean
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> None:
    """Start the preloads of the registry in use whenever their time comes. Runs until it is cancelled."""
    schedule = Schedule(now())
    while True:
        await sleep(CHECK_EVERY_S)
        for spec in schedule.due(server_state.registry.models.values(), now()):
            await _preload(server_state, spec.model_id)


async def _preload(server_state: ServerState, model_id: str) -> None:
    try:
        status = await server_state.backend.preload(model_id, pin=False, wait=False)
    except EngineError as error:
        log.warning("schedule.not_preloaded", model=model_id, reason=str(error))
        return
    log.info("schedule.preloading", model=model_id, state=status.state)
