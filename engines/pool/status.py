"""Builds the records that operators, placement and metrics read. Pure functions of slots; they change nothing."""

from collections.abc import Callable, Iterable, Sequence

from engines.pool.admission import claimed_bytes
from engines.pool.eviction import (
    VictimOrder,
    charges,
    choose_form,
    choose_victims,
    missing_bytes,
    total_bytes,
)
from engines.pool.neighbours import Neighbours
from engines.pool.reasons import blocked_by_pinned, known_bytes
from engines.pool.slot import CHARGED, LEAVING, NO_MEMORY, MemoryNeed, Slot
from engines.pool.split_status import SplitPrediction, shares_of
from engines.pool.state import PoolState
from engines.pool.victim_order import host_victim_order, victim_order, wake_seconds
from engines.protocols import Engine
from engines.types import HostSnapshot, ModelStatus, Plan, format_bytes

_CEILING_S = 60.0
"""How long placement uses a reading of the device; after that, the host is worth another try."""


class StatusView:
    """Converts slots to public records; `to_unix_s` converts times of the pool's clock."""

    def __init__(
        self, host_id: str, device: str, to_unix_s: Callable[[float], float], neighbours: Neighbours | None = None
    ) -> None:
        self.host_id = host_id
        self.device = device
        self.to_unix_s = to_unix_s
        self.neighbours = neighbours or Neighbours()

    def status(self, slot: Slot, engine: Engine | None, blocked: str = "") -> ModelStatus:
        """Builds the status of one slot. `engine`: None unless loaded. `blocked`: the load that hangs, or empty."""
        is_failed = slot.state == "failed"
        need = slot.claimed_need.in_form(slot.form if slot.state in CHARGED else 0)
        last_error = f"{slot.failure.kind}: {slot.failure.message}" if slot.failure else None
        if blocked and slot.work in ("load", "unload"):
            last_error = f"load_hangs: {blocked}"
        return ModelStatus(
            model_id=slot.model_id,
            state=slot.state,
            host_id=self.host_id,
            device=self.device,
            source=slot.spec.source,
            revision=slot.files.revision if slot.files else slot.spec.revision,
            info=engine.info if engine else None,
            weight_bytes=slot.reserved.weight_bytes,
            workspace_bytes=slot.reserved.workspace_bytes,
            leases=len(slot.leases),
            waiters=len(slot.waiters),
            queue_items=engine.queue_items if engine else 0,
            pinned=slot.is_pinned,
            keep_alive_s=slot.keep_alive_s,
            last_used_at=None if slot.last_used_at_s is None else self.to_unix_s(slot.last_used_at_s),
            load_s=slot.load_s,
            loads=slot.loads,
            evictions=slot.evictions,
            fetched_bytes=slot.fetched_bytes,
            fetch_total_bytes=slot.fetch_total_bytes,
            last_error=last_error,
            retry_at=self.to_unix_s(slot.retry_at_s) if is_failed else None,
            need_bytes=need.weight_bytes,
            need_workspace_bytes=need.workspace_bytes,
            bytes_by_dtype=bytes_by_dtype(slot),
            host_bytes=slot.host_bytes,
            wake_s=slot.wake_s,
            wakes=slot.wakes,
            shares=shares_of(slot.split, self.neighbours),
        )

    def snapshot(
        self, state: PoolState, now_s: float, total_bytes_of_device: int, engines: dict[int, Engine]
    ) -> HostSnapshot:
        """Builds the snapshot of the device.

        Old generations are charged until they are unloaded, but only current ones are listed.
        """
        charged = state.charged()
        used = sum(slot.reserved.weight_bytes for slot in charged)
        workspace = max((slot.reserved.workspace_bytes for slot in charged), default=0)
        return HostSnapshot(
            host_id=self.host_id,
            device=self.device,
            total_bytes=total_bytes_of_device,
            budget_bytes=state.budget_bytes,
            used_bytes=used,
            workspace_bytes=workspace,
            free_bytes=max(0, state.budget_bytes - used - workspace),
            claimed_bytes=claimed_bytes(state),
            ceiling_bytes=state.ceiling_bytes if now_s < state.ceiling_until_s + _CEILING_S else None,
            residents=residents(charged, victim_order(state)),
            models=tuple(
                self.status(slot, engines.get(slot.slot_id), state.blocked) for slot in state.current.values()
            ),
            stuck=state.blocked,
            is_draining=state.is_draining,
            host_budget_bytes=state.host_budget_bytes,
            host_used_bytes=state.host_used_bytes(),
            parked=tuple(slot.model_id for slot in sorted(state.in_state("parked"), key=host_victim_order(state))),
        )

    def plan(self, state: PoolState, slot: Slot) -> Plan:
        """Predicts a load that begins now, as if no model were leased or within its minimum residency."""
        at, need = predict_form(state, slot)
        split = SplitPrediction(state, slot)
        evict: Sequence[Slot]
        if split.is_needed:
            evict, fits, reason = split.evict, split.fits, split.reason
        else:
            evict, fits, reason = predict_load(state, slot)
        return Plan(
            model_id=slot.model_id,
            host_id=self.host_id,
            state=slot.state,
            fits=fits,
            need_bytes=need.total_bytes,
            free_bytes=max(0, state.budget_bytes - total_bytes(charges(state.charged()))),
            evict=tuple(victim.model_id for victim in evict),
            seconds=expected_s(slot, need),
            reason=reason,
            dtype=(slot.spec.dtype, *slot.spec.smaller_dtypes)[at],
            bytes_by_dtype=bytes_by_dtype(slot),
            shares=shares_of(slot.split or split.split, self.neighbours),
        )


