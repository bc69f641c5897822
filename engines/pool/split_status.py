"""Describes where the parts of split models are, and predicts where they would go."""

from collections.abc import Sequence

from msgspec import structs

from engines.pool.eviction import choose_victims, never_fits
from engines.pool.neighbours import Neighbours
from engines.pool.reasons import cannot_be_split
from engines.pool.slot import Share, Slot, Split
from engines.pool.split_admission import describe
from engines.pool.splitting import must_split, pools_of, target
from engines.pool.state import PoolState
from engines.pool.victim_order import victim_order
from engines.types import ModelShare


def shares_of(split: Split | None, neighbours: Neighbours) -> tuple[ModelShare, ...]:
    """Returns the public records of a split's shares; none for a model that is not split."""
    if split is None:
        return ()
    return tuple(
        ModelShare(
            host_id=neighbours.name_of(share.pool),
            device_bytes=share.need.total_bytes,
            host_bytes=share.host_bytes,
            num_parts=share.num_parts,
        )
        for share in split.shares
    )


class SplitPrediction:
    """What a load would do now that has to split the model; as if no model were leased or within its residency.

    Attributes:
        is_needed: whether the model has to be split.
        split: None where it does not fit.
        evict: the models that would leave, of all devices.
        fits: whether it fits then.
    """

    def __init__(self, state: PoolState, slot: Slot) -> None:
        claim = structs.replace(slot, state="waiting_space")
        self.is_needed = slot.split is None and must_split(state, claim)
        self.split = target(state, claim, within_budgets=True) if self.is_needed else None
        self.evict: tuple[Slot, ...] = ()
        self.reason = ""
        self.fits = self.split is not None
        if not self.is_needed:
            self._look_ahead(state, slot)
            return
        pools = pools_of(state, slot)
        if self.split is None:
            devices = sum(pool.budget_bytes for pool in pools)
            self.reason = cannot_be_split(slot, devices, sum(pool.host_budget_bytes for pool in pools))
            return
        self.evict = _evicted(pools, self.split)
        self.reason = f"split: {describe(state, self.split)}"
        if self.evict:
            self.reason += "; other models are evicted once idle"

    def _look_ahead(self, state: PoolState, slot: Slot) -> None:
        """Answers for a model whose files are not on disk: it is not too large for all budgets together."""
        need = slot.need
        is_known = need is None or need.parts != () or state.is_too_large(need)
        if is_known or need is None or not never_fits(need, (), state.budget_bytes):
            return
        self.is_needed = self.fits = True
        self.reason = "will be split over the devices of this host; where is known once its files are on disk"


def _evicted(pools: Sequence[PoolState], split: Split) -> tuple[Slot, ...]:
    """Returns the models that leave the devices, each once."""
    found: dict[int, Slot] = {}
    for pool in pools:
        share = split.share_of(pool.index) or Share(pool=pool.index)
        staying = [slot for slot in pool.charged() if slot.slot_id not in found]
        movable = [slot for slot in staying if not slot.is_pinned]
        order = victim_order(pool)
        victims = choose_victims(staying, movable, share.need, pool.budget_bytes, order) or ()
        found |= {victim.slot_id: victim for victim in victims}
    return tuple(found.values())
