"""Replays the requests of a day in virtual time, through the pool's own state machine; no engine runs.

    replay(trace, budget_bytes=24 * 2**30, rules=PoolPolicy(eviction="cost"))

Loads take as long as they did, requests hold their lease as long as they did, and nothing else takes time. So the
result tells what another budget, order of eviction or set of pinned models would have cost in loads and waits; it does
not tell how models slow each other down.
"""

import heapq
from collections import Counter
from collections.abc import Callable, Collection, Mapping
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
    PoolEvent,
    ReadMemory,
    StartLoad,
    StartUnload,
    StartWarm,
    TimerFired,
    UnloadCompleted,
    WarmUpCompleted,
)
from engines.pool.slot import CHARGED, MemoryNeed, PoolPolicy
from engines.pool.state_machine import PoolStateMachine
from engines.spec import ModelSpec
from engines.trace import Trace, TraceRequest
from engines.types import ModelFiles

__all__ = ["PoolPolicy", "ReplayResult", "replay"]

LOAD_TIMEOUT_S = 300.0
"""How long a request waits for its model, as by default."""


class ReplayResult(Struct, frozen=True, kw_only=True):
    """What a day would have cost.

    Args:
        requests: answered ones.
        loads: all of them; `reloads`: those of a model that had been in memory before. `loading_s`: the seconds that
            they took together.
        cold_waits_s: how long each request waited that did not find its model ready, sorted.
        failed: requests without a lease, because no memory came free in time or a model can never fit.
        peak_bytes: the most that was charged.
    """

    requests: int
    loads: int
    reloads: int
    loading_s: float
    cold_waits_s: tuple[float, ...]
    failed: int
    peak_bytes: int

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
    keep_alive_s: float = -1.0,
    on_progress: Callable[[int], None] = lambda done: None,
) -> ReplayResult:
    """Replays a trace on one device, which holds nothing at first.

    Args:
        pinned: models that never leave.
        keep_alive_s: of all models; -1 never evicts one for idleness.
        on_progress: called with the number of requests that have come, now and then.

    Raises:
        ValueError: a request is for a model that the trace does not describe.
    """
    unknown = {request.model_id for request in trace.requests} - set(trace.models)
    if unknown:
        raise ValueError(f"the trace does not say how large {', '.join(sorted(unknown))} is")
    specs = {
        model_id: ModelSpec(model_id=model_id, source="x", pinned=model_id in pinned, keep_alive_s=keep_alive_s)
        for model_id in trace.models
    }
    return _Replay(trace, specs, budget_bytes, rules or PoolPolicy()).run(on_progress)


_PROGRESS_EVERY = 1000


class _Replay:
    """Runs one replay: the clock, and the world around the machine."""

    def __init__(self, trace: Trace, specs: Mapping[str, ModelSpec], budget_bytes: int, rules: PoolPolicy) -> None:
        self._trace = trace
        self._budget_bytes = budget_bytes
        self._machine = PoolStateMachine(specs, budget_bytes=budget_bytes, rules=rules)
        self._slots = {slot_id: trace.models[slot.model_id] for slot_id, slot in self._machine.state.slots.items()}
        self._due: list[tuple[float, int, PoolEvent]] = []
        self._order = 0
        self._timer: TimerFired | None = None
        self._asked: dict[int, TraceRequest] = {}
        self._waits_s: list[float] = []
        self._failed = self._peak_bytes = self._granted = 0
        self._loads: Counter[str] = Counter()
        self._act: dict[type[Any], Callable[[Any, float], None]] = {
            Grant: self._grant,
            Fail: self._fail,
            StartLoad: self._load,
            StartWarm: self._warm,
            StartUnload: lambda effect, now_s: self._at(now_s, UnloadCompleted(effect.slot_id)),
            ReadMemory: lambda effect, now_s: self._at(now_s, BudgetChanged(self._budget_bytes)),
            ArmTimer: self._arm,
        }

    def run(self, on_progress: Callable[[int], None]) -> ReplayResult:
        start_s = self._trace.requests[0].at_s if self._trace.requests else 0.0
        files = ModelFiles(path="x", revision="x", size_bytes=0)
        for slot_id, model in self._slots.items():
            need = MemoryNeed(
                weight_bytes=model.weight_bytes, workspace_bytes=model.workspace_bytes, weights_known=True,
                workspace_known=True, load_s=model.load_s,
            )  # fmt: skip
            self._step(FilesFound(slot_id, files, need), 0.0)
        for number, request in enumerate(self._trace.requests):
            at_s = request.at_s - start_s
            self._run_until(at_s)
            self._asked[number] = structs.replace(request, at_s=at_s)
            self._step(LeaseRequested(number, request.model_id, deadline_s=at_s + LOAD_TIMEOUT_S), at_s)
            if number % _PROGRESS_EVERY == 0:
                on_progress(number)
        self._run_until(float("inf"))
        on_progress(len(self._trace.requests))
        return ReplayResult(
            requests=self._granted,
            loads=self._loads.total(),
            reloads=self._loads.total() - len(self._loads),
            loading_s=sum(count * self._trace.models[model_id].load_s for model_id, count in self._loads.items()),
            cold_waits_s=tuple(sorted(self._waits_s)),
            failed=self._failed,
            peak_bytes=self._peak_bytes,
        )

    def _run_until(self, until_s: float) -> None:
        """Applies what is due. The day ends when all requests have ended: timers beyond it decide nothing."""
        while self._due and self._due[0][0] <= until_s and (self._asked or until_s != float("inf")):
            at_s, _, event = heapq.heappop(self._due)
            if isinstance(event, LeaseReleased):
                del self._asked[event.waiter_id]
            if not isinstance(event, TimerFired) or event is self._timer:
                self._step(event, at_s)

    def _step(self, event: PoolEvent, now_s: float) -> None:
        for effect in self._machine.handle(event, now_s):
            act = self._act.get(type(effect))
            if act is not None:
                act(effect, now_s)

    def _at(self, at_s: float, event: PoolEvent) -> None:
        heapq.heappush(self._due, (at_s, self._order, event))
        self._order += 1

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
        charged = [slot.reserved for slot in self._machine.state.slots.values() if slot.state in CHARGED]
        workspace = max(need.workspace_bytes for need in charged)
        self._peak_bytes = max(self._peak_bytes, sum(need.weight_bytes for need in charged) + workspace)
        self._at(now_s + model.load_s, LoadCompleted(effect.slot_id))

    def _warm(self, effect: StartWarm, now_s: float) -> None:
        model = self._slots[effect.slot_id]
        self._at(now_s, WarmUpCompleted(effect.slot_id, model.weight_bytes, model.workspace_bytes))

    def _arm(self, effect: ArmTimer, now_s: float) -> None:
        self._timer = None
        if effect.at_s is not None:
            self._timer = TimerFired()
            self._at(effect.at_s, self._timer)
