"""Random events on the pure state machine; `tests/testkit/pool_storm.py` checks the invariants after every step.

`POOL_STORMS=56000 pytest tests/unit/engines/pool/test_storms.py` takes minutes.
"""

import os
from random import Random

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from engines.pool.messages import NEVER
from engines.types import Tier
from tests.testkit.pool_storm import CEILINGS, FATES, HOST_BUDGETS, Storm, random_specs, random_storm, random_truth

pytestmark = pytest.mark.slow

NUM_STORMS = int(os.environ.get("POOL_STORMS", "2000"))
"""Three in four are over two budgets. Of the mutants of `test_mutants.py`, the last is found in storm 235."""


@pytest.mark.parametrize("first", range(0, NUM_STORMS, 250))
def test_storms_break_no_invariant(first: int) -> None:
    for seed in range(first, first + 250):
        random_storm(seed)


class PoolMachine(RuleBasedStateMachine):
    """The same storms with hypothesis, which shrinks failing ones."""

    storm: Storm

    @initialize(seed=st.integers(0, 10_000), host_budget=st.sampled_from(HOST_BUDGETS))
    def start(self, seed: int, host_budget: int) -> None:
        random = Random(seed)
        self.storm = Storm(random_specs(random), random_truth(random), host_budget=host_budget)

    @rule(data=st.data(), keep_alive_s=st.sampled_from((None, 0.0, -1.0)), timeout_s=st.sampled_from((NEVER, 3.0)))
    def acquire(self, data: st.DataObject, keep_alive_s: float | None, timeout_s: float) -> None:
        model_id, may_move = data.draw(st.sampled_from(sorted(self.storm.specs))), data.draw(st.booleans())
        self.storm.acquire(model_id, keep_alive_s, timeout_s, may_move=may_move)

    @precondition(lambda self: any(map(self.storm.can_end, self.storm.work)))
    @rule(data=st.data(), ceiling=st.sampled_from(CEILINGS))
    def end_outside_work(self, data: st.DataObject, ceiling: int | None) -> None:
        index = data.draw(st.sampled_from([at for at, work in enumerate(self.storm.work) if self.storm.can_end(work)]))
        fate = data.draw(st.sampled_from(FATES.get(type(self.storm.work[index]), ("ok",))))
        self.storm.finish(index, fate, ceiling)

    @rule(is_time=st.integers(0, 9))
    def loads_hang_or_end_after_all(self, is_time: int) -> None:
        if self.storm.blocked or is_time == 0:
            self.storm.block("" if self.storm.blocked else "a load hangs")

    @precondition(lambda self: self.storm.leases)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        self.storm.release(data.draw(st.sampled_from(sorted(self.storm.leases))))

    @precondition(lambda self: self.storm.waiting or self.storm.leases or self.storm.evictors)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        some = sorted({*self.storm.waiting, *self.storm.leases, *self.storm.evictors})
        self.storm.cancel(data.draw(st.sampled_from(some)))

    @rule(seconds=st.sampled_from((0.01, 1.0, 6.0, 40.0)))
    def wait(self, seconds: float) -> None:
        self.storm.advance(seconds)

    @rule(data=st.data(), pin=st.booleans(), is_tentative=st.booleans())
    def preload(self, data: st.DataObject, pin: bool, is_tentative: bool) -> None:
        self.storm.preload(data.draw(st.sampled_from(sorted(self.storm.specs))), pin=pin, is_tentative=is_tentative)

    @rule(data=st.data(), force=st.booleans(), to=st.sampled_from(("disk", "host")))
    def evict(self, data: st.DataObject, force: bool, to: Tier) -> None:
        self.storm.evict(data.draw(st.sampled_from(sorted(self.storm.specs))), force=force, to=to)

    @rule(seed=st.integers(0, 1000))
    def reload(self, seed: int) -> None:
        self.storm.reload(random_specs(Random(seed)))

    @precondition(lambda self: not self.storm.is_draining)
    @rule(is_time=st.integers(0, 9))
    def shut_down(self, is_time: int) -> None:
        if is_time == 0:  # rarely, as a shutdown ends most other actions
            self.storm.drain()

    def teardown(self) -> None:
        if hasattr(self, "storm"):
            self.storm.settle()


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(
    max_examples=250,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,  # the same storms on every run: failures are reproducible
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
