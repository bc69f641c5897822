"""Simulates the pools of a host with several devices, over which models are split; checks the invariants.

It keeps its own charges of every budget, from the effects alone and from the true sizes of the models' parts, and
compares them with the budgets and with what the pools charge, after every step.
"""

from collections import deque
from collections.abc import Callable, Mapping
from random import Random

from msgspec import Struct, structs

from engines.pool.messages import (
    NEVER,
    ArmTimer,
    BudgetChanged,
    Discard,
    Done,
    DownloadCompleted,
    DrainRequested,
    Effect,
    Emit,
    EvictionRequested,
    Fail,
    FilesDiscarded,
    FilesLocated,
    Grant,
    HostBudgetChanged,
    LeaseCancelled,
    LeaseReleased,
    LeaseRequested,
    LoadCompleted,
    LoadErrored,
    ParkCompleted,
    PoolEvent,
    PreloadRequested,
    ReadMemory,
    StartFetch,
    StartLoad,
    StartLocate,
    StartPark,
    StartUnload,
    StartWake,
    StartWarm,
    TimerFired,
    UnloadCompleted,
    WakeCompleted,
    WakeErrored,
    WarmUpCompleted,
    WarmUpErrored,
)
from engines.pool.neighbour_messages import Notify
from engines.pool.neighbours import Neighbours
from engines.pool.slot import LoadFailure, MemoryNeed, PoolPolicy
from engines.pool.state_machine import PoolStateMachine
from engines.spec import ModelSpec
from engines.types import State
from tests.testkit.pool_storm import a_folder, require, sum_needs

BUDGET = 1000
PARTS: dict[str, tuple[int, ...] | None] = {
    "a": (300, *(200,) * 7),  # more than one device
    "b": (100, *(150,) * 12),
    "c": (200, *(400,) * 6),  # large layers: devices and main memory
    "d": (150, *(120,) * 5),  # fits on one device
    "e": None,
    "f": None,
    "g": (700, *(300,) * 20),  # more than there is
}
SMALL = {"e": 300, "f": 600}
WORKSPACE = 40


class Charge(Struct):
    """What a slot holds of every budget, by pool."""

    model_id: str
    home: int
    on_device: dict[int, MemoryNeed] = {}
    in_host: dict[int, int] = {}
    state: State = "absent"
    leases: int = 0
    is_split: bool = False


def need_of(model_id: str) -> MemoryNeed:
    """Returns what is known of a model once its files are on disk."""
    parts = PARTS[model_id]
    weight = sum(parts) if parts else SMALL[model_id]
    return MemoryNeed(
        weight_bytes=weight, workspace_bytes=WORKSPACE, weights_known=True, workspace_known=True, parts=parts
    )


