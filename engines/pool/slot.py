"""Records of the pool: `Slot` (one generation of one model), `MemoryNeed`, `PoolPolicy`, `Waiter`, `LoadFailure`.

They decide nothing and hold no engine; `EffectRunner` holds the engines by `slot_id`.
"""

from math import exp
from typing import Literal

import msgspec
from msgspec import Struct

from engines.spec import Dtype, Eviction, ModelSpec, in_dtype
from engines.types import ModelFiles, State, Tier

EDGES: dict[State, frozenset[State]] = {
    "absent": frozenset({"fetching", "cold", "retired"}),
    "fetching": frozenset({"cold", "absent", "failed", "retired"}),
    "cold": frozenset({"waiting_space", "retired"}),
    "waiting_space": frozenset({"loading", "cold", "retired"}),
    "loading": frozenset({"warming", "unloading", "cold", "fetching", "failed", "retired"}),
    "warming": frozenset({"ready", "unloading"}),
    "ready": frozenset({"draining"}),
    "draining": frozenset({"unloading", "ready", "parking"}),
    "parking": frozenset({"parked", "unloading"}),
    "parked": frozenset({"waking", "unloading"}),
    "waking": frozenset({"ready", "unloading"}),
    "unloading": frozenset({"cold", "fetching", "failed", "retired"}),
    "failed": frozenset({"absent", "cold", "retired"}),
    "retired": frozenset(),
}
"""The allowed state transitions; `engines/pool/state_machine.py` has the diagram."""

CHARGED: frozenset[State] = frozenset({"loading", "warming", "ready", "draining", "unloading", "parking", "waking"})
"""States whose bytes count against the budget: from before the first byte is allocated until the last one is freed."""

HOST_CHARGED: frozenset[State] = frozenset({"parking", "parked", "waking", "unloading"})
"""States whose bytes may count against the host budget; of an unloading model, those of one that was parked."""

LEAVING: frozenset[State] = frozenset({"draining", "unloading", "parking"})

Work = Literal["locate", "fetch", "discard", "load", "warm", "unload", "park", "wake"]
"""The asynchronous work that runs for a slot; at most one at a time."""


HEAT_DECAY_S = 900.0
"""How long a request speaks for the next one; `benchmarks.lifecycle.replay decay` compares other values."""


class PoolPolicy(Struct, frozen=True, kw_only=True):
    """Tuning constants of the pool, in seconds.

    A loaded model stays for `min_residency_s`, or `residency_loads` times its load time if that is longer (of a parked
    model: the time that it took to wake); a parked one stays in main memory for `min_residency_s`. A claim or a
    deficit is overdue after `overdue_after_s`. A reading of the device is valid for `reading_s`. `retry_*` are the
    (first, longest) delay of the quarantine, which doubles. `oom_growth` scales an estimate after an out-of-memory
    error. `eviction` orders victims; for `cost`, a request counts less by a factor of e after each `heat_decay_s`.
    A claim of flex requests alone evicts only models that are idle for `flex_idle_s`, until it has waited for
    `flex_patience_s`: `engines/pool/flex.py`.
    """

    min_residency_s: float = 5.0
    residency_loads: float = 3.0
    overdue_after_s: float = 5.0
    reading_s: float = 1.0
    retry_s: tuple[float, float] = (10.0, 300.0)
    retry_denied_s: tuple[float, float] = (60.0, 1800.0)
    oom_growth: float = 1.5
    eviction: Eviction = "lru"
    heat_decay_s: float = HEAT_DECAY_S
    flex_idle_s: float = 300.0
    flex_patience_s: float = 120.0


