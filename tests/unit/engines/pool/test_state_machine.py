"""The pool's thirteen rules (`house.md`), each by example, on the pure state machine; `test_storms.py` tests them at
random."""

from collections.abc import Mapping

import pytest
from msgspec import structs

from engines.errors import (
    LoadFailed,
    ModelInUse,
    ModelLoading,
    ModelNotFound,
    ModelPinned,
    ModelTooLarge,
    OutOfMemory,
    ShuttingDown,
)
from engines.pool.messages import (
    Discard,
    DownloadProgressed,
    Effect,
    Emit,
    Fail,
    FilesLocated,
    Grant,
    LeaseReleased,
    PreloadRequested,
    StartFetch,
    StartLoad,
    StartLocate,
    StartUnload,
    WarmUpCompleted,
)
from engines.pool.slot import MemoryNeed
from engines.pool.state_machine import PoolStateMachine
from engines.pool.status import StatusView
from engines.spec import ModelSpec
from engines.testing.fakes import fake_specs
from engines.types import State
from tests.testkit.pool_storm import BUDGET, Storm, a_folder

DAY_S = 86_400.0


def need(weight_bytes: int, workspace_bytes: int = 10) -> MemoryNeed:
    return MemoryNeed(weight_bytes=weight_bytes, workspace_bytes=workspace_bytes)


class Pool(Storm):
    """A `Storm` driven by the test; its invariants are checked after every step."""

    def __init__(self, specs: Mapping[str, ModelSpec] | None = None, **weights: int) -> None:
        truth = {model_id: need(weight_bytes) for model_id, weight_bytes in weights.items()}
        super().__init__(specs or fake_specs(*weights), truth)
        self.seen: list[Effect] = []

    def step(self, event: object) -> list[Effect]:
        effects = list(super().step(event))  # type: ignore[arg-type]  # any event: the machine refuses others
        self.seen += effects
        return effects

    def state(self, model_id: str) -> State:
        return self.core.state.current[model_id].state

    def finish_all(self) -> None:
        """Completes all asynchronous work successfully."""
        while self.work:
            self.finish(0)

    def load(self, model_id: str) -> int:
        """Leases a cold model and waits for the end of its minimum residency."""
        waiter_id = self.acquire(model_id)
        self.finish_all()
        assert waiter_id in self.leases
        self.advance(10)
        return waiter_id

    def load_idle(self, model_id: str) -> None:
        """Loads a model and releases it; it is past its minimum residency."""
        self.release(self.load(model_id))

    def error(self, waiter_id: int) -> Exception:
        """Returns the error of the waiter."""
        return next(effect.error for effect in self.seen if isinstance(effect, Fail) and effect.waiter_id == waiter_id)

    def causes(self, model_id: str) -> list[str]:
        return [effect.cause for effect in self.seen if isinstance(effect, Emit) and effect.model_id == model_id]

    def count(self, kind: type) -> int:
        return sum(isinstance(effect, kind) for effect in self.seen)


# ---- smaller dtypes ------------------------------------------------------------------------------------------


def with_int8(*model_ids: str) -> dict[str, ModelSpec]:
    return {
        model_id: structs.replace(spec, dtype="float32", smaller_dtypes=("int8",))
        for model_id, spec in fake_specs(*model_ids).items()
    }


def loaded_dtypes(pool: Pool) -> list[tuple[str, str]]:
    return [(effect.spec.model_id, effect.spec.dtype) for effect in pool.seen if isinstance(effect, StartLoad)]


def test_a_model_is_loaded_in_its_preferred_dtype_where_that_fits() -> None:
    pool = Pool(with_int8("a"), a=300)
    pool.load_idle("a")

    assert loaded_dtypes(pool) == [("a", "float32")]


def test_a_smaller_dtype_is_taken_rather_than_a_model_evicted() -> None:
    pool = Pool(with_int8("a", "b"), a=600, b=600)
    pool.load_idle("a")
    pool.load_idle("b")

    assert loaded_dtypes(pool) == [("a", "float32"), ("b", "int8")]
    assert pool.state("a") == pool.state("b") == "ready"
    assert "in int8" in next(cause for cause in pool.causes("b") if "admitted" in cause)


def test_where_no_dtype_fits_models_are_evicted_for_the_smallest() -> None:
    pool = Pool(with_int8("a", "b", "c"), a=600, b=900, c=600)
    pool.load_idle("a")
    pool.load_idle("b")
    pool.load_idle("c")

    assert loaded_dtypes(pool) == [("a", "float32"), ("b", "int8"), ("c", "float32")]
    assert pool.state("a") == "cold"


def test_a_model_whose_preferred_dtype_exceeds_the_budget_is_loaded_in_a_smaller_one() -> None:
    pool = Pool(with_int8("a"), a=2 * BUDGET)
    pool.load_idle("a")

    assert loaded_dtypes(pool) == [("a", "int8")]