class SplitStorm:
    """Several pools, and the events that can happen to them."""

    def __init__(
        self, num_pools: int, specs: Mapping[str, ModelSpec], host_budget: int, rules: PoolPolicy | None = None
    ) -> None:
        self.neighbours = Neighbours()
        self.rules = rules or PoolPolicy()
        self.specs = specs
        self.cores = [
            PoolStateMachine(
                specs,
                budget_bytes=BUDGET,
                rules=self.rules,
                host_budget_bytes=host_budget,
                neighbours=self.neighbours,
            )
            for _ in range(num_pools)
        ]
        self.budgets = [BUDGET] * num_pools
        self.allowances = [0] * num_pools
        self.host_budgets = [host_budget] * num_pools
        self.host_allowances = [0] * num_pools
        self.ceilings: list[int | None] = [None] * num_pools
        self.now_s = 100.0
        self.timers: dict[int, float] = {}
        self.work: list[tuple[int, Effect]] = []
        self.charges: dict[int, Charge] = {}
        self.waiting: dict[int, str] = {}
        self.leases: dict[int, tuple[int, int]] = {}
        self.evictors: set[int] = set()
        self.outcomes: list[str] = []
        self.is_draining = False
        self.num_split_loads = 0
        self._next_id = 0
        self._queue: deque[Notify] = deque()
        for pool in range(num_pools):
            self.step(pool, BudgetChanged(BUDGET))

    # ---- actions ----

    def acquire(self, pool: int, model_id: str, timeout_s: float = NEVER) -> int:
        waiter_id = self._new_id()
        self.waiting[waiter_id] = model_id
        self.step(pool, LeaseRequested(waiter_id, model_id, None, self.now_s + timeout_s))
        return waiter_id

    def release(self, waiter_id: int) -> None:
        pool, slot_id = self.leases.pop(waiter_id)
        self.charges[slot_id].leases -= 1
        self.step(pool, LeaseReleased(waiter_id))

    def cancel(self, pool: int, waiter_id: int) -> None:
        self.waiting.pop(waiter_id, None)
        self.step(pool, LeaseCancelled(waiter_id))

    def preload(self, pool: int, model_id: str, *, pin: bool = False) -> None:
        self.step(pool, PreloadRequested(model_id, pin))

    def evict(self, pool: int, model_id: str, *, force: bool = False) -> None:
        waiter_id = self._new_id()
        self.evictors.add(waiter_id)
        self.step(pool, EvictionRequested(waiter_id, model_id, force))

    def set_budget(self, pool: int, budget: int) -> None:
        self.budgets[pool] = budget
        self.allowances[pool] = max(self.allowances[pool], self.used(pool))
        self.step(pool, BudgetChanged(budget, self.ceilings[pool]))

    def set_host_budget(self, pool: int, budget: int) -> None:
        self.host_budgets[pool] = budget
        self.host_allowances[pool] = max(self.host_allowances[pool], self.host_used(pool))
        self.step(pool, HostBudgetChanged(budget))

    def drain(self) -> None:
        self.is_draining = True
        for pool in range(len(self.cores)):
            self.step(pool, DrainRequested())

    def advance(self, seconds: float) -> None:
        until_s = self.now_s + seconds
        while self.timers and min(self.timers.values()) <= until_s:
            self._fire_timer()
        self.now_s = until_s

    def finish(self, index: int, fate: str = "ok") -> None:
        """Ends asynchronous work."""
        pool, work = self.work.pop(index)
        event = self._outcome(pool, work, fate)
        if isinstance(event, UnloadCompleted | LoadErrored):
            charge = self.charges[event.slot_id]
            charge.on_device, charge.in_host = {}, {}
        if isinstance(event, ParkCompleted):
            self.charges[event.slot_id].on_device = {}
        if isinstance(event, WakeCompleted):
            self.charges[event.slot_id].in_host = {}
        if isinstance(event, WarmUpCompleted) and not event.share_bytes:  # was charged by a guess, after a failure
            self.allowances[pool] = max(self.allowances[pool], self.used(pool))
        self.step(pool, event)

    def settle(self) -> None:
        """Ends all work, all leases and all waits for time, and other processes; then nobody may still wait."""
        self.ceilings = [None] * len(self.cores)
        for _ in range(6000):
            if self.work:
                self.finish(0)
            elif self.leases:
                self.release(next(iter(self.leases)))
            elif self.timers:
                self._fire_timer()
            else:
                break
        else:
            require(False, f"does not settle: {self.cores!r}")
        require(not self.waiting, f"requests {list(self.waiting.values())} wait for ever: {self.cores!r}")
        require(not self.evictors, f"operators wait for ever: {self.cores!r}")
        if self.is_draining:
            held = [c.model_id for c in self.charges.values() if c.on_device or c.in_host]
            require(not held, f"{held} still hold memory after the shutdown")

    # ---- one step ----

    def step(self, pool: int, event: PoolEvent) -> None:
        self._apply(pool, event)
        for _ in range(500):
            if not self._queue:
                return
            notice = self._queue.popleft()
            self._apply(notice.pool, notice.event)
        require(False, "pools call each other for ever")

    def _apply(self, pool: int, event: PoolEvent) -> None:
        for effect in self.cores[pool].handle(event, self.now_s):
            self._note(pool, effect)
        self._check()

    def _note(self, pool: int, effect: Effect) -> None:
        match effect:
            case Notify():
                self._queue.append(effect)
            case ArmTimer():
                self.timers.pop(pool, None)
                if effect.at_s is not None:
                    self.timers[pool] = effect.at_s
            case Grant():
                self._note_grant(pool, effect)
            case Fail():
                self.waiting.pop(effect.waiter_id, None)
                self.evictors.discard(effect.waiter_id)
                self.outcomes.append(type(effect.error).__name__)
            case Done():
                self.evictors.discard(effect.waiter_id)
            case Emit():
                self._note_move(pool, effect)
            case _:
                self._note_work(pool, effect)

    def _note_grant(self, pool: int, effect: Grant) -> None:
        charge = self.charges[effect.slot_id]
        require(charge.state == "ready", f"{charge.model_id} is granted while {charge.state}")
        require(self.waiting.pop(effect.waiter_id, None) is not None, "a lease that nobody waits for")
        self.leases[effect.waiter_id] = pool, effect.slot_id
        charge.leases += 1

    def _note_move(self, pool: int, effect: Emit) -> None:
        if effect.kind != "state":
            return
        charge = self.charges.setdefault(effect.slot_id, Charge(effect.model_id, pool))
        charge.state = effect.target
        if effect.target == "draining" and effect.claimant is not None:
            slot = self.cores[pool].state.slots[effect.slot_id]
            require(not slot.is_pinned, f"{effect.model_id} is pinned and evicted for {effect.claimant}")
            held_s = self.now_s - slot.ready_at_s
            require(held_s >= self.rules.min_residency_s - 1e-6, f"{effect.model_id} leaves after {held_s} s")
        if effect.target == "parking":
            held = charge.on_device[pool].weight_bytes
            charge.in_host = {pool: held}
        if effect.target == "waking":
            slot = self.cores[pool].state.slots[effect.slot_id]
            charge.on_device = {pool: slot.measured}

    def _note_work(self, pool: int, effect: Effect) -> None:
        self.work.append((pool, effect))
        if isinstance(effect, StartUnload | StartPark):
            charge = self.charges[effect.slot_id]
            require(not charge.leases, f"{charge.model_id} leaves while {charge.leases} requests run")
            require(not (isinstance(effect, StartPark) and charge.is_split), f"{charge.model_id} is split and parked")
        if isinstance(effect, StartLoad):
            require(not self.charges[effect.slot_id].on_device, f"{effect.spec.model_id} loads twice")
            self._note_load(pool, effect)

    def _note_load(self, pool: int, load: StartLoad) -> None:
        """Charges a load with its true sizes; the parts of a split model must be whole and in order."""
        charge = self.charges[load.slot_id]
        charge.is_split = load.split is not None
        need = self.cores[pool].state.slots[load.slot_id].need
        assert need is not None
        workspace = need.workspace_bytes  # more than the truth after an out-of-memory error
        if load.split is None:
            charge.on_device = {pool: load.need}
            return
        self.num_split_loads += 1
        parts = PARTS[load.spec.model_id]
        assert parts is not None
        shares = [share for share in load.split.shares if share.need.total_bytes]
        require(load.split.shares[0].pool == pool, "the first part is not at home")
        at = 0
        for share in shares:
            size = sum(parts[at : at + share.num_parts])
            at += share.num_parts
            if share is shares[-1] and load.split.num_host_parts:
                size += max(parts[1:])
            is_home = share.pool == pool
            charge.on_device[share.pool] = MemoryNeed(
                weight_bytes=size if is_home else size + workspace, workspace_bytes=workspace if is_home else 0
            )
        left = parts[at:]
        require(len(left) == load.split.num_host_parts, f"{len(left)} parts of {load.spec.model_id} are nowhere")
        charge.in_host = {share.pool: share.host_bytes for share in load.split.shares if share.host_bytes}
        require(sum(charge.in_host.values()) == sum(left), "the layers in main memory are not charged as they are")

    # ---- results of asynchronous work ----

    def _outcome(self, pool: int, work: Effect, fate: str) -> PoolEvent:
        if isinstance(work, ReadMemory):
            return BudgetChanged(self.budgets[pool], self.ceilings[pool])
        if isinstance(work, StartLoad | StartWarm | StartUnload | StartPark | StartWake):
            return self._moved(pool, work, fate)
        if isinstance(work, StartLocate):
            return FilesLocated(work.slot_id, a_folder(), need_of(work.spec.model_id))
        if isinstance(work, StartFetch):
            return DownloadCompleted(work.slot_id, a_folder(), need_of(work.spec.model_id))
        assert isinstance(work, Discard)
        return FilesDiscarded(work.slot_id, True)

    def _moved(
        self, pool: int, work: StartLoad | StartWarm | StartUnload | StartPark | StartWake, fate: str
    ) -> PoolEvent:
        failure, slot_id = LoadFailure(kind=fate, message="scripted"), work.slot_id
        if isinstance(work, StartLoad):
            return LoadCompleted(slot_id) if fate == "ok" else LoadErrored(slot_id, failure)
        if isinstance(work, StartWarm):
            return self._warmed(slot_id) if fate == "ok" else WarmUpErrored(slot_id, failure)
        if isinstance(work, StartWake):
            return WakeCompleted(slot_id) if fate == "ok" else WakeErrored(slot_id, failure)
        if isinstance(work, StartPark):
            return ParkCompleted(slot_id, self.charges[slot_id].in_host[pool])
        return UnloadCompleted(slot_id)

    def _warmed(self, slot_id: int) -> WarmUpCompleted:
        """Ends a warm-up: the true sizes are charged from now on."""
        charge = self.charges[slot_id]
        if not charge.is_split:
            size = need_of(charge.model_id).weight_bytes
            charge.on_device = {charge.home: MemoryNeed(weight_bytes=size, workspace_bytes=WORKSPACE)}
            return WarmUpCompleted(slot_id, size, WORKSPACE)
        need = self.cores[charge.home].state.slots[slot_id].need
        assert need is not None
        more = need.workspace_bytes
        home = charge.on_device[charge.home].weight_bytes
        others = {pool: each.weight_bytes - more for pool, each in charge.on_device.items() if pool != charge.home}
        charge.on_device[charge.home] = MemoryNeed(weight_bytes=home, workspace_bytes=WORKSPACE)
        for pool, size in others.items():
            charge.on_device[pool] = MemoryNeed(weight_bytes=size + WORKSPACE)
        return WarmUpCompleted(slot_id, home, WORKSPACE, (home, *others.values()))

    # ---- invariants ----

    def used(self, pool: int) -> int:
        return sum_needs([charge.on_device[pool] for charge in self.charges.values() if pool in charge.on_device])

    def host_used(self, pool: int) -> int:
        return sum(charge.in_host.get(pool, 0) for charge in self.charges.values())

    def _check(self) -> None:
        for pool, core in enumerate(self.cores):
            used, host_used = self.used(pool), self.host_used(pool)
            charged = sum_needs([slot.reserved for slot in core.state.charged()])
            require(charged == used, f"pool {pool} charges {charged} bytes, and {used} are held")
            held = core.state.host_used_bytes()
            require(held == host_used, f"pool {pool} charges {held} bytes of main memory, and {host_used} are held")
            if used <= self.budgets[pool]:
                self.allowances[pool] = 0
            if host_used <= self.host_budgets[pool]:
                self.host_allowances[pool] = 0
            most = max(self.budgets[pool], self.allowances[pool])
            require(used <= most, f"{used} of {self.budgets[pool]} bytes of device {pool}")
            most = max(self.host_budgets[pool], self.host_allowances[pool])
            require(host_used <= most, f"{host_used} of {self.host_budgets[pool]} bytes of main memory")
        for charge in self.charges.values():
            is_served = charge.state in ("ready", "draining")
            require(not charge.leases or is_served, f"{charge.model_id}: leased and {charge.state}")

    # ---- helpers ----

    def _fire_timer(self) -> None:
        pool = min(self.timers, key=lambda at: self.timers[at])
        self.now_s = max(self.now_s, self.timers.pop(pool))
        self.step(pool, TimerFired())

    def _new_id(self) -> int:
        self._next_id += 1
        return self._next_id


