"""Hashes model files while the host is idle, one model at a time, loaded models first.

A file damaged after its download can still load, and the self-check runs only at the first load: only a hash finds it.
"""

import asyncio
from collections.abc import Callable, Coroutine

import structlog

from engines.pool.effect_runner import EffectRunner
from engines.pool.messages import FilesDamaged, PoolEvent
from engines.pool.runtime import Time
from engines.pool.slot import Slot
from engines.pool.state import PoolState

log = structlog.get_logger(__name__)

IDLE_S = 5.0
"""Seconds without a request after which a host counts as idle."""

RECHECK_S = 60.0
"""Seconds until a model's files are checked again for changes; unchanged files are not read again."""


class IdleVerification:
    """Chooses the next model to verify. Runs on the event loop of its pool; `spawn` holds the task."""

    def __init__(
        self,
        runner: EffectRunner,
        state: PoolState,
        time: Time,
        step: Callable[[PoolEvent], None],
        spawn: Callable[[Coroutine[None, None, None]], asyncio.Task[None]],
    ) -> None:
        self._runner = runner
        self._state = state
        self._time = time
        self._step = step
        self._spawn = spawn
        self._due_s: dict[int, float] = {}
        self._task: asyncio.Task[None] | None = None

    def start_if_idle(self) -> None:
        """Starts to verify the next model if the host is idle. Call it about once a second."""
        now_s = self._time.now_s()
        if self._task is not None or not self._is_idle(now_s):
            return
        slot = next((slot for slot in self._candidates() if self._due_s.get(slot.slot_id, now_s) <= now_s), None)
        if slot is not None:
            self._task = self._spawn(self._verify(slot))
            self._task.add_done_callback(self._on_done)

    def _is_idle(self, now_s: float) -> bool:
        if not self._is_unused() or self._state.in_state("fetching", "waiting_space", "loading", "warming"):
            return False
        used = (slot.last_used_at_s for slot in self._state.slots.values())
        return all(used_s is None or now_s - used_s >= IDLE_S for used_s in used)

    def _is_unused(self) -> bool:
        """Tells whether no request or command is pending. Also called from the hashing thread."""
        return not self._state.holders and not self._state.is_draining

    def _candidates(self) -> list[Slot]:
        slots = [slot for slot in self._state.current.values() if slot.files and slot.state in ("ready", "cold")]
        return sorted(slots, key=lambda slot: slot.state != "ready")

    async def _verify(self, slot: Slot) -> None:
        assert slot.files is not None, "candidates have files"
        failure = await self._runner.verify(slot.spec, slot.files, self._is_unused)
        if failure is not None:
            log.error("model.files_damaged", model=slot.model_id, file=failure.file, reason=failure.message)
            self._step(FilesDamaged(slot.slot_id, slot.files, failure))
        if failure is not None or self._is_unused():
            self._due_s = {known: at_s for known, at_s in self._due_s.items() if known in self._state.slots}
            self._due_s[slot.slot_id] = self._time.now_s() + RECHECK_S

    def _on_done(self, task: asyncio.Task[None]) -> None:
        self._task = None