def test_a_model_that_was_small_is_loaded_in_its_preferred_dtype_once_there_is_room() -> None:
    pool = Pool(with_int8("a", "b"), a=600, b=600)
    pool.load_idle("a")
    pool.load_idle("b")
    for model_id in ("a", "b"):
        pool.evict(model_id)
    pool.finish_all()
    pool.load_idle("b")

    assert loaded_dtypes(pool)[-1] == ("b", "float32")


def test_the_bytes_of_each_dtype_are_known_and_those_in_use_are_measured() -> None:
    pool = Pool(with_int8("a", "b"), a=600, b=600)
    pool.load_idle("a")
    pool.load_idle("b")
    state = pool.core.state
    view = StatusView("h", "cpu", lambda at_s: at_s)

    status, plan = view.status(state.current["b"], None), view.plan(state, state.current["b"])

    assert status.bytes_by_dtype == plan.bytes_by_dtype == {"float32": 600, "int8": 200}
    assert status.need_bytes == status.weight_bytes == 200
    assert plan.dtype == "int8"


# ---- rules 1 to 3: leases ------------------------------------------------------------------------------------


def test_a_cold_model_goes_through_every_state_and_grants_in_the_step_that_makes_it_ready() -> None:
    pool = Pool(a=100)
    waiter_id = pool.acquire("a")

    pool.finish_all()

    path = [effect.target for effect in pool.seen if isinstance(effect, Emit)]
    assert path == ["fetching", "cold", "waiting_space", "loading", "warming", "ready"]
    assert Grant(waiter_id, 0) in pool.seen


def test_a_request_for_a_ready_model_is_granted_at_once() -> None:
    pool = Pool(a=100)
    pool.load_idle("a")

    waiter_id = pool.acquire("a")

    assert waiter_id in pool.leases


def test_twenty_requests_for_a_cold_model_are_one_download_and_one_load() -> None:
    pool = Pool(a=100)
    waiters = [pool.acquire("a") for _ in range(20)]
    pool.finish(0, "absent")

    pool.finish_all()

    assert set(waiters) == set(pool.leases)
    assert (pool.count(StartLocate), pool.count(StartFetch), pool.count(StartLoad)) == (1, 1, 1)


def test_a_ready_model_serves_while_another_loads() -> None:
    pool = Pool(a=100, b=100)
    pool.load_idle("a")
    pool.acquire("b")
    pool.finish(0)

    waiter_id = pool.acquire("a")

    assert waiter_id in pool.leases


def test_a_leased_model_is_never_freed_for_a_claim() -> None:
    pool = Pool(a=600, b=600)
    lease = pool.load("a")
    pool.acquire("b")
    pool.finish_all()

    pool.advance(4)

    assert pool.state("a") == "ready"
    assert lease in pool.leases


def test_when_the_first_requester_leaves_the_load_goes_on_for_the_second() -> None:
    pool = Pool(a=100)
    first, second = pool.acquire("a"), pool.acquire("a")
    pool.cancel(first)

    pool.finish_all()

    assert list(pool.leases) == [second]


def test_a_load_without_waiters_still_ends_ready() -> None:
    pool = Pool(a=100)
    pool.cancel(pool.acquire("a"))

    pool.finish_all()

    assert pool.state("a") == "ready"


def test_a_lease_cancelled_in_the_tick_of_its_grant_is_given_back() -> None:
    pool = Pool(a=100)
    pool.load_idle("a")

    pool.cancel(pool.acquire("a"))

    assert pool.core.state.current["a"].leases == set()


def test_releasing_an_unheld_lease_raises() -> None:
    pool = Pool(a=100)

    with pytest.raises(RuntimeError, match="is not held"):
        pool.core.handle(LeaseReleased(7), 1.0)


# ---- rules 4 to 6: admission and eviction ---------------------------------------------------------------


def test_the_oldest_claim_is_served_first_even_when_it_is_large() -> None:
    pool = Pool(a=600, large=900, small=300)
    lease = pool.load("a")
    pool.acquire("large")
    pool.acquire("small")
    pool.finish_all()
    pool.release(lease)

    pool.finish_all()

    assert pool.state("large") == "ready"
    assert pool.state("small") == "waiting_space"


def test_a_younger_claim_passes_when_it_delays_no_other() -> None:
    pool = Pool(a=600, large=700, small=200)
    pool.load("a")
    pool.acquire("large")
    pool.acquire("small")

    pool.finish_all()

    assert pool.state("small") == "ready"
    assert pool.state("large") == "waiting_space"


def test_memory_that_a_busy_model_frees_for_a_claim_is_not_taken_by_a_younger_claim() -> None:
    pool = Pool(a=300, b=400, large=500, small=150)
    lease = pool.load("a")
    pool.load("b")
    pool.acquire("large")
    pool.finish_all()
    pool.advance(5)
    pool.finish_all()
    assert (pool.state("a"), pool.state("b")) == ("draining", "ready")

    pool.acquire("small")
    pool.finish_all()
    pool.release(lease)
    pool.finish_all()

    assert (pool.state("large"), pool.state("small")) == ("ready", "waiting_space")
    assert pool.state("b") == "ready"


