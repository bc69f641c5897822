"""The order of eviction by expected cost, over both budgets."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.pool.eviction import choose_victims
from engines.pool.parking import Parking
from engines.pool.slot import MemoryNeed, PoolPolicy, Slot
from engines.pool.state import PoolState
from engines.pool.victim_order import CostOrder, host_victim_order, victim_order
from engines.spec import ModelSpec
from engines.types import ModelFiles, Tier

DECAY_S = 100.0
RULES = PoolPolicy(eviction="cost", heat_decay_s=DECAY_S, min_residency_s=0.0, residency_loads=0.0)


class Pool:
    """A pool's state at one moment, whose models are given."""

    def __init__(self, *, host_budget: int = 0, now_s: float = 100.0, rules: PoolPolicy = RULES) -> None:
        self.state = PoolState({}, 1000, rules, host_budget)
        self.state.now_s = now_s

    def add(
        self, model_id: str, weight_bytes: int, *, requests: int = 1, load_s: float = 1.0, wake_s: float | None = None
    ) -> Slot:
        """Adds a ready model."""
        slot = self.state.add_slot(ModelSpec(model_id=model_id, source="x"))
        slot.state, slot.files = "ready", ModelFiles(path="x", revision="x", size_bytes=0)
        slot.reserved = slot.measured = MemoryNeed(weight_bytes=weight_bytes, workspace_bytes=5)
        slot.load_s, slot.wake_s = load_s, wake_s
        for _ in range(requests):
            slot.heat_up(90.0, DECAY_S)
        return slot

    def add_parked(
        self, model_id: str, weight_bytes: int, *, requests: int = 1, load_s: float = 1.0, wake_s: float | None = None
    ) -> Slot:
        slot = self.add(model_id, weight_bytes, requests=requests, load_s=load_s, wake_s=wake_s)
        slot.state, slot.host_bytes, slot.reserved = "parked", weight_bytes, MemoryNeed()
        return slot

    def order(self) -> list[str]:
        ready = self.state.in_state("ready")
        return [slot.model_id for slot in sorted(ready, key=victim_order(self.state))]

    def host_order(self) -> list[str]:
        parked = self.state.in_state("parked")
        return [slot.model_id for slot in sorted(parked, key=host_victim_order(self.state))]


def test_a_model_that_is_often_asked_stays_before_one_that_was_asked_last() -> None:
    pool = Pool()
    often, last = pool.add("often", 40, requests=10), pool.add("last", 40)
    often.last_used_at_s, last.last_used_at_s = 50.0, 99.0

    assert pool.order() == ["last", "often"]
    victims = choose_victims([often, last], [often, last], MemoryNeed(weight_bytes=50), 100)
    assert victims == (often,)  # the least recently used one


def test_requests_of_long_ago_count_little() -> None:
    pool = Pool(now_s=600.0)
    pool.add("once", 40, requests=10)
    now = pool.add("now", 40, requests=0)

    assert pool.order() == ["now", "once"]
    now.heat_up(600.0, DECAY_S)
    assert pool.order() == ["once", "now"]


def test_a_model_that_loads_slowly_stays_and_a_large_one_leaves() -> None:
    pool = Pool()
    pool.add("slow", 40, load_s=9)
    pool.add("large", 80)
    pool.add("plain", 40)

    assert pool.order() == ["large", "plain", "slow"]


def test_idle_models_leave_before_busy_ones_and_unasked_ones_first() -> None:
    pool = Pool()
    pool.add("busy", 40).leases = {1}
    pool.add("idle", 40)
    pool.add("preloaded", 40, requests=0)

    assert pool.order() == ["preloaded", "idle", "busy"]


def test_a_model_that_would_be_parked_costs_the_seconds_of_a_copy() -> None:
    """`slow` loads for a minute, but would come back from main memory in a tenth of a second."""
    models = {"slow": (60.0, 0.1), "quick": (2.0, 0.2)}
    parks, loads = Pool(host_budget=100), Pool(host_budget=0)
    for pool in (parks, loads):
        for model_id, (load_s, wake_s) in models.items():
            pool.add(model_id, 40, load_s=load_s, wake_s=wake_s)

    assert parks.order() == ["slow", "quick"]
    assert loads.order() == ["quick", "slow"]


def test_a_model_for_which_main_memory_has_no_room_costs_a_load() -> None:
    pool = Pool(host_budget=50)
    pool.add("large", 80, load_s=4.0, wake_s=0.1)
    pool.add("small", 40, load_s=60.0, wake_s=0.1)

    assert pool.order() == ["small", "large"]


