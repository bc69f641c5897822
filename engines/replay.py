"""Replays the requests of a day in virtual time, through the pool's own state machine; no engine runs.

    replay(trace, budget_bytes=24 * 2**30, rules=PoolPolicy(eviction="cost"))

Loads take as long as they did, copies between main memory and the device as long as they did or as their bytes take at
a given rate, requests hold their lease as long as they did, and nothing else takes time. Loads and copies follow each
other on one thread, as in a server. So the result tells what other budgets, orders of eviction or pinned models would
have cost in loads and waits; it does not tell how models slow each other down.
"""

import heapq
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from typing import Any

from msgspec import Struct, structs

from engines.pool.messages import (
    ArmTimer,
    BudgetChanged,
    Fail,
    FilesFound,
    Grant,
    LeaseReleased,
    LeaseRequested,
    LoadCompleted,
    ParkCompleted,
    PoolEvent,
    PreloadRequested,
    ReadMemory,
    StartLoad,
    StartPark,
    StartUnload,
    StartWake,
    StartWarm,
    TimerFired,
    UnloadCompleted,
    WakeCompleted,
    WarmUpCompleted,
)
from engines.pool.slot import CHARGED, MemoryNeed, PoolPolicy
from engines.pool.state_machine import PoolStateMachine
from engines.pool.victim_order import COPIED_BYTES_PER_S
from engines.spec import ModelSpec
from engines.trace import Trace, TraceModel, TraceRequest
from engines.types import ModelFiles

__all__ = ["PoolPolicy", "ReplayOptions", "ReplayResult", "TierRates", "replay"]

LOAD_TIMEOUT_S = 300.0
"""How long a request waits for its model, as by default."""


class TierRates(Struct, frozen=True, kw_only=True):
    """How fast models move, where a trace does not have the seconds.

    Args:
        disk_bytes_per_s: from disk to the device, building included.
        copy_bytes_per_s: between main memory and the device, in either direction; as the pool assumes
            (`engines/pool/victim_order.py`).
        check_s: the check of the vectors of a model that came back from main memory.
    """

    disk_bytes_per_s: float = 2e9
    copy_bytes_per_s: float = COPIED_BYTES_PER_S
    check_s: float = 0.05

    def load_s(self, model: TraceModel) -> float:
        """Returns how long the model takes to come from disk."""
        return model.load_s or model.weight_bytes / self.disk_bytes_per_s

    def park_s(self, model: TraceModel) -> float:
        """Returns how long its copy to main memory takes."""
        return model.weight_bytes / self.copy_bytes_per_s

    def wake_s(self, model: TraceModel) -> float:
        """Returns how long it takes to come back from main memory."""
        return self.check_s + self.park_s(model) if model.wake_s is None else model.wake_s


class ReplayOptions(Struct, frozen=True, kw_only=True):
    """What else a replay may change.

    Args:
        host_budget_bytes: main memory for parked models; 0 parks none.
        warm: models that are loaded before the first request, in this order.
        preloads: a Unix time and a model that is loaded then without a request, in order of time (`preload_at`).
        keep_alive_s: of all models; -1 never evicts one for idleness.
        rates: how fast models move where the trace does not say.
    """

    host_budget_bytes: int = 0
    warm: Sequence[str] = ()
    preloads: Sequence[tuple[float, str]] = ()
    keep_alive_s: float = -1.0
    rates: TierRates = TierRates()


class ReplayResult(Struct, frozen=True, kw_only=True):
    """What a day would have cost.

    Args:
        requests: answered ones.
        loads: all of them, from disk; `reloads`: those of a model that had been in memory before. `loading_s`: the
            seconds that they took together.
        wakes: how often a model came back from main memory; `waking_s`: the seconds that this took together.
        cold_waits_s: how long each request waited that did not find its model ready, sorted.
        failed: requests without a lease, because no memory came free in time or a model can never fit.
        peak_bytes: the most that was charged to the device; `host_peak_bytes`: to main memory, for parked models.
    """

    requests: int
    loads: int
    reloads: int
    loading_s: float
    cold_waits_s: tuple[float, ...]
    failed: int
    peak_bytes: int
    wakes: int = 0
    waking_s: float = 0.0
    host_peak_bytes: int = 0

    @property
    def waited_s(self) -> float:
        """Returns the seconds that all requests together waited for their models."""
        return sum(self.cold_waits_s)

    def cold_wait_s(self, quantile: float) -> float:
        """Returns a quantile of the waits, by the nearest rank; 0 where no request waited."""
        if not self.cold_waits_s:
            return 0.0
        rank = min(len(self.cold_waits_s) - 1, int(quantile * len(self.cold_waits_s)))
        return self.cold_waits_s[rank]