def test_small_claims_that_pass_one_by_one_do_not_starve_the_large_one() -> None:
    pool = Pool(a=600, large=700, one=150, two=150)
    pool.load("a")
    pool.acquire("large")
    pool.acquire("one")
    pool.finish_all()

    pool.acquire("two")
    pool.finish_all()

    assert (pool.state("one"), pool.state("two")) == ("ready", "waiting_space")


def test_a_busy_model_drains_for_an_overdue_claim_and_new_requests_wait_their_turn() -> None:
    pool = Pool(a=600, b=600)
    lease = pool.load("a")
    waiting = pool.acquire("b")
    pool.finish_all()
    pool.advance(5)
    pool.finish_all()

    late = pool.acquire("a")

    assert pool.state("a") == "draining"
    assert late in pool.waiting
    pool.release(lease)
    pool.finish_all()
    assert waiting in pool.leases


def test_the_least_recently_used_model_leaves() -> None:
    pool = Pool(a=300, b=300, c=300, d=300)
    for model_id in "abc":
        pool.load_idle(model_id)
    pool.release(pool.acquire("a"))
    pool.advance(10)
    pool.acquire("d")

    pool.finish_all()

    assert pool.state("b") == "cold"
    assert (pool.state("a"), pool.state("c"), pool.state("d")) == ("ready", "ready", "ready")


def test_a_model_younger_than_its_minimum_residency_stays() -> None:
    pool = Pool(a=600, b=600)
    waiter_id = pool.acquire("a")
    pool.finish_all()
    pool.release(waiter_id)
    pool.acquire("b")
    pool.finish_all()
    assert pool.state("a") == "ready"

    pool.advance(5)
    pool.finish_all()

    assert pool.state("b") == "ready"


def test_a_slow_load_earns_a_longer_residency() -> None:
    pool = Pool(a=600, b=600)
    waiter_id = pool.acquire("a")
    pool.finish(0)
    pool.finish(0)
    pool.advance(20)
    pool.finish_all()
    pool.release(waiter_id)
    pool.acquire("b")
    pool.finish_all()

    pool.advance(59)
    assert pool.state("a") == "ready"
    pool.advance(1)
    pool.finish(0)

    assert pool.state("a") == "unloading"


def test_no_model_is_evicted_for_a_claim_that_would_still_not_fit() -> None:
    pool = Pool(a=300, b=300, c=900)
    pool.load_idle("a")
    pool.load("b")
    pool.acquire("c")

    pool.finish_all()

    assert (pool.state("a"), pool.state("b")) == ("ready", "ready")


def test_an_eviction_names_its_claimant() -> None:
    pool = Pool(a=600, b=600)
    pool.load_idle("a")
    pool.acquire("b")

    pool.finish_all()

    left = next(effect for effect in pool.seen if isinstance(effect, Emit) and effect.target == "draining")
    assert (left.model_id, left.claimant) == ("a", "b")
    assert "evicted for b, which needs 660 B" in left.cause


def test_bytes_are_credited_only_when_the_unload_is_done() -> None:
    pool = Pool(a=600, b=600)
    pool.load_idle("a")
    pool.acquire("b")
    pool.finish(0)
    pool.finish(0)
    assert pool.state("a") == "unloading"

    pool.advance(100)

    assert pool.state("b") == "waiting_space"
    assert pool.count(StartLoad) == 1


def test_the_largest_workspace_is_reserved_once() -> None:
    pool = Pool(a=450, b=450)
    pool.load_idle("a")

    pool.load_idle("b")

    assert pool.used() == 450 + 450 + 10


def test_pinned_models_stay_and_models_that_cannot_fit_beside_them_fail_at_once() -> None:
    specs = {**fake_specs("b"), "a": ModelSpec(model_id="a", source="x", pinned=True)}
    pool = Pool(specs, a=600, b=600)
    pool.load_idle("a")
    waiter_id = pool.acquire("b")

    pool.finish_all()

    assert isinstance(pool.error(waiter_id), OutOfMemory)
    assert "needs 600 B, but pinned models use 610 B of the memory budget of 1000 B" in str(pool.error(waiter_id))
    assert (pool.state("a"), pool.state("b")) == ("ready", "cold")


def test_keep_alive_ends_a_stay_and_a_lease_prolongs_it() -> None:
    pool = Pool({"a": ModelSpec(model_id="a", source="x", keep_alive_s=30)}, a=100)
    pool.load_idle("a")
    pool.advance(25)
    pool.release(pool.acquire("a"))
    pool.advance(29)
    assert pool.state("a") == "ready"

    pool.advance(1)

    assert pool.state("a") == "unloading"
    assert "idle for its keep_alive of 30 s" in pool.causes("a")


@pytest.mark.parametrize("of_spec", [30.0, -1.0])
def test_a_request_with_keep_alive_0_is_the_last_one(of_spec: float) -> None:
    pool = Pool({"a": ModelSpec(model_id="a", source="x", keep_alive_s=of_spec)}, a=100)
    pool.load("a")
    last = pool.acquire("a", 0.0)
    assert pool.state("a") == "ready"

    for lease in list(pool.leases):
        pool.release(lease)

    assert last not in pool.leases
    assert pool.state("a") == "unloading"