class MemoryNeed(Struct, frozen=True, kw_only=True):
    """Bytes that a model needs. A figure that is not `known` is a guess: it is used for planning, but never refuses a
    model.

    `least_weight_bytes`: a certain lower bound of the weights where these are a guess. `smaller`: what it needs in the
    dtypes that a load may take instead, as the registry lists them.

    `parts`: of a model that may be split, the bytes of its parts in the order of a pass: the first holds everything
    but the layers, each other one a layer; empty while they are unknown. None: it may not be split.
    """

    weight_bytes: int = 0
    workspace_bytes: int = 0
    least_weight_bytes: int = 0
    weights_known: bool = False
    workspace_known: bool = False
    load_s: float | None = None
    smaller: "tuple[SmallerForm, ...]" = ()
    parts: tuple[int, ...] | None = None

    @property
    def total_bytes(self) -> int:
        """The bytes that the model needs when it is alone on the device."""
        return self.weight_bytes + self.workspace_bytes

    @property
    def forms(self) -> "tuple[MemoryNeed, ...]":
        """The needs in all dtypes that a load may take, the preferred first."""
        return (self, *(form.need for form in self.smaller))

    def in_form(self, index: int) -> "MemoryNeed":
        """Returns the need in one of `forms`; the preferred one where the registry has fewer by now."""
        return self.forms[index if index < len(self.forms) else 0]

    def measured_as(self, index: int, measured: "MemoryNeed") -> "MemoryNeed":
        """Returns the need with what a load in one of `forms` has measured."""
        if index == 0 or index > len(self.smaller):
            return msgspec.structs.replace(measured, smaller=self.smaller, parts=self.parts)
        smaller = list(self.smaller)
        smaller[index - 1] = SmallerForm(smaller[index - 1].dtype, measured)
        return msgspec.structs.replace(self, smaller=tuple(smaller))

    def known(self) -> "MemoryNeed":
        """Returns the need without its guesses."""
        return MemoryNeed(
            weight_bytes=self.weight_bytes if self.weights_known else self.least_weight_bytes,
            workspace_bytes=self.workspace_bytes if self.workspace_known else 0,
        )

    def scaled(self, factor: float) -> "MemoryNeed":
        """Returns the need times `factor`, all of it a guess: an out-of-memory error proved the figures too low. The
        parts of a model that may be split are exact: what was too low is the workspace."""
        if self.parts:
            return msgspec.structs.replace(self, workspace_bytes=int(self.workspace_bytes * factor))
        return MemoryNeed(
            weight_bytes=int(self.weight_bytes * factor),
            workspace_bytes=int(self.workspace_bytes * factor),
            load_s=self.load_s,
            smaller=tuple(SmallerForm(form.dtype, form.need.scaled(factor)) for form in self.smaller),
            parts=self.parts,
        )

    def capped(self, available_bytes: int) -> "MemoryNeed":
        """Returns the need with its guesses capped to `available_bytes`, so that a guess never refuses a model."""
        weights = max(self.known().weight_bytes, min(self.weight_bytes, available_bytes))
        rest = max(0, available_bytes - weights)
        workspace = self.workspace_bytes if self.workspace_known else min(self.workspace_bytes, rest)
        return msgspec.structs.replace(self, weight_bytes=weights, workspace_bytes=workspace)


class SmallerForm(Struct, frozen=True):
    """The need of a model in another dtype."""

    dtype: Dtype
    need: MemoryNeed


NO_MEMORY = MemoryNeed()


class Share(Struct, frozen=True, kw_only=True):
    """What one device is charged for a model that is split.

    `pool`: the device, as an index of `Neighbours.pools`. `num_parts`: how many parts of the model it holds.
    `host_bytes`: of the parts in main memory, what its host budget is charged.
    """

    pool: int
    need: MemoryNeed = NO_MEMORY
    num_parts: int = 0
    host_bytes: int = 0


class Split(Struct, frozen=True):
    """Where the parts of a model are: consecutive ones on each device, and the last ones in main memory.

    `shares`: in the order of a pass; the first is that of the model's own pool.
    """

    shares: tuple[Share, ...]
    num_host_parts: int = 0

    @property
    def host_bytes(self) -> int:
        """The bytes of the parts in main memory."""
        return sum(share.host_bytes for share in self.shares)

    def share_of(self, pool: int) -> Share | None:
        """Returns the share of a device; None where it has none."""
        return next((share for share in self.shares if share.pool == pool), None)


class LoadFailure(Struct, frozen=True, kw_only=True):
    """The cause of a failed download, load or warm-up; `message` is safe to show to clients."""

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
        """Whether only a person can fix it, so that retries are rarer."""
        return self.kind in ("access_denied", "source_not_found")


class Waiter(Struct, frozen=True):
    """A request that waits for a lease.

    `deadline_s`: the end of its wait, on the pool's clock. `may_move`: another host can serve it.
    """

    waiter_id: int
    keep_alive_s: float | None
    deadline_s: float
    may_move: bool = False