def replay(
    trace: Trace,
    *,
    budget_bytes: int,
    rules: PoolPolicy | None = None,
    pinned: Collection[str] = (),
    options: ReplayOptions | None = None,
    on_progress: Callable[[int], None] = lambda done: None,
) -> ReplayResult:
    """Replays a trace on one device, which holds nothing at first.

    Args:
        pinned: models that never leave.
        on_progress: called with the number of requests that have come, now and then.

    Raises:
        ValueError: a request is for a model that the trace does not describe.
    """
    unknown = {request.model_id for request in trace.requests} - set(trace.models)
    if unknown:
        raise ValueError(f"the trace does not say how large {', '.join(sorted(unknown))} is")
    chosen = options or ReplayOptions()
    specs = {
        model_id: ModelSpec(model_id=model_id, source="x", pinned=model_id in pinned, keep_alive_s=chosen.keep_alive_s)
        for model_id in trace.models
    }
    machine = PoolStateMachine(
        specs, budget_bytes=budget_bytes, rules=rules or PoolPolicy(), host_budget_bytes=chosen.host_budget_bytes
    )
    return _Replay(trace, machine, chosen).run(on_progress)


_PROGRESS_EVERY = 1000


class _Replay:
    """Runs one replay: the clock, and the world around the machine."""

    def __init__(self, trace: Trace, machine: PoolStateMachine, options: ReplayOptions) -> None:
        self._trace = trace
        self._machine = machine
        self._options, self._rates = options, options.rates
        self._slots = {slot_id: trace.models[slot.model_id] for slot_id, slot in machine.state.slots.items()}
        self._due: list[tuple[float, int, PoolEvent]] = []
        self._order = 0
        self._timer: TimerFired | None = None
        self._free_at_s = 0.0
        self._now_s = 0.0
        self._asked: dict[int, TraceRequest] = {}
        self._waits_s: list[float] = []
        self._failed = self._peak_bytes = self._host_peak_bytes = self._granted = 0
        self._loads: Counter[str] = Counter()
        self._wakes: Counter[str] = Counter()
        self._act: dict[type[Any], Callable[[Any, float], None]] = {
            Grant: self._grant,
            Fail: self._fail,
            StartLoad: self._load,
            StartWarm: self._warm,
            StartUnload: lambda effect, now_s: self._work(0.0, UnloadCompleted(effect.slot_id)),
            StartPark: self._park,
            StartWake: self._wake,
            ReadMemory: lambda effect, now_s: self._work(0.0, BudgetChanged(machine.state.budget_bytes)),
            ArmTimer: self._arm,
        }

    def run(self, on_progress: Callable[[int], None]) -> ReplayResult:
        files = ModelFiles(path="x", revision="x", size_bytes=0)
        for slot_id, model in self._slots.items():
            need = MemoryNeed(
                weight_bytes=model.weight_bytes, workspace_bytes=model.workspace_bytes, weights_known=True,
                workspace_known=True, load_s=self._rates.load_s(model),
            )  # fmt: skip
            self._step(FilesFound(slot_id, files, need), 0.0)
        self._load_before(self._options.warm)
        self._ask(self._options.preloads, on_progress)
        self._run_until(float("inf"))
        on_progress(len(self._trace.requests))
        models, rates = self._trace.models, self._rates
        return ReplayResult(
            requests=self._granted,
            loads=self._loads.total(),
            reloads=self._loads.total() - len(self._loads),
            loading_s=sum(count * rates.load_s(models[model_id]) for model_id, count in self._loads.items()),
            cold_waits_s=tuple(sorted(self._waits_s)),
            failed=self._failed,
            peak_bytes=self._peak_bytes,
            wakes=self._wakes.total(),
            waking_s=sum(count * rates.wake_s(models[model_id]) for model_id, count in self._wakes.items()),
            host_peak_bytes=self._host_peak_bytes,
        )

    def _load_before(self, warm: Sequence[str]) -> None:
        """Loads models one after the other before the first request comes."""
        for model_id in warm:
            self._step(PreloadRequested(model_id), self._now_s)
        while self._due and any(slot.work or slot.claim is not None for slot in self._machine.state.slots.values()):
            self._next()

    def _ask(self, preloads: Sequence[tuple[float, str]], on_progress: Callable[[int], None]) -> None:
        """Sends the requests, each at its time, and the preloads between them."""
        requests = self._trace.requests
        since_s = requests[0].at_s - self._now_s if requests else 0.0
        for at_s, model_id in preloads:
            self._at(max(self._now_s, at_s - since_s), PreloadRequested(model_id))
        for number, request in enumerate(requests):
            at_s = request.at_s - since_s
            self._run_until(at_s)
            self._asked[number] = structs.replace(request, at_s=at_s)
            self._step(LeaseRequested(number, request.model_id, deadline_s=at_s + LOAD_TIMEOUT_S), at_s)
            if number % _PROGRESS_EVERY == 0:
                on_progress(number)

    def _run_until(self, until_s: float) -> None:
        """Applies what is due. The day ends when all requests have ended: timers beyond it decide nothing."""
        while self._due and self._due[0][0] <= until_s and (self._asked or until_s != float("inf")):
            self._next()

    def _next(self) -> None:
        """Applies the event that is due next."""
        at_s, _, event = heapq.heappop(self._due)
        if isinstance(event, LeaseReleased):
            del self._asked[event.waiter_id]
        if not isinstance(event, TimerFired) or event is self._timer:
            self._step(event, at_s)

    def _step(self, event: PoolEvent, now_s: float) -> None:
        self._now_s = now_s
        for effect in self._machine.handle(event, now_s):
            act = self._act.get(type(effect))
            if act is not None:
                act(effect, now_s)

    def _at(self, at_s: float, event: PoolEvent) -> None:
        heapq.heappush(self._due, (at_s, self._order, event))
        self._order += 1

    def _work(self, seconds: float, event: PoolEvent) -> None:
        """Does work on the loader's thread, after what it has to do already."""
        self._free_at_s = max(self._now_s, self._free_at_s) + seconds
        self._at(self._free_at_s, event)

    def _grant(self, effect: Grant, now_s: float) -> None:
        request = self._asked[effect.waiter_id]
        self._granted += 1
        if now_s > request.at_s:
            self._waits_s.append(now_s - request.at_s)
        self._at(now_s + request.seconds, LeaseReleased(effect.waiter_id))

    def _fail(self, effect: Fail, now_s: float) -> None:
        del self._asked[effect.waiter_id]
        self._failed += 1

    def _load(self, effect: StartLoad, now_s: float) -> None:
        model = self._slots[effect.slot_id]
        self._loads[model.model_id] += 1
        self._note_peaks()
        self._work(self._rates.load_s(model), LoadCompleted(effect.slot_id))

    def _warm(self, effect: StartWarm, now_s: float) -> None:
        model = self._slots[effect.slot_id]
        self._at(now_s, WarmUpCompleted(effect.slot_id, model.weight_bytes, model.workspace_bytes))

    def _park(self, effect: StartPark, now_s: float) -> None:
        model = self._slots[effect.slot_id]
        self._note_peaks()
        self._work(self._rates.park_s(model), ParkCompleted(effect.slot_id, model.weight_bytes))

    def _wake(self, effect: StartWake, now_s: float) -> None:
        model = self._slots[effect.slot_id]
        self._wakes[model.model_id] += 1
        self._note_peaks()
        self._work(self._rates.wake_s(model), WakeCompleted(effect.slot_id))

    def _note_peaks(self) -> None:
        """Notes what is charged at the moments at which a charge begins."""
        charged = [slot.reserved for slot in self._machine.state.slots.values() if slot.state in CHARGED]
        workspace = max((need.workspace_bytes for need in charged), default=0)
        self._peak_bytes = max(self._peak_bytes, sum(need.weight_bytes for need in charged) + workspace)
        self._host_peak_bytes = max(self._host_peak_bytes, self._machine.state.host_used_bytes())

    def _arm(self, effect: ArmTimer, now_s: float) -> None:
        self._timer = None
        if effect.at_s is not None:
            self._timer = TimerFired()
            self._at(effect.at_s, self._timer)