def test_a_request_with_keep_alive_never_keeps_the_model() -> None:
    pool = Pool({"a": ModelSpec(model_id="a", source="x", keep_alive_s=30)}, a=100)
    pool.load_idle("a")

    pool.release(pool.acquire("a", -1.0))
    pool.advance(DAY_S)

    assert pool.state("a") == "ready"


# ---- rules 7 and 8: estimates, deficits, out of memory -----------------------------------------------------------


def test_a_model_known_not_to_fit_is_refused_before_its_download() -> None:
    pool = Pool(a=1001)
    waiter_id = pool.acquire("a")

    pool.finish(0, "absent")

    assert isinstance(pool.error(waiter_id), ModelTooLarge)
    assert pool.count(StartFetch) == 0
    assert isinstance(pool.error(pool.acquire("a")), ModelTooLarge)


def test_a_model_of_unknown_size_is_downloaded_and_then_judged() -> None:
    pool = Pool(a=1001)
    waiter_id = pool.acquire("a")
    pool.finish(0, "unknown")

    pool.finish_all()

    assert isinstance(pool.error(waiter_id), ModelTooLarge)
    assert pool.count(StartLoad) == 0


def test_a_guessed_workspace_never_refuses_a_model() -> None:
    pool = Pool(a=985)

    pool.load_idle("a")

    assert pool.state("a") == "ready"


def test_a_model_measured_larger_than_the_budget_is_unloaded_and_said_to_be() -> None:
    pool = Pool(a=990)
    pool.truth = {"a": need(990, 20)}
    waiter_id = pool.acquire("a")

    pool.finish_all()

    assert isinstance(pool.error(waiter_id), ModelTooLarge)
    assert "needs 1010 B, but the memory budget is 1000 B" in str(pool.error(waiter_id))
    assert pool.state("a") == "cold"


def test_an_overshoot_is_a_deficit_that_others_pay_before_anything_loads() -> None:
    pool = Pool(a=300, b=900, c=100)
    pool.load_idle("a")
    pool.acquire("b")
    pool.finish(0, "low")

    pool.finish_all()

    assert (pool.state("a"), pool.state("b")) == ("cold", "ready")
    assert any("memory is over the budget by" in cause for cause in pool.causes("a"))


def test_others_using_the_device_keep_a_model_out_until_they_leave() -> None:
    pool = Pool(a=600)
    waiter_id = pool.acquire("a")
    pool.finish(0)
    pool.finish(0, ceiling=300)
    assert pool.state("a") == "waiting_space"

    pool.advance(1)
    pool.finish_all()

    assert waiter_id in pool.leases


def test_a_request_that_another_host_could_take_does_not_wait_for_memory_that_others_hold() -> None:
    pool = Pool(a=600)
    moving = pool.acquire("a", may_move=True)
    pool.finish(0)
    pool.finish(0, ceiling=300)

    error = pool.error(moving)
    assert isinstance(error, OutOfMemory)
    assert (error.stage, pool.state("a")) == ("load", "cold")
    assert "needs 660 B, but other processes leave only 300 B of this device's memory" in str(error)
    pool.advance(DAY_S)
    assert pool.work == []


def test_requests_without_another_host_wait_for_memory_that_other_processes_hold() -> None:
    pool = Pool(a=600)
    moving, staying = pool.acquire("a", may_move=True), pool.acquire("a")
    pool.finish(0)
    pool.finish(0, ceiling=300)
    assert (pool.state("a"), moving in pool.waiting) == ("waiting_space", False)

    pool.advance(1)
    pool.finish_all()

    assert staying in pool.leases


def test_a_tentative_preload_that_fails_leaves_no_wish_and_no_pin() -> None:
    pool = Pool(a=100)
    pool.step(PreloadRequested("a", is_pin=True, is_tentative=True))
    pool.finish(0)
    pool.finish(0)
    pool.finish(0, "bad_model")

    pool.advance(DAY_S)

    assert (pool.state("a"), pool.work, pool.core.state.current["a"].is_pinned) == ("failed", [], False)


def test_a_claim_that_others_keep_out_does_not_hold_up_those_that_fit() -> None:
    """Another process uses most of the device: the oldest claim does not fit, whatever is evicted, and waits for it."""
    pool = Pool(a=800, b=100)
    large = pool.acquire("a")
    pool.finish(0)
    pool.finish(0, ceiling=300)
    small = pool.acquire("b")
    pool.finish(0)

    for _ in range(3):
        pool.advance(1)
        while pool.work:
            pool.finish(0, ceiling=300)

    assert small in pool.leases
    assert (pool.state("a"), large in pool.waiting) == ("waiting_space", True)
    pool.release(small)
    pool.settle()
    assert pool.count(StartLoad) == 2


def test_no_model_is_evicted_for_a_claim_that_other_processes_keep_out() -> None:
    pool = Pool(a=300, b=800)
    pool.load_idle("a")
    waiter_id = pool.acquire("b")
    for _ in range(3):
        pool.advance(1)
        while pool.work:
            pool.finish(0, ceiling=600)
    assert pool.state("a") == "ready"

    pool.advance(1)
    pool.finish_all()

    assert pool.state("a") == "cold"
    assert waiter_id in pool.leases