def split_specs(model_ids: str = "abcdefg", keep_alive_s: float = -1.0) -> dict[str, ModelSpec]:
    """Builds the models of `PARTS`."""
    return {
        model_id: ModelSpec(
            model_id=model_id,
            source=f"org/{model_id}",
            revision="v1",
            keep_alive_s=keep_alive_s,
            offload="never" if PARTS[model_id] is None else "allowed",
        )
        for model_id in model_ids
    }


LOAD_FATES = ("ok",) * 8 + ("out_of_memory", "bad_model")


def random_split_storm(seed: int, num_steps: int = 70) -> SplitStorm:
    """Runs random actions on two or three devices, then `settle`."""
    random = Random(seed)
    specs = split_specs()
    for model_id in specs:
        keep_alive_s = random.choice((-1.0, -1.0, 0.0, 5.0))
        specs[model_id] = structs.replace(specs[model_id], keep_alive_s=keep_alive_s, pinned=random.random() < 0.06)
    rules = PoolPolicy(eviction="cost" if seed % 2 else "lru")
    storm = SplitStorm(random.choice((2, 2, 3)), specs, random.choice((0, 400, 1200)), rules)
    for _ in range(num_steps):
        split_step(storm, random)
    if random.random() < 0.4:
        storm.drain()
    storm.settle()
    return storm