class Slot(Struct, eq=False, kw_only=True):
    """One generation of one model. Only `engines/pool/state.py` and the pool's handlers change it.

    `claim`: the position in the queue for memory; set by the first request or preload and kept until the model is ready
    or has failed, even if the request is cancelled. `is_wanted`: a preload asked for the model, so a failed load is
    retried without a request. `is_flex_claim`: only flex requests made the claim. `claimed_at_s`: when it began to wait
    for memory. `evicted_for`: the last claimant that it was evicted for. `estimated_bytes`: the estimate that its last
    load was admitted with. `form`: the dtype of that load, an index into the spec's dtype and its smaller ones. `heat`:
    the number of its requests, each decayed by its age, as of `heat_at_s`. `measured`: what it takes on the device in
    that form, once a load has measured it. `host_bytes`: what is charged to the host budget for it. `leaves_to`: where
    an operator wants it; None: the pool decides. `came_s`: how long its last way to the device took where that was from
    main memory; None: `load_s` did. `split`: its shares of several budgets, while it is charged for them. `home`: of a
    copy that stands for another pool's model in this pool's arithmetic (`Neighbours`), the index of that pool.
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
    form: int = 0
    split: Split | None = None
    home: int | None = None
    fetched_bytes: int = 0
    fetch_total_bytes: int = 0

    claim: int | None = None
    claimed_at_s: float = 0.0
    is_flex_claim: bool = False
    is_wanted: bool = False
    waiters: dict[int, Waiter] = {}
    leases: set[int] = msgspec.field(default_factory=set)
    evictors: set[int] = msgspec.field(default_factory=set)
    leaving_cause: str | None = None
    leaving_for: str | None = None
    leaves_to: Tier | None = None
    measured: MemoryNeed = NO_MEMORY
    host_bytes: int = 0
    parked_at_s: float = 0.0
    wake_s: float | None = None
    wakes: int = 0
    came_s: float | None = None

    operator_pin: bool = False
    keep_alive_override_s: float | None = None
    load_began_at_s: float = 0.0
    ready_at_s: float = 0.0
    last_used_at_s: float | None = None
    load_s: float | None = None
    loads: int = 0
    evictions: int = 0
    evicted_for: str | None = None
    heat: float = 0.0
    heat_at_s: float = 0.0

    failure: LoadFailure | None = None
    attempts: int = 0
    retry_at_s: float = 0.0
    had_oom: bool = False
    had_refetch: bool = False

    @property
    def model_id(self) -> str:
        return self.spec.model_id

    @property
    def loaded_spec(self) -> ModelSpec:
        """The spec in the dtype of its last load."""
        if not self.spec.smaller_dtypes:
            return self.spec
        return in_dtype(self.spec, (self.spec.dtype, *self.spec.smaller_dtypes)[self.form])

    @property
    def is_pinned(self) -> bool:
        return not self.is_retired and (self.spec.pinned or self.operator_pin)

    @property
    def keep_alive_s(self) -> float:
        override = self.keep_alive_override_s
        return self.spec.keep_alive_s if override is None else override

    @property
    def used_at_s(self) -> float:
        """The time of its last use, or of becoming ready if it has not been used since."""
        return max(self.ready_at_s, self.last_used_at_s or 0.0)

    @property
    def idle_at_s(self) -> float:
        """When the idle time of the model ends. Valid only for `keep_alive_s >= 0`."""
        return self.used_at_s + self.keep_alive_s

    @property
    def claimed_need(self) -> MemoryNeed:
        """The need of its claim: a parked model comes back in the form that it was loaded in."""
        return self.measured if self.state == "parked" else self.need or NO_MEMORY

    @property
    def host_idle_at_s(self) -> float:
        """When a parked model may leave main memory for idleness. Valid only for `spec.host_keep_alive_s >= 0`."""
        return max(self.parked_at_s, self.used_at_s) + self.spec.host_keep_alive_s

    def heat_up(self, now_s: float, decay_s: float) -> None:
        """Counts a request."""
        self.heat = self.heat * exp((self.heat_at_s - now_s) / decay_s) + 1.0
        self.heat_at_s = now_s

    def heat_now(self, now_s: float, decay_s: float) -> float:
        """Returns the decayed number of requests: `decay_s` times the rate at which they come."""
        return self.heat * exp((self.heat_at_s - now_s) / decay_s)

    def evictable_from_s(self, rules: PoolPolicy) -> float:
        """Returns the end of its minimum residency; before it, the model is not evicted for a claim."""
        came_s = self.load_s or 0.0 if self.came_s is None else self.came_s
        return self.ready_at_s + max(rules.min_residency_s, rules.residency_loads * came_s)