def test_out_of_memory_while_loading_raises_the_estimate_and_tries_once_more() -> None:
    pool = Pool(a=300, b=500)
    pool.load_idle("a")
    waiter_id = pool.acquire("b")
    pool.finish(0)
    pool.finish(0)
    pool.finish(0, "out_of_memory")

    pool.finish_all()

    assert waiter_id in pool.leases
    loads = [effect.need.weight_bytes for effect in pool.seen if isinstance(effect, StartLoad)]
    assert loads[-2:] == [500, 750]
    assert pool.state("a") == "cold"


def test_out_of_memory_twice_fails_all_waiters() -> None:
    pool = Pool(a=300)
    waiters = [pool.acquire("a"), pool.acquire("a")]
    pool.finish(0)
    for _ in range(2):
        pool.finish(0)
        pool.finish(0, "out_of_memory")

    assert all(isinstance(pool.error(waiter_id), OutOfMemory) for waiter_id in waiters)
    assert pool.error(waiters[0]) is not pool.error(waiters[1])
    assert pool.state("a") == "failed"


# ---- rule 9: failures ---------------------------------------------------------------------------------------------


def fail_to_fetch(pool: Pool, kind: str) -> float:
    """Fails one download; returns the length of the quarantine in seconds."""
    pool.acquire("a")
    pool.finish(0, "absent")
    pool.finish(0, kind)
    return pool.core.state.current["a"].retry_at_s - pool.now_s


def test_the_quarantine_doubles_to_five_minutes() -> None:
    pool = Pool(a=100)
    delays = []
    for _ in range(7):
        delays.append(fail_to_fetch(pool, "hub_unreachable"))
        pool.advance(delays[-1])

    assert delays == pytest.approx([10, 20, 40, 80, 160, 300, 300])


def test_the_jitter_spreads_a_fleet_by_a_tenth() -> None:
    lowest, highest = Pool(a=100), Pool(a=100)
    lowest.core = PoolStateMachine(fake_specs("a"), budget_bytes=BUDGET, jitter=lambda: 0.0)
    highest.core = PoolStateMachine(fake_specs("a"), budget_bytes=BUDGET, jitter=lambda: 1.0)

    delays = [fail_to_fetch(lowest, "hub_unreachable"), fail_to_fetch(highest, "hub_unreachable")]

    assert delays == pytest.approx([9, 11])


def test_wrong_credentials_and_unknown_repositories_wait_longer() -> None:
    denied, missing = Pool(a=100), Pool(a=100)

    assert fail_to_fetch(denied, "access_denied") == fail_to_fetch(missing, "source_not_found") == 60


def test_during_the_quarantine_requests_fail_at_once_with_the_cause_and_afterwards_the_load_is_retried() -> None:
    pool = Pool(a=100)
    delay_s = fail_to_fetch(pool, "hub_unreachable")
    error = pool.error(pool.acquire("a"))
    assert isinstance(error, LoadFailed)
    assert (error.kind, error.retry_after_s) == ("hub_unreachable", delay_s)
    assert pool.work == []

    pool.advance(delay_s)
    waiter_id = pool.acquire("a")
    pool.finish_all()

    assert waiter_id in pool.leases
    assert pool.core.state.current["a"].attempts == 0


def test_a_preloaded_model_comes_back_unasked_when_the_quarantine_ends() -> None:
    pool = Pool(a=100)
    pool.preload("a")
    pool.finish(0, "hub_unreachable")

    pool.advance(10)
    pool.finish_all()

    assert pool.state("a") == "ready"


def test_an_operators_preload_ends_a_quarantine() -> None:
    pool = Pool(a=100)
    fail_to_fetch(pool, "access_denied")

    pool.preload("a")
    pool.finish_all()

    assert pool.state("a") == "ready"


def test_a_broken_file_is_removed_and_fetched_once_more() -> None:
    pool = Pool(a=100)
    waiter_id = pool.acquire("a")
    pool.finish(0)
    pool.finish(0)
    pool.finish(0, "broken_files")
    assert isinstance(pool.work[0], Discard)

    pool.finish_all()

    assert waiter_id in pool.leases
    assert pool.count(StartFetch) == 1


def test_a_file_that_stays_broken_is_quarantined() -> None:
    pool = Pool(a=100)
    waiter_id = pool.acquire("a")
    pool.finish(0, "absent")
    pool.finish(0, "broken_files")
    pool.finish(0)
    pool.finish(0, "broken_files")

    assert isinstance(pool.error(waiter_id), LoadFailed)
    assert pool.count(Discard) == 1


def test_a_broken_local_folder_is_left_alone() -> None:
    pool = Pool(a=100)
    waiter_id = pool.acquire("a")
    pool.finish(0)
    pool.finish(0)
    pool.finish(0, "broken_files")

    pool.finish(0, "kept")

    assert isinstance(pool.error(waiter_id), LoadFailed)