def split_step(storm: SplitStorm, random: Random) -> None:
    """Draws one action."""
    pool = random.randrange(len(storm.cores))
    roll = random.random()
    if storm.work and roll < 0.45:
        index = random.randrange(len(storm.work))
        is_risky = isinstance(storm.work[index][1], StartLoad | StartWarm | StartWake)
        storm.finish(index, random.choice(LOAD_FATES) if is_risky else "ok")
    elif storm.leases and roll < 0.55:
        storm.release(random.choice(list(storm.leases)))
    elif roll < 0.78:
        storm.acquire(pool, random.choice("aaabbccdefg"), random.choice((NEVER, NEVER, 20.0)))
    elif roll < 0.9:
        storm.advance(random.choice((0.01, 2.0, 6.0, 40.0)))
    elif roll < 0.93 and storm.waiting:
        storm.cancel(*_waiter_of(storm, random.choice(list(storm.waiting))))
    else:
        operate(storm, random, pool)


def operate(storm: SplitStorm, random: Random, pool: int) -> None:
    """Draws one action of an operator or of other processes."""
    actions: tuple[Callable[[], None], ...] = (
        lambda: storm.preload(pool, random.choice("abcdef"), pin=random.random() < 0.3),
        lambda: storm.evict(pool, random.choice("abcdef"), force=random.random() < 0.5),
        lambda: storm.set_budget(pool, random.choice((BUDGET, BUDGET, 700))),
        lambda: storm.set_host_budget(pool, random.choice((0, 400, 1200))),
        lambda: storm.ceilings.__setitem__(pool, random.choice((None, None, 600))),
    )
    random.choice(actions)()


def _waiter_of(storm: SplitStorm, waiter_id: int) -> tuple[int, int]:
    pools = (pool for pool, core in enumerate(storm.cores) if waiter_id in core.state.holders)
    return next(pools), waiter_id
