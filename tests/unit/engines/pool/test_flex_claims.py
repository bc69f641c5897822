"""Claims of flex requests: they take free memory and that of models idle for long, until they have waited for long."""

import random

import pytest

from engines.pool.flex import is_patient, is_spared
from engines.pool.messages import LeaseRequested
from engines.pool.slot import NO_MEMORY, MemoryNeed, PoolPolicy, Slot
from engines.spec import ModelSpec
from engines.testing.fakes import fake_specs
from engines.types import State
from tests.testkit.pool_storm import Storm

RULES = PoolPolicy(flex_idle_s=300.0, flex_patience_s=120.0)


class Pool(Storm):
    """A `Storm` driven by the test, with flex requests."""

    def __init__(self, **weights: int) -> None:
        truth = {name: MemoryNeed(weight_bytes=size, workspace_bytes=10) for name, size in weights.items()}
        super().__init__(fake_specs(*weights), truth, rules=RULES)

    def acquire_flex(self, model_id: str) -> int:
        waiter_id = self._new_id()
        self.waiting[waiter_id] = model_id
        self._note_request(model_id)
        self.step(LeaseRequested(waiter_id, model_id, is_flex=True))
        return waiter_id

    def _can_fit(self, slot_id: int) -> bool:
        """See `Storm`: the claims that others keep their order with, which those of flex requests do not ask for."""
        return not self.core.state.slots[slot_id].is_flex_claim and super()._can_fit(slot_id)

    def state(self, model_id: str) -> State:
        return self.core.state.current[model_id].state

    def finish_all(self) -> None:
        """Completes all asynchronous work successfully."""
        while self.work:
            self.finish(0)

    def wait(self, seconds: float) -> None:
        """Lets time pass, completing all work at once."""
        until_s = self.now_s + seconds
        while self.now_s < until_s:
            self.finish_all()
            self.advance(min(1.0, until_s - self.now_s))
        self.finish_all()

    def load_idle(self, model_id: str) -> None:
        lease = self.acquire(model_id)
        self.finish_all()
        self.advance(10)
        self.release(lease)


@pytest.fixture
def pool() -> Pool:
    """A pool in which `hot` is in memory, and `cold` fits only without it."""
    pool = Pool(hot=600, cold=600, small=100)
    pool.load_idle("hot")
    return pool


def test_a_flex_request_takes_free_memory_at_once(pool: Pool) -> None:
    pool.acquire_flex("small")
    pool.finish_all()

    assert (pool.state("small"), pool.state("hot")) == ("ready", "ready")


def test_a_flex_request_waits_rather_than_evict_a_model_in_use(pool: Pool) -> None:
    waiting = pool.acquire_flex("cold")
    pool.wait(100)

    assert (pool.state("hot"), pool.state("cold")) == ("ready", "waiting_space")
    assert waiting in pool.waiting


def test_a_model_that_is_idle_for_long_leaves_for_a_flex_request(pool: Pool) -> None:
    pool.advance(250)
    pool.acquire_flex("cold")
    pool.wait(40)
    before = pool.state("hot")
    pool.wait(20)

    assert (before, pool.state("hot"), pool.state("cold")) == ("ready", "cold", "ready")


def test_a_flex_request_that_has_waited_for_long_is_served_as_any_other(pool: Pool) -> None:
    waiting = pool.acquire_flex("cold")
    for _ in range(12):
        pool.wait(9.9)
        pool.release(pool.acquire("hot"))
    before = pool.state("cold")
    pool.wait(10)

    assert (before, pool.state("cold")) == ("waiting_space", "ready")
    assert waiting in pool.leases


def test_another_request_for_the_model_makes_the_claim_an_ordinary_one(pool: Pool) -> None:
    waiting = [pool.acquire_flex("cold")]
    pool.wait(20)
    waiting.append(pool.acquire("cold"))
    pool.finish_all()

    assert pool.state("cold") == "ready"
    assert set(waiting) <= set(pool.leases)


def test_a_flex_request_delays_no_younger_claim(pool: Pool) -> None:
    """Alone, the younger claim is served at once."""
    pool = Pool(hot=600, cold=600, other=600)
    pool.load_idle("hot")
    pool.acquire_flex("cold")
    pool.wait(10)
    pool.acquire("other")
    pool.finish_all()

    assert (pool.state("other"), pool.state("cold")) == ("ready", "waiting_space")


def test_a_flex_request_does_not_drain_a_busy_model_before_its_time(pool: Pool) -> None:
    pool.acquire("hot")
    pool.acquire_flex("cold")
    pool.wait(100)

    assert pool.state("hot") == "ready"


def test_a_leased_model_is_spared_however_long_ago_it_was_asked() -> None:
    slot = Slot(slot_id=1, spec=ModelSpec(model_id="m", source="x"), state="ready", reserved=NO_MEMORY)
    idle = is_spared(slot, RULES, 1000.0)
    slot.leases = {1}

    assert (idle, is_spared(slot, RULES, 1000.0)) == (False, True)


def test_a_preloaded_model_is_not_patient() -> None:
    slot = Slot(slot_id=1, spec=ModelSpec(model_id="m", source="x"), is_flex_claim=True)
    patient = is_patient(slot, RULES, 1.0)
    slot.is_wanted = True

    assert (patient, is_patient(slot, RULES, 1.0)) == (True, False)


@pytest.mark.parametrize("seed", range(20))
def test_every_request_is_answered_in_a_storm_with_flex_requests(seed: int) -> None:
    chance = random.Random(seed)
    pool = Pool(a=300, b=300, c=500, d=600)
    for _ in range(120):
        step = chance.randrange(5)
        if step == 0:
            pool.acquire_flex(chance.choice("abcd"))
        elif step == 1:
            pool.acquire(chance.choice("abcd"))
        elif step == 2 and pool.leases:
            pool.release(chance.choice(list(pool.leases)))
        elif step == 3 and (open_requests := [*pool.waiting, *pool.leases]):
            pool.cancel(chance.choice(open_requests))
        else:
            pool.finish_all()
            pool.advance(chance.choice([0.1, 3.0, 60.0]))
    pool.settle()

    assert not pool.waiting