def test_a_model_that_fails_its_self_check_is_unloaded_and_its_memory_is_free() -> None:
    pool = Pool(a=100)
    waiter_id = pool.acquire("a")
    for _ in range(3):
        pool.finish(0)
    pool.finish(0, "self_check_failed")
    assert pool.state("a") == "unloading"

    pool.finish_all()

    assert isinstance(pool.error(waiter_id), LoadFailed)
    assert pool.used() == 0


# ---- rule 10: turns ---------------------------------------------------------------------------------------------


def test_two_models_that_cannot_both_fit_take_turns_and_each_turn_serves_all_that_wait() -> None:
    pool = Pool(a=600, b=600)
    pool.load_idle("a")
    asked = [pool.acquire(model_id) for model_id in "babab"]

    while pool.waiting:
        pool.advance(5)
        for lease in list(pool.leases):
            pool.release(lease)
        pool.finish_all()

    granted = [effect.waiter_id for effect in pool.seen if isinstance(effect, Grant) and effect.waiter_id in asked]
    models = "".join("a" if waiter_id in (asked[1], asked[3]) else "b" for waiter_id in granted)
    assert models == "aabbb"


def test_the_thrash_names_the_bytes_that_are_missing() -> None:
    pool = Pool(a=600, b=600)
    pool.load_idle("a")
    pool.load_idle("b")

    pool.load_idle("a")

    turn = [effect for effect in pool.seen if isinstance(effect, Emit) and effect.missing_bytes]
    assert [(effect.model_id, effect.claimant, effect.missing_bytes) for effect in turn[:1]] == [("b", "a", 210)]
    assert "210 B are missing, so the two take turns" in turn[0].cause


def test_constant_load_on_two_models_swaps_at_most_once_in_a_minimum_residency() -> None:
    pool = Pool(a=600, b=600)
    started_s = pool.now_s
    served = {"a": 0, "b": 0}
    for _ in range(600):
        for model_id in served:
            if sum(name == model_id for name in pool.waiting.values()) < 2:
                pool.acquire(model_id)
        pool.advance(0.1)
        if pool.work:
            pool.finish(0)
        for lease in list(pool.leases):
            served[pool.views[pool.leases[lease]].model_id] += 1
            pool.release(lease)

    swaps = sum(isinstance(effect, Emit) and effect.claimant is not None for effect in pool.seen) // 2
    assert min(served.values()) > 20
    assert 2 <= swaps <= (pool.now_s - started_s) / 5


# ---- loads that hang ---------------------------------------------------------------------------------------------

HANGS = "the load of model 'a' has been running for more than 600 s"


def test_while_a_load_hangs_requests_that_wait_for_loads_fail_and_ready_models_serve() -> None:
    pool = Pool(a=100, b=100, warm=100, here=100)
    pool.load_idle("here")
    warm = pool.acquire("warm")
    for _ in range(3):
        pool.finish(0)
    waiters = [pool.acquire("a")]
    pool.finish(1)
    waiters.append(pool.acquire("b"))

    pool.block(HANGS)
    late, served = pool.acquire("b"), pool.acquire("here")
    pool.finish(0)

    for waiter_id in (*waiters, late):
        error = pool.error(waiter_id)
        assert isinstance(error, LoadFailed)
        assert (error.kind, HANGS in str(error), "restart the server" in str(error)) == ("load_hangs", True, True)
    assert {warm, served} <= set(pool.leases)


def test_a_load_that_ends_after_all_ends_as_it_would_have() -> None:
    pool = Pool(a=100)
    pool.acquire("a")
    pool.finish(0)
    pool.finish(0)
    pool.block(HANGS)
    pool.finish(0)
    pool.block("")

    waiter_id = pool.acquire("a")
    pool.finish_all()

    assert waiter_id in pool.leases
    assert pool.count(StartLoad) == 1


def test_an_eviction_while_nothing_can_be_freed_fails_with_the_reason() -> None:
    pool = Pool(a=100, here=100)
    pool.load("here")
    pool.acquire("a")
    pool.finish(0)
    pool.finish(0)
    before = [pool.evict("a"), pool.evict("here")]

    pool.block(HANGS)
    after = [pool.evict("a"), pool.evict("here")]

    for evictor in (*before, *after):
        assert isinstance(pool.error(evictor), ModelInUse)
        assert f"cannot be freed: {HANGS} and cannot be interrupted" in str(pool.error(evictor))
    assert pool.state("here") == "ready"


def test_no_idle_model_is_evicted_while_nothing_can_be_freed() -> None:
    pool = Pool({"a": ModelSpec(model_id="a", source="x", keep_alive_s=30)}, a=100)
    pool.release(pool.load("a"))
    pool.block(HANGS)
    pool.advance(60)
    assert pool.state("a") == "ready"

    pool.block("")

    assert pool.state("a") == "unloading"


def test_a_load_that_hangs_is_an_event_of_its_model() -> None:
    pool = Pool(a=100, b=100)
    pool.acquire("a")
    pool.finish(0)
    pool.finish(0)

    pool.block(HANGS)

    assert pool.causes("a")[-1] == HANGS
    assert HANGS not in pool.causes("b")


