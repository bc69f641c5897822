"""Handles the results of asynchronous work: files, loads, warm-ups, unloads; retries or quarantines after failures.

Every handler first calls `PoolState.finish`, which raises if that work was not running.
"""

from collections.abc import Callable

from msgspec import structs

from engines.pool.eviction import total_bytes
from engines.pool.messages import (
    Discard,
    DownloadCompleted,
    DownloadErrored,
    DownloadProgressed,
    Emit,
    FilesDamaged,
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
from engines.pool.reasons import DAMAGED, EVICTED, load_error
from engines.pool.slot import LoadFailure, MemoryNeed, Slot, Split
from engines.pool.splitting import with_measured
from engines.pool.state import PoolState


class CompletionHandlers:
    """The state machine's handlers for the results of asynchronous work."""

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
            FilesDamaged: self._damaged,
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
        """Handles the end of the search on disk. Five cases:

        1. replaced in the meantime;  2. on disk: cold;  3. certainly too large: refused before the download;
        4. no longer requested;  5. download the files.
        """
        slot = self.state.finish(event.slot_id, "locate")
        slot.need = event.need
        if slot.is_retired:
            self.state.retire(slot)  # (1)
        elif event.files is not None:
            slot.files = event.files
            self._become_cold(slot, "found on disk")  # (2)
        elif self.state.is_too_large(slot.need):
            self._refuse(slot)
            self.state.move(slot, "absent", "too large: not downloaded")  # (3)
        elif slot.claim is None:
            self.state.move(slot, "absent", "no longer requested")  # (4)
        else:
            self.state.start(slot, StartFetch(slot.slot_id, slot.spec))  # (5)

    def _fetched(self, event: DownloadCompleted) -> None:
        slot = self.state.finish(event.slot_id, "fetch")
        slot.files, slot.need = event.files, event.need
        if slot.is_retired:
            self.state.retire(slot)
            return
        self._become_cold(slot, "files are on disk")

    def _become_cold(self, slot: Slot, cause: str) -> None:
        if self.state.is_too_large(slot.need):
            self._refuse(slot)
        self.state.move(slot, "cold", cause)

    def _refuse(self, slot: Slot) -> None:
        self.state.fail_waiters(slot, lambda: self.state.too_large(slot))
        slot.claim, slot.is_wanted = None, False

    def _fetch_failed(self, event: DownloadErrored) -> None:
        self._after_failure(self.state.finish(event.slot_id, "locate", "fetch"), event.failure)

    def _fetch_progress(self, event: DownloadProgressed) -> bool:
        """Emits a progress event; drops a report that arrives after the end of its download."""
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

    def _damaged(self, event: FilesDamaged) -> None:
        """Handles damaged files. Three cases:

        1. the slot has other files by now, or is changing state: ignored;
        2. ready: its vectors may be wrong, so it is evicted, and reloaded from files downloaded again;
        3. cold: the next load detects the damage and downloads the files again;
        4. parked: its weights may be wrong, so they are freed, and the files downloaded again.
        """
        slot = self.state.slots.get(event.slot_id)
        is_current = slot is not None and slot.files == event.files and not slot.is_retired
        if slot is None or not is_current or slot.state not in ("ready", "cold", "parked"):
            return  # (1)
        slot.failure = event.failure
        if slot.state == "ready":
            slot.is_wanted = True
            self.state.make_claim(slot)
            self.state.drain(slot, DAMAGED)  # (2), (3)
        elif slot.state == "parked":
            self.state.unload(slot, DAMAGED)  # (4)

    # ---- engines ----

    def _loaded(self, event: LoadCompleted) -> None:
        """Warms the engine up, or unloads it if its slot is retired, or the host drains and no request waits for it."""
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
            self._clear_preload_if_evicted(slot)
            slot.leaving_cause = slot.leaves_to = None
        self.state.notify_evictors(slot)
        self._after_failure(slot, event.failure)

    def _warmed(self, event: WarmUpCompleted) -> None:
        """Charges the measured bytes. Four cases:

        1. replaced in the meantime: unloaded;  2. larger than the whole budget: refused and unloaded;
        3. ready: all waiters are granted in this step;  4. and if it is being evicted, it drains after them.
        """
        slot = self.state.finish(event.slot_id, "warm")
        slot.load_s, slot.came_s = self.state.now_s - slot.load_began_at_s, None
        if slot.split is not None:
            self._warmed_split(slot, slot.split, event)
            return
        slot.reserved = slot.measured = measured = MemoryNeed(
            weight_bytes=event.weight_bytes,
            workspace_bytes=event.workspace_bytes,
            weights_known=True,
            workspace_known=True,
            load_s=slot.load_s,
        )
        slot.need = (slot.need or measured).measured_as(slot.form, measured)
        if slot.is_retired:
            self.state.unload(slot, slot.leaving_cause or "")  # (1)
            return
        if total_bytes([measured]) > self.state.budget_bytes:
            self._refuse(slot)
            self.state.unload(slot, "measured larger than the whole budget")  # (2)
            return
        self._become_ready(slot)

    def _warmed_split(self, slot: Slot, split: Split, event: WarmUpCompleted) -> None:
        """Charges the measured bytes of a split model to each budget: cases 1, 3 and 4 of `_warmed`. A share that is
        over its budget is a deficit there."""
        self.state.neighbours.place(slot, self.state.index, with_measured(split, event))
        if slot.need is not None:
            slot.need = structs.replace(slot.need, workspace_bytes=event.workspace_bytes)
        if slot.is_retired:
            self.state.unload(slot, slot.leaving_cause or "")
            return
        self._become_ready(slot)

    def _become_ready(self, slot: Slot) -> None:
        self.state.move(slot, "ready", f"loaded and warm after {slot.load_s:.1f} s")
        slot.ready_at_s, slot.loads = self.state.now_s, slot.loads + 1
        slot.failure, slot.attempts = None, 0
        slot.had_oom = slot.had_refetch = False
        become_ready(self.state, slot)  # (3), (4)

    def _warm_failed(self, event: WarmUpErrored) -> None:
        slot = self.state.finish(event.slot_id, "warm")
        slot.failure = event.failure
        self.state.unload(slot, f"failed to warm up ({event.failure.kind})")

    def _unloaded(self, event: UnloadCompleted) -> None:
        """Frees the charged bytes. Three cases: 1. retired 2. unloaded because of a failure 3. cold."""
        slot = self.state.finish(event.slot_id, "unload")
        failure, slot.failure = slot.failure, None
        if slot.is_retired:
            self.state.retire(slot)  # (1)
            return
        if failure is not None:
            self._clear_preload_if_evicted(slot)
        slot.leaving_cause = slot.leaving_for = slot.leaves_to = None
        self.state.notify_evictors(slot)
        if failure is not None:
            self._after_failure(slot, failure)  # (2)
        else:
            self.state.move(slot, "cold", "its memory is free")  # (3)

    def _clear_preload_if_evicted(self, slot: Slot) -> None:
        """Drops pin and preload of an evicted model after a failure, so that it is not retried."""
        if slot.leaving_cause == EVICTED:
            self.state.clear_preload(slot)

    # ---- failures ----

    def _after_failure(self, slot: Slot, failure: LoadFailure) -> None:
        """Retries or quarantines a slot that holds no memory any more. Five cases:

        1. retired;  2. out of memory for the first time: retry with a higher estimate;
        3. broken files for the first time: delete them and download them again;
        4. changed files for the first time: locate them again;  5. quarantine.
        """
        slot.failure = failure
        may_retry = not self.state.is_draining
        if slot.is_retired:
            self.state.retire(slot)  # (1)
        elif failure.is_oom and slot.need and not slot.had_oom and may_retry and slot.state != "fetching":
            slot.had_oom = True
            slot.need = slot.need.scaled(self.state.rules.oom_growth)
            self.state.move(slot, "cold", "out of memory: retrying with a higher estimate")  # (2)
        elif failure.is_broken and not slot.had_refetch and may_retry:
            slot.had_refetch, slot.files = True, None
            if slot.state != "fetching":
                self.state.move(slot, "fetching", "broken files: downloading them again")
            self.state.start(slot, Discard(slot.slot_id, slot.spec, failure.file))  # (3)
        elif failure.is_changed and not slot.had_refetch and may_retry:
            slot.had_refetch, slot.files = True, None
            self.state.move(slot, "fetching", "files changed: locating them again")
            self.state.start(slot, StartLocate(slot.slot_id, slot.spec))  # (4)
        else:
            self._quarantine(slot, failure)  # (5)

    def _quarantine(self, slot: Slot, failure: LoadFailure) -> None:
        """Blocks loads for a delay that doubles each time, longer if only a person can help; fails all waiters now."""
        first_s, longest_s = self.state.rules.retry_denied_s if failure.is_denied else self.state.rules.retry_s
        delay_s = min(longest_s, first_s * 2.0**slot.attempts) * (0.9 + 0.2 * self._jitter())
        slot.attempts += 1
        slot.retry_at_s = self.state.now_s + delay_s
        if failure.is_broken or failure.is_changed:
            slot.files = None
        slot.claim = slot.leaving_cause = slot.leaves_to = None
        self.state.move(slot, "failed", f"{failure.kind}: {failure.message}; next attempt after {delay_s:.0f} s")
        self.state.fail_waiters(slot, lambda: load_error(slot, failure, self.state.now_s))


def become_ready(state: PoolState, slot: Slot) -> None:
    """Grants the waiters of a slot that has just become ready; if it is being evicted, it drains after them."""
    slot.keep_alive_override_s = None
    slot.claim, slot.is_wanted = None, False
    state.grant_all(slot)
    if slot.leaving_cause is not None:
        state.drain(slot, slot.leaving_cause)