def test_a_model_that_would_displace_parked_ones_costs_their_loads_too() -> None:
    """Main memory has room for `small` beside `parked`; `large` would displace that, which is asked now and then."""
    pool = Pool(host_budget=60)
    pool.add_parked("parked", 40, requests=2, load_s=50.0, wake_s=0.1)
    pool.add("large", 40, requests=3, load_s=50.0, wake_s=0.1)
    pool.add("small", 20, requests=3, load_s=50.0, wake_s=0.1)
    assert [CostOrder(pool.state).next_tier(slot) for slot in pool.state.in_state("ready")] == ["host", "host"]

    assert pool.order() == ["small", "large"]


def test_of_an_unmeasured_copy_the_bytes_tell_how_long_it_takes() -> None:
    pool = Pool(host_budget=10**12)
    pool.add("known", 10**9, wake_s=0.2)
    pool.add("unknown", 10**9)

    assert pool.order() == ["unknown", "known"]  # 10 GB/s


def test_main_memory_is_left_first_by_the_model_whose_load_takes_the_least_longer_than_its_copy() -> None:
    pool = Pool(host_budget=1000)
    pool.add_parked("same", 40, load_s=9.0, wake_s=9.0)
    pool.add_parked("dear", 40, load_s=9.0, wake_s=0.1)
    pool.add_parked("cheap", 40, load_s=2.0, wake_s=0.1)

    assert pool.host_order() == ["same", "cheap", "dear"]


def test_a_busy_model_would_displace_the_parked_ones_that_an_idle_one_would() -> None:
    pool = Pool(host_budget=40)
    pool.add_parked("hot", 40, requests=9, wake_s=0.1)
    busy = pool.add("busy", 40, wake_s=0.1)
    busy.leases = {1}

    assert CostOrder(pool.state).next_tier(busy) == "disk"


def test_room_that_models_on_their_way_to_main_memory_will_take_is_not_counted() -> None:
    pool = Pool(host_budget=50)
    first, second = pool.add("first", 40), pool.add("second", 40)
    assert CostOrder(pool.state).next_tier(second) == "host"

    first.leases = {1}
    pool.state.drain(first, "evicted for another")

    assert CostOrder(pool.state).next_tier(second) == "disk"


def test_a_model_that_may_not_be_parked_comes_back_from_disk() -> None:
    pool = Pool(host_budget=50)
    slot = pool.add("replaced", 40)
    slot.is_retired = True

    assert CostOrder(pool.state).next_tier(slot) == "disk"


SIZES = st.integers(1, 60)
MODELS = st.tuples(SIZES, st.integers(0, 5), st.floats(0.1, 60.0), st.one_of(st.none(), st.floats(0.01, 60.0)))


@given(
    ready=st.lists(MODELS, min_size=1, max_size=4),
    parked=st.lists(MODELS, max_size=4),
    spare=st.integers(0, 60),
    pinned=st.sets(st.integers(0, 3)),
)
def test_the_tier_that_the_cost_assumes_is_where_the_model_is_put(
    ready: list[tuple[int, int, float, float | None]],
    parked: list[tuple[int, int, float, float | None]],
    spare: int,
    pinned: set[int],
) -> None:
    pool = Pool(host_budget=sum(model[0] for model in parked) + spare)
    for at, (size, requests, load_s, wake_s) in enumerate(parked):
        slot = pool.add_parked(f"parked-{at}", size, requests=requests, load_s=load_s, wake_s=wake_s)
        slot.operator_pin = at in pinned
    for at, (size, requests, load_s, wake_s) in enumerate(ready):
        pool.add(f"ready-{at}", size, requests=requests, load_s=load_s, wake_s=wake_s)
    victim = min(pool.state.in_state("ready"), key=victim_order(pool.state))
    expected = CostOrder(pool.state).next_tier(victim)

    pool.state.drain(victim, "evicted for another")
    Parking(pool.state).place()

    found: Tier = "disk" if victim.state == "unloading" else "host"
    assert victim.state in ("unloading", "parking", "draining")
    assert found == expected


@given(models=st.lists(MODELS, min_size=1, max_size=5), budget=st.integers(0, 200))
def test_the_victim_is_the_one_whose_return_costs_least_for_its_bytes(
    models: list[tuple[int, int, float, float | None]], budget: int
) -> None:
    pool = Pool(host_budget=budget)
    costs = {}
    for at, (size, requests, load_s, wake_s) in enumerate(models):
        pool.add(str(at), size, requests=requests, load_s=load_s, wake_s=wake_s)
        back_s = (wake_s or size / 10e9) if budget and size <= budget else load_s
        costs[str(at)] = requests * back_s / size

    found = [costs[model_id] for model_id in pool.order()]

    assert found == pytest.approx(sorted(found), rel=1e-9)