# ---- rules 11 and 12: shutdown and reload ------------------------------------------------------------------------


def test_a_drain_finishes_what_was_admitted_and_sends_the_rest_away() -> None:
    pool = Pool(a=100, b=100, c=900)
    lease = pool.load("a")
    loading = pool.acquire("b")
    pool.finish(0)
    cold = pool.acquire("c")

    pool.drain()

    assert isinstance(pool.error(cold), ShuttingDown)
    assert isinstance(pool.error(pool.acquire("a")), ShuttingDown)
    pool.settle()
    assert lease not in pool.leases and loading not in pool.waiting
    assert pool.used() == 0


def test_a_drain_serves_those_whose_model_is_nearly_there() -> None:
    pool = Pool(a=100)
    waiter_id = pool.acquire("a")
    for _ in range(3):
        pool.finish(0)

    pool.drain()
    pool.finish(0)

    assert waiter_id in pool.leases
    assert pool.state("a") == "draining"


def test_keep_alive_and_description_change_in_place() -> None:
    pool = Pool(a=100)
    pool.load_idle("a")

    pool.reload({"a": ModelSpec(model_id="a", source="fake/a", keep_alive_s=1.0, description="new words")})
    pool.advance(1)

    assert pool.state("a") == "unloading"
    assert pool.count(StartLoad) == 1


def test_more_copies_of_a_model_change_in_place() -> None:
    pool = Pool(a=100)
    pool.load_idle("a")

    pool.reload({"a": ModelSpec(model_id="a", source="fake/a", replicas=2)})
    pool.finish_all()

    assert pool.state("a") == "ready"
    assert pool.count(StartLoad) == 1


def test_a_changed_revision_is_a_new_generation_and_waiters_move_on_with_it() -> None:
    pool = Pool(a=100)
    lease = pool.load("a")
    pool.reload({"a": ModelSpec(model_id="a", source="fake/a", revision="v2")})
    waiter_id = pool.acquire("a")
    assert pool.state("a") == "fetching"

    pool.finish_all()

    assert waiter_id in pool.leases
    assert pool.leases[waiter_id] != pool.leases[lease]
    pool.release(lease)
    pool.finish_all()
    assert "changed in the registry" in pool.causes("a")
    assert len(pool.core.state.slots) == 1


def test_a_removed_model_finishes_its_requests_and_is_gone() -> None:
    pool = Pool(a=100, b=100)
    lease = pool.load("a")
    waiting = pool.acquire("b")

    pool.reload({})

    assert isinstance(pool.error(waiting), ModelNotFound)
    assert isinstance(pool.error(pool.acquire("a")), ModelNotFound)
    pool.release(lease)
    pool.finish_all()
    assert pool.core.state.slots == {}


def test_an_untouched_model_is_not_touched() -> None:
    pool = Pool(a=100, b=100)
    pool.load_idle("a")
    before = len(pool.causes("a"))

    pool.reload({**fake_specs("a", "c")})

    assert pool.state("a") == "ready"
    assert len(pool.causes("a")) == before


# ---- operators ----------------------------------------------------------------------------------------------------


def test_an_eviction_waits_for_running_requests_and_tells_when_it_is_done() -> None:
    pool = Pool(a=100)
    lease = pool.load("a")
    evictor = pool.evict("a")
    assert evictor in pool.evictors
    pool.release(lease)
    assert evictor in pool.evictors

    pool.finish_all()

    assert evictor not in pool.evictors
    assert pool.state("a") == "cold"


def test_a_cancelled_eviction_leaves_the_model_serving() -> None:
    pool = Pool(a=100)
    pool.load("a")
    evictor = pool.evict("a")
    waiter_id = pool.acquire("a")

    pool.cancel(evictor)

    assert pool.state("a") == "ready"
    assert waiter_id in pool.leases


@pytest.mark.parametrize("is_shutdown_first", [True, False])
@pytest.mark.parametrize("is_ready", [True, False])
def test_an_eviction_cancelled_during_the_shutdown_does_not_delay_it(is_shutdown_first: bool, is_ready: bool) -> None:
    pool = Pool(a=100)
    pool.acquire("a")
    for _ in range(4 if is_ready else 3):
        pool.finish(0)
    if is_shutdown_first:
        pool.drain()
    evictor = pool.evict("a")
    if not is_shutdown_first:
        pool.drain()

    pool.cancel(evictor)
    pool.settle()

    assert pool.state("a") == "cold"


def test_a_pinned_model_leaves_only_when_forced() -> None:
    pool = Pool(a=100)
    pool.preload("a", pin=True)
    pool.finish_all()
    refused = pool.evict("a")
    assert isinstance(pool.error(refused), ModelPinned)

    pool.evict("a", force=True)

    assert pool.state("a") == "unloading"


