"""A slot: one model (one generation of it) as the pool sees it. Plain records and their derived values.

No decision is taken here, and no engine is held: the pool's shell keeps those by `slot_id`.
"""

from typing import Literal

import msgspec
from msgspec import Struct

from engines.spec import ModelSpec
from engines.types import ModelFiles, State

EDGES: dict[State, frozenset[State]] = {
    "absent": frozenset({"fetching", "cold", "retired"}),
    "fetching": frozenset({"cold", "absent", "failed", "retired"}),
    "cold": frozenset({"waiting_space", "retired"}),
    "waiting_space": frozenset({"loading", "cold", "retired"}),
    "loading": frozenset({"warming", "unloading", "cold", "fetching", "failed", "retired"}),
    "warming": frozenset({"ready", "unloading"}),
    "ready": frozenset({"draining"}),
    "draining": frozenset({"unloading", "ready"}),
    "unloading": frozenset({"cold", "fetching", "failed", "retired"}),
    "failed": frozenset({"absent", "cold", "retired"}),
    "retired": frozenset(),
}
"""Every step a slot may take; `engines/pool/state_machine.py` draws it."""

CHARGED: frozenset[State] = frozenset({"loading", "warming", "ready", "draining", "unloading"})
"""States whose bytes count against the budget: from before the first byte is allocated until the last is freed."""

LEAVING: frozenset[State] = frozenset({"draining", "unloading"})

Work = Literal["locate", "fetch", "discard", "load", "warm", "unload"]
"""What the shell does for a slot outside the pool; at most one at a time."""


class PoolPolicy(Struct, frozen=True, kw_only=True):
    """The pool's numbers. Seconds; `retry_*` are (first delay, longest delay) of the quarantine's doubling."""

    min_residency_s: float = 5.0
    residency_loads: float = 3.0
    patience_s: float = 5.0
    reading_s: float = 1.0
    retry_s: tuple[float, float] = (10.0, 300.0)
    retry_denied_s: tuple[float, float] = (60.0, 1800.0)
    oom_growth: float = 1.5


class MemoryNeed(Struct, frozen=True, kw_only=True):
    """Bytes that a model takes. What is not `known` is a guess: enough to plan with, not to refuse a model for.

    `least_weight_bytes`: where the weights are a guess, what they take at least for certain.
    """

    weight_bytes: int = 0
    workspace_bytes: int = 0
    least_weight_bytes: int = 0
    weights_known: bool = False
    workspace_known: bool = False
    load_s: float | None = None

    @property
    def total_bytes(self) -> int:
        """What the model takes when it is alone on the device."""
        return self.weight_bytes + self.workspace_bytes

    def known(self) -> "MemoryNeed":
        """Only what is certain."""
        return MemoryNeed(
            weight_bytes=self.weight_bytes if self.weights_known else self.least_weight_bytes,
            workspace_bytes=self.workspace_bytes if self.workspace_known else 0,
        )

    def scaled(self, factor: float) -> "MemoryNeed":
        """After an out-of-memory: the figures were too low, whoever gave them."""
        return MemoryNeed(
            weight_bytes=int(self.weight_bytes * factor),
            workspace_bytes=int(self.workspace_bytes * factor),
            load_s=self.load_s,
        )

    def capped(self, room_bytes: int) -> "MemoryNeed":
        """Guesses cut down to the room there can ever be, so that a guess alone never keeps a model out."""
        weights = max(self.known().weight_bytes, min(self.weight_bytes, room_bytes))
        rest = max(0, room_bytes - weights)
        workspace = self.workspace_bytes if self.workspace_known else min(self.workspace_bytes, rest)
        return msgspec.structs.replace(self, weight_bytes=weights, workspace_bytes=workspace)


NO_MEMORY = MemoryNeed()


class LoadFailure(Struct, frozen=True, kw_only=True):
    """Why a fetch, a load or a warm-up failed; `message` is fit for clients."""

    kind: str
    message: str
    file: str | None = None

    @property
    def is_oom(self) -> bool:
        return self.kind == "out_of_memory"

    @property
    def is_broken(self) -> bool:
        return self.kind == "broken_files"

    @property
    def is_changed(self) -> bool:
        return self.kind == "files_changed"

    @property
    def is_denied(self) -> bool:
        """Nothing but a person can change it: ask less often."""
        return self.kind in ("access_denied", "source_not_found")


class Waiter(Struct, frozen=True):
    """A request without a lease yet. `deadline_s` is when its patience ends, on the pool's clock.

    `may_move`: another host could take it.
    """

    waiter_id: int
    keep_alive_s: float | None
    deadline_s: float
    may_move: bool = False


class Slot(Struct, eq=False, kw_only=True):
    """One generation of one model. `engines/pool/state.py` owns every change.

    `claim`: the place in the queue for memory; set by the first request or preload, kept until the model is ready
    or has failed, whoever leaves meanwhile. `is_wanted`: somebody asked for residence, so a failure is tried again
    unasked. `claimed_at_s`: when it began to wait for space. `evicted_for`: the last claimant it made room for.
    `estimated_bytes`: what its last load was admitted with.
    """

    slot_id: int
    spec: ModelSpec
    state: State = "absent"
    work: Work | None = None
    is_retired: bool = False

    files: ModelFiles | None = None
    need: MemoryNeed | None = None
    reserved: MemoryNeed = NO_MEMORY
    estimated_bytes: int = 0
    fetched_bytes: int = 0
    fetch_total_bytes: int = 0

    claim: int | None = None
    claimed_at_s: float = 0.0
    is_wanted: bool = False
    waiters: dict[int, Waiter] = {}
    leases: set[int] = msgspec.field(default_factory=set)
    evictors: set[int] = msgspec.field(default_factory=set)
    leaving_cause: str | None = None
    leaving_for: str | None = None

    operator_pin: bool = False
    keep_alive_override_s: float | None = None
    load_began_at_s: float = 0.0
    ready_at_s: float = 0.0
    last_used_at_s: float | None = None
    load_s: float | None = None
    loads: int = 0
    evictions: int = 0
    evicted_for: str | None = None

    failure: LoadFailure | None = None
    attempts: int = 0
    retry_at_s: float = 0.0
    had_oom: bool = False
    had_refetch: bool = False

    @property
    def model_id(self) -> str:
        return self.spec.model_id

    @property
    def is_pinned(self) -> bool:
        return not self.is_retired and (self.spec.pinned or self.operator_pin)

    @property
    def keep_alive_s(self) -> float:
        override = self.keep_alive_override_s
        return self.spec.keep_alive_s if override is None else override

    @property
    def used_at_s(self) -> float:
        """Last use, or the moment it became ready when nobody has used it since."""
        return max(self.ready_at_s, self.last_used_at_s or 0.0)

    @property
    def idle_at_s(self) -> float:
        """When an idle model's time is up. Only for `keep_alive_s >= 0`."""
        return self.used_at_s + self.keep_alive_s

    def evictable_from_s(self, rules: PoolPolicy) -> float:
        """The end of its minimum residency: before it, room is not made at its cost."""
        return self.ready_at_s + max(rules.min_residency_s, rules.residency_loads * (self.load_s or 0.0))