def expected_s(slot: Slot, need: MemoryNeed) -> float | None:
    """Returns the seconds until the model is ready, from earlier times; None if they are unknown."""
    if slot.state == "ready":
        return 0.0
    if slot.state == "parked":
        return wake_seconds(slot)
    return slot.load_s or need.load_s


def bytes_by_dtype(slot: Slot) -> dict[str, int]:
    """Returns the bytes of the weights in each dtype that a load may take; none where there is no choice."""
    if slot.need is None or not slot.need.smaller:
        return {}
    dtypes = (slot.spec.dtype, *(form.dtype for form in slot.need.smaller))
    return {dtype: form.weight_bytes for dtype, form in zip(dtypes, slot.need.forms, strict=True)}


def predict_form(state: PoolState, slot: Slot) -> tuple[int, MemoryNeed]:
    """Returns the form in memory, else the one that a load would take now, and its need without a cap."""
    need = slot.need or NO_MEMORY
    if slot.state == "parked":
        return slot.form, slot.measured
    if slot.state in CHARGED and slot.state not in LEAVING:
        return slot.form, need.in_form(slot.form)
    staying = [other for other in state.charged() if other is not slot]
    available_bytes = state.budget_bytes - total_bytes(charges(other for other in staying if other.is_pinned))
    at, _ = choose_form(need, staying, available_bytes, state.budget_bytes)
    return at, need.forms[at]


def residents(charged: Iterable[Slot], order: VictimOrder) -> tuple[str, ...]:
    """Returns model ids in eviction order: leaving, ready, loading, and last pinned models."""

    def place(slot: Slot) -> tuple[int, tuple[bool, float, float]]:
        rank = 0 if slot.state in LEAVING else 3 if slot.is_pinned else 1 if slot.state == "ready" else 2
        return rank, order(slot)

    return tuple(slot.model_id for slot in sorted(charged, key=place))


def predict_load(state: PoolState, slot: Slot) -> tuple[Sequence[Slot], bool, str]:
    """Returns (victims, whether it fits, reason). Six cases:

    1. in memory or loading;  2. larger than the budget;  3. does not fit beside pinned models;
    4. the size is unknown;  5. fits in free memory;  6. fits once the victims are evicted.
    """
    if slot.state in CHARGED and slot.state not in LEAVING:
        return (), True, f"{slot.state} already"  # (1)
    budget = state.budget_bytes
    if state.is_too_large(slot.need):
        if slot.need is not None and slot.need.parts is not None:
            return (), False, str(state.too_large(slot))  # (2)
        reason = f"needs {format_bytes(known_bytes(slot.need))} of a budget of {format_bytes(budget)}: it can never fit"
        return (), False, reason  # (2)
    if slot.need is None:
        return (), True, "its size is unknown until its files are downloaded"  # (4)
    staying = [other for other in state.charged() if other is not slot]
    pinned = [other for other in staying if other.is_pinned]
    need = predict_form(state, slot)[1].capped(budget - total_bytes(charges(pinned)))
    missing = missing_bytes(staying, need, budget)
    if missing == 0:
        return (), True, "fits in free memory" + (", from main memory" if slot.state == "parked" else "")  # (5)
    order = victim_order(state)
    victims = choose_victims(staying, [other for other in staying if not other.is_pinned], need, budget, order)
    if victims is None:
        return (), False, blocked_by_pinned(slot, total_bytes(charges(pinned)), budget)  # (3)
    return victims, True, f"{format_bytes(missing)} are missing; other models are evicted once idle"  # (6)
