"""How outside work ends for a slot: files, loads, warm-ups, unloads, and what follows a failure.

Every handler first takes the work back (`finish`), so a report that nobody waits for is a bug that shows at once.
"""

from collections.abc import Callable

from engines.pool.eviction import total_bytes
from engines.pool.messages import (
    Damaged,
    Discard,
    DownloadCompleted,
    DownloadErrored,
    DownloadProgressed,
    Emit,
    FilesDiscarded,
    FilesFound,
    FilesLocated,
    LoadCompleted,
    LoadErrored,
    SizeEstimated,
    StartFetch,
    StartLocate,
    StartWarm,
    UnloadCompleted,
    WarmUpCompleted,
    WarmUpErrored,
)
from engines.pool.reasons import DAMAGED, EVICTED, load_error, too_large
from engines.pool.slot import LoadFailure, MemoryNeed, Slot
from engines.pool.state import PoolState


class CompletionHandlers:
    """The half of the pool's handlers that the shell's reports go to."""

    def __init__(self, state: PoolState, jitter: Callable[[], float]) -> None:
        self.state = state
        self._jitter = jitter
        self.handlers: dict[type, Callable[..., bool | None]] = {
            FilesFound: self._found,
            SizeEstimated: self._sized,
            FilesLocated: self._located,
            DownloadCompleted: self._fetched,
            DownloadErrored: self._fetch_failed,
            DownloadProgressed: self._fetch_progress,
            FilesDiscarded: self._discarded,
            Damaged: self._damaged,
            LoadCompleted: self._loaded,
            LoadErrored: self._load_failed,
            WarmUpCompleted: self._warmed,
            WarmUpErrored: self._warm_failed,
            UnloadCompleted: self._unloaded,
        }

    # ---- files ----

    def _found(self, event: FilesFound) -> None:
        slot = self.state.slots.get(event.slot_id)
        if slot is not None and slot.state == "absent":
            slot.files, slot.need = event.files, event.need
            self.state.move(slot, "cold", "found on disk")

    def _sized(self, event: SizeEstimated) -> bool:
        slot = self.state.slots.get(event.slot_id)
        if slot is not None and slot.need is None:
            slot.need = event.need
        return True

    def _located(self, event: FilesLocated) -> None:
        """Five cases:

        1. replaced meanwhile;  2. on disk: cold;  3. known never to fit: refused before the download;
        4. not wanted any more;  5. download it.
        """
        slot = self.state.finish(event.slot_id, "locate")
        slot.need = event.need
        if slot.is_retired:
            self.state.retire(slot)  # (1)
        elif event.files is not None:
            slot.files = event.files
            self._cold(slot, "found on disk")  # (2)
        elif self.state.is_too_large(slot.need):
            self._refuse(slot)
            self.state.move(slot, "absent", "never fits: not downloaded")  # (3)
        elif slot.claim is None:
            self.state.move(slot, "absent", "not wanted any more")  # (4)
        else:
            self.state.start(slot, StartFetch(slot.slot_id, slot.spec))  # (5)

    def _fetched(self, event: DownloadCompleted) -> None:
        slot = self.state.finish(event.slot_id, "fetch")
        slot.files, slot.need = event.files, event.need
        if slot.is_retired:
            self.state.retire(slot)
            return
        self._cold(slot, "files are on disk")

    def _cold(self, slot: Slot, cause: str) -> None:
        if self.state.is_too_large(slot.need):
            self._refuse(slot)
        self.state.move(slot, "cold", cause)

    def _refuse(self, slot: Slot) -> None:
        self.state.fail_waiters(slot, lambda: too_large(slot, self.state.budget_bytes))
        slot.claim, slot.is_wanted = None, False

    def _fetch_failed(self, event: DownloadErrored) -> None:
        self._after_failure(self.state.finish(event.slot_id, "locate", "fetch"), event.failure)

    def _fetch_progress(self, event: DownloadProgressed) -> bool:
        """A report may arrive after the end of its download: it is dropped."""
        slot = self.state.slots.get(event.slot_id)
        if slot is not None and slot.work == "fetch":
            slot.fetched_bytes, slot.fetch_total_bytes = event.done_bytes, event.total_bytes
            self.state.effects.append(
                Emit(
                    slot.slot_id,
                    slot.model_id,
                    "progress",
                    slot.state,
                    slot.state,
                    done_bytes=event.done_bytes,
                    total_bytes=event.total_bytes,
                )
            )
        return True

    def _discarded(self, event: FilesDiscarded) -> None:
        slot = self.state.finish(event.slot_id, "discard")
        if slot.is_retired:
            self.state.retire(slot)
        elif event.is_removed and not self.state.is_draining:
            self.state.start(slot, StartFetch(slot.slot_id, slot.spec))
        elif slot.failure is not None:
            self._quarantine(slot, slot.failure)

    def _damaged(self, event: Damaged) -> None:
        """Three cases:

        1. other files meanwhile, or on its way;
        2. in memory: what it gives may be wrong, so it leaves, and comes back from good files;
        3. not in memory: the next load sees it, and fetches them.
        """
        slot = self.state.slots.get(event.slot_id)
        if slot is None or slot.is_retired or slot.files != event.files or slot.state not in ("ready", "cold"):
            return  # (1)
        slot.failure = event.failure
        if slot.state == "ready":
            slot.is_wanted = True
            self.state.make_claim(slot)
            self.state.drain(slot, DAMAGED)  # (2), (3)

    # ---- engines ----

    def _loaded(self, event: LoadCompleted) -> None:
        """Nobody needs it any more: it goes as it came. Else it warms up."""
        slot = self.state.finish(event.slot_id, "load")
        slot.failure = None
        if slot.is_retired or (self.state.is_draining and not slot.waiters):
            self.state.unload(slot, slot.leaving_cause or "")
            return
        self.state.move(slot, "warming", "loaded")
        self.state.start(slot, StartWarm(slot.slot_id))

    def _load_failed(self, event: LoadErrored) -> None:
        slot = self.state.finish(event.slot_id, "load")
        if not slot.is_retired:
            self._end_eviction(slot)
            slot.leaving_cause = None
        self.state.notify_evictors(slot)
        self._after_failure(slot, event.failure)

    def _warmed(self, event: WarmUpCompleted) -> None:
        """Four cases, the true bytes being known now:

        1. replaced meanwhile: unloaded;  2. over the budget all alone: refused and unloaded;
        3. ready: all who wait are granted in this step;  4. and if somebody wants it gone, it drains after them.
        """
        slot = self.state.finish(event.slot_id, "warm")
        slot.load_s = self.state.now_s - slot.load_began_at_s
        slot.reserved = slot.need = MemoryNeed(
            weight_bytes=event.weight_bytes,
            workspace_bytes=event.workspace_bytes,
            weights_known=True,
            workspace_known=True,
            load_s=slot.load_s,
        )
        if slot.is_retired:
            self.state.unload(slot, slot.leaving_cause or "")  # (1)
            return
        if total_bytes([slot.need]) > self.state.budget_bytes:
            self._refuse(slot)
            self.state.unload(slot, "measured larger than the whole budget")  # (2)
            return
        self.state.move(slot, "ready", f"loaded and warm after {slot.load_s:.1f} s")
        slot.ready_at_s, slot.loads = self.state.now_s, slot.loads + 1
        slot.keep_alive_override_s = None
        slot.claim, slot.is_wanted, slot.failure, slot.attempts = None, False, None, 0
        slot.had_oom = slot.had_refetch = False
        self.state.grant_all(slot)  # (3)
        if slot.leaving_cause is not None:
            self.state.drain(slot, slot.leaving_cause)  # (4)

    def _warm_failed(self, event: WarmUpErrored) -> None:
        slot = self.state.finish(event.slot_id, "warm")
        slot.failure = event.failure
        self.state.unload(slot, f"failed to warm up ({event.failure.kind})")

    def _unloaded(self, event: UnloadCompleted) -> None:
        """Only now are the bytes free. Three cases: 1. retired 2. it was no good 3. cold."""
        slot = self.state.finish(event.slot_id, "unload")
        failure, slot.failure = slot.failure, None
        if slot.is_retired:
            self.state.retire(slot)  # (1)
            return
        if failure is not None:
            self._end_eviction(slot)
        slot.leaving_cause = slot.leaving_for = None
        self.state.notify_evictors(slot)
        if failure is not None:
            self._after_failure(slot, failure)  # (2)
        else:
            self.state.move(slot, "cold", "its memory is free")  # (3)

    def _end_eviction(self, slot: Slot) -> None:
        """A failed load is not tried again for those who wanted the model before an operator wanted it away."""
        if slot.leaving_cause == EVICTED:
            self.state.forget_wishes(slot)

    # ---- failures ----

    def _after_failure(self, slot: Slot, failure: LoadFailure) -> None:
        """Nothing is held in memory any more. Five cases:

        1. retired;  2. out of memory, for the first time: a higher estimate, and once more;
        3. broken files, for the first time: remove them, and fetch once more;
        4. other files than expected, for the first time: look at them again;  5. quarantine.
        """
        slot.failure = failure
        may_retry = not self.state.is_draining
        if slot.is_retired:
            self.state.retire(slot)  # (1)
        elif failure.is_oom and slot.need and not slot.had_oom and may_retry and slot.state != "fetching":
            slot.had_oom = True
            slot.need = slot.need.scaled(self.state.rules.oom_growth)
            self.state.move(slot, "cold", "out of memory: once more with a higher estimate")  # (2)
        elif failure.is_broken and not slot.had_refetch and may_retry:
            slot.had_refetch, slot.files = True, None
            if slot.state != "fetching":
                self.state.move(slot, "fetching", "broken files: fetching them once more")
            self.state.start(slot, Discard(slot.slot_id, slot.spec, failure.file))  # (3)
        elif failure.is_changed and not slot.had_refetch and may_retry:
            slot.had_refetch, slot.files = True, None
            self.state.move(slot, "fetching", "its files have changed: looking at them again")
            self.state.start(slot, StartLocate(slot.slot_id, slot.spec))  # (4)
        else:
            self._quarantine(slot, failure)  # (5)

    def _quarantine(self, slot: Slot, failure: LoadFailure) -> None:
        """Longer each time, and longer still where only a person can help; all waiters get the cause now."""
        first_s, longest_s = self.state.rules.retry_denied_s if failure.is_denied else self.state.rules.retry_s
        delay_s = min(longest_s, first_s * 2.0**slot.attempts) * (0.9 + 0.2 * self._jitter())
        slot.attempts += 1
        slot.retry_at_s = self.state.now_s + delay_s
        if failure.is_broken or failure.is_changed:
            slot.files = None
        slot.claim, slot.leaving_cause = None, None
        self.state.move(slot, "failed", f"{failure.kind}: {failure.message}; next attempt in {delay_s:.0f} s")
        self.state.fail_waiters(slot, lambda: load_error(slot, failure, self.state.now_s))