def test_evicting_a_model_on_its_way_serves_its_waiters_first() -> None:
    pool = Pool(a=100)
    waiter_id = pool.acquire("a")
    pool.finish(0)
    pool.finish(0)
    pool.evict("a")

    pool.finish_all()

    assert waiter_id in pool.leases
    assert pool.state("a") == "draining"


@pytest.mark.parametrize("num_done", [2, 3], ids=["loading", "warming"])
def test_a_preload_after_an_eviction_that_has_not_gone_through_keeps_the_model(num_done: int) -> None:
    pool = Pool(a=100)
    pool.preload("a")
    for _ in range(num_done):
        pool.finish(0)
    evictor = pool.evict("a")

    pool.preload("a", pin=True)
    pool.finish_all()

    assert "was preloaded before its eviction was done; the eviction was cancelled" in str(pool.error(evictor))
    assert (pool.state("a"), pool.core.state.current["a"].is_pinned) == ("ready", True)


def test_a_preload_keeps_a_model_that_drains_for_an_eviction() -> None:
    pool = Pool(a=100)
    lease = pool.load("a")
    evictor = pool.evict("a")
    waiter_id = pool.acquire("a")

    pool.preload("a", pin=True)

    assert isinstance(pool.error(evictor), ModelInUse)
    assert (pool.state("a"), pool.core.state.current["a"].is_pinned) == ("ready", True)
    assert {lease, waiter_id} == set(pool.leases)


def test_a_forced_eviction_that_is_given_up_leaves_the_pin() -> None:
    pool = Pool(a=100)
    pool.preload("a", pin=True)
    pool.finish_all()
    pool.acquire("a")

    pool.cancel(pool.evict("a", force=True))

    assert (pool.state("a"), pool.core.state.current["a"].is_pinned) == ("ready", True)


def test_a_load_that_fails_after_an_eviction_is_not_retried_without_waiters() -> None:
    pool = Pool(a=100)
    pool.preload("a", pin=True)
    pool.finish(0)
    pool.finish(0)
    evictor = pool.evict("a", force=True)
    pool.finish(0, "out_of_memory")

    pool.finish_all()
    pool.advance(DAY_S)
    pool.finish_all()

    assert evictor not in pool.evictors
    assert pool.count(StartLoad) == 1
    assert not pool.core.state.current["a"].is_pinned


def test_an_eviction_of_a_model_that_leaves_already_takes_back_the_preload_before_it() -> None:
    pool = Pool({"a": ModelSpec(model_id="a", source="x", keep_alive_s=1.0)}, a=100)
    pool.load_idle("a")
    pool.advance(2)
    assert pool.state("a") == "unloading"
    pool.preload("a", pin=True)

    pool.evict("a", force=True)
    pool.finish_all()

    assert (pool.state("a"), pool.count(StartLoad)) == ("cold", 1)


@pytest.mark.parametrize("num_done", [2, 4], ids=["loading", "draining"])
def test_a_changed_registry_does_not_bring_back_what_an_operator_wants_away(num_done: int) -> None:
    pool = Pool(a=100)
    pool.preload("a", pin=True)
    lease = pool.acquire("a")
    for _ in range(num_done):
        pool.finish(0)
    pool.evict("a", force=True)
    if num_done == 2:
        pool.cancel(lease)

    pool.reload({"a": ModelSpec(model_id="a", source="fake/a", revision="v2")})
    pool.settle()

    assert (pool.state("a"), pool.count(StartLoad)) == ("absent", 1)
    assert not pool.core.state.current["a"].is_pinned


def test_a_caller_whose_load_timeout_ends_gets_an_error_and_the_load_goes_on() -> None:
    pool = Pool(a=100)
    waiter_id = pool.acquire("a", timeout_s=3)
    pool.finish(0, "absent")
    pool.step(DownloadProgressed(0, 30_000_000, 90_000_000))

    pool.advance(3)

    assert isinstance(pool.error(waiter_id), ModelLoading)
    assert "downloading (28.6 MiB of 85.8 MiB)" in str(pool.error(waiter_id))
    pool.finish_all()
    assert pool.state("a") == "ready"


def test_download_progress_is_an_event() -> None:
    pool = Pool(a=100)
    pool.acquire("a")
    pool.finish(0, "absent")

    pool.step(DownloadProgressed(0, 1, 2))

    progress = [effect for effect in pool.seen if isinstance(effect, Emit) and effect.kind == "progress"]
    assert [(effect.model_id, effect.done_bytes, effect.total_bytes) for effect in progress] == [("a", 1, 2)]


def test_an_unexpected_report_raises() -> None:
    pool = Pool(a=100)

    with pytest.raises(RuntimeError, match="but warm ended"):
        pool.core.handle(WarmUpCompleted(0, 1, 1), 1.0)
    with pytest.raises(RuntimeError, match="but locate ended"):
        pool.core.handle(FilesLocated(0, a_folder(), None), 1.0)


def test_the_pool_can_be_read() -> None:
    pool = Pool(a=100, b=100)
    pool.load("a")

    assert repr(pool.core) == "<Pool [Models: 1 absent, 1 ready | Leases: 1 | Waiters: 0]>"
    assert pool.count(StartUnload) == 0
