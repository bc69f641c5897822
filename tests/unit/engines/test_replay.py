"""Replays of a trace: what the pool's rules would have made of a day."""

import pytest

from benchmarks.lib.traces import TRACES, make
from benchmarks.lifecycle.replay import least_loading_s, least_moving_s
from engines.pool.slot import PoolPolicy
from engines.replay import ReplayOptions, TierRates, replay
from engines.spec import Eviction
from engines.trace import Trace, TraceModel, TraceRequest

ANY = PoolPolicy(min_residency_s=0.0, residency_loads=0.0)


def trace(*requests: tuple[float, str], seconds: float = 0.1, **load_s: float) -> Trace:
    """Models of 100 bytes with a workspace of 10, and requests `(time, model)`."""
    models = {
        name: TraceModel(model_id=name, weight_bytes=100, workspace_bytes=10, load_s=seconds)
        for name, seconds in load_s.items()
    }
    return Trace(models, [TraceRequest(at_s=1e9 + at_s, model_id=name, seconds=seconds) for at_s, name in requests])


def test_a_model_is_loaded_once_and_only_the_first_request_waits() -> None:
    result = replay(trace((0, "a"), (10, "a"), (20, "a"), a=2.0), budget_bytes=110)

    assert (result.requests, result.loads, result.reloads, result.failed) == (3, 1, 0, 0)
    assert result.cold_waits_s == (2.0,)
    assert result.loading_s == 2.0
    assert result.peak_bytes == 110


def test_requests_that_come_during_a_load_wait_for_its_rest() -> None:
    result = replay(trace((0, "a"), (0.5, "a"), (1.5, "a"), a=2.0), budget_bytes=110)

    assert result.cold_waits_s == pytest.approx((0.5, 1.5, 2.0))


def test_two_models_with_room_for_one_take_turns_and_with_room_for_both_do_not() -> None:
    day = trace(*((10.0 * at, "ab"[at % 2]) for at in range(6)), a=1.0, b=1.0)

    narrow, wide = replay(day, budget_bytes=110, rules=ANY), replay(day, budget_bytes=day.resident_bytes, rules=ANY)

    assert (narrow.loads, narrow.reloads) == (6, 4)
    assert (wide.loads, wide.reloads) == (2, 0)
    assert day.resident_bytes == 210


def test_a_request_that_runs_keeps_its_model_until_it_ends() -> None:
    result = replay(trace((0, "a"), (2, "b"), seconds=5.0, a=1.0, b=1.0), budget_bytes=110, rules=ANY)

    assert result.cold_waits_s == pytest.approx((1.0, 5.0))  # a runs from 1 to 6; b is ready at 7


def test_a_pinned_model_never_leaves_and_others_that_need_its_place_fail() -> None:
    result = replay(trace((0, "a"), (10, "b"), (20, "a"), a=1.0, b=1.0), budget_bytes=110, pinned=["a"])

    assert (result.requests, result.failed, result.reloads) == (2, 1, 0)


def test_a_model_that_is_asked_often_is_kept_by_cost_and_lost_by_recency() -> None:
    asked = [(float(at), "often") for at in range(100)] + [(101.0, "rare"), (110.0, "new"), (120.0, "often")]
    day = trace(*asked, often=1.0, rare=1.0, new=1.0)

    lru = replay(day, budget_bytes=210, rules=PoolPolicy(min_residency_s=0, residency_loads=0, eviction="lru"))
    cost = replay(day, budget_bytes=210, rules=PoolPolicy(min_residency_s=0, residency_loads=0, eviction="cost"))

    assert (lru.reloads, cost.reloads) == (1, 0)


TURNS = [(10.0 * at, "ab"[at % 2]) for at in range(6)]
RATES = TierRates(copy_bytes_per_s=1000.0, check_s=0.05)


def test_with_main_memory_for_it_a_model_comes_back_by_a_copy_and_its_check() -> None:
    """Each of the six requests but two wakes its model: 0.1 s until the other has been copied out, 0.15 s back."""
    day = trace(*TURNS, a=1.0, b=1.0)

    result = replay(day, budget_bytes=110, rules=ANY, options=ReplayOptions(host_budget_bytes=200, rates=RATES))

    assert (result.requests, result.loads, result.reloads, result.wakes) == (6, 2, 0, 4)
    assert result.cold_waits_s == pytest.approx((0.25, 0.25, 0.25, 0.25, 1.0, 1.1))
    assert (result.loading_s, result.waking_s) == pytest.approx((2.0, 4 * 0.15))
    assert (result.peak_bytes, result.host_peak_bytes) == (110, 200)


def test_a_measured_wake_takes_as_long_as_it_did() -> None:
    models = {name: TraceModel(model_id=name, weight_bytes=100, load_s=1.0, wake_s=0.7) for name in "ab"}
    day = Trace(models, [TraceRequest(at_s=at_s, model_id=name) for at_s, name in TURNS])

    result = replay(day, budget_bytes=100, rules=ANY, options=ReplayOptions(host_budget_bytes=200, rates=RATES))

    assert result.waking_s == pytest.approx(4 * 0.7)


def test_a_model_whose_load_was_not_recorded_takes_as_long_as_its_bytes() -> None:
    day = trace((0, "a"), a=0.0)

    result = replay(day, budget_bytes=110, options=ReplayOptions(rates=TierRates(disk_bytes_per_s=50.0)))

    assert result.cold_waits_s == (2.0,)


def test_main_memory_that_holds_one_of_two_leaves_no_room_to_change_places() -> None:
    """Both are in main memory while they change places, so that the second one is unloaded."""
    day = trace(*TURNS, a=1.0, b=1.0)

    result = replay(day, budget_bytes=110, rules=ANY, options=ReplayOptions(host_budget_bytes=100, rates=RATES))

    assert result.host_peak_bytes == 100
    assert result.reloads > 0


@pytest.mark.parametrize("eviction", ["lru", "cost"])
def test_neither_budget_is_exceeded(eviction: Eviction) -> None:
    day = make("pairs")
    device, host = int(0.4 * day.resident_bytes), int(0.3 * day.resident_bytes)

    result = replay(
        day, budget_bytes=device, rules=PoolPolicy(eviction=eviction), options=ReplayOptions(host_budget_bytes=host)
    )

    assert (result.requests, result.failed) == (len(day.requests), 0)
    assert result.peak_bytes <= device
    assert result.host_peak_bytes <= host
    assert result.wakes > 0


def test_a_warm_model_is_in_memory_before_the_first_request() -> None:
    day = trace((0, "a"), (10, "b"), a=2.0, b=2.0)

    result = replay(
        day, budget_bytes=110, rules=ANY, options=ReplayOptions(host_budget_bytes=300, warm=("b", "a"), rates=RATES)
    )

    assert (result.loads, result.wakes) == (2, 1)
    assert max(result.cold_waits_s) < 1.0


def test_a_model_that_is_preloaded_in_time_is_not_waited_for() -> None:
    day = trace((0, "a"), (100, "b"), a=2.0, b=2.0)

    early = replay(day, budget_bytes=210, options=ReplayOptions(preloads=[(1e9 + 50, "b")]))
    late = replay(day, budget_bytes=210, options=ReplayOptions(preloads=[(1e9 + 99, "b")]))

    assert early.cold_waits_s == (2.0,)
    assert late.cold_waits_s == (1.0, 2.0)


def test_a_preload_that_lies_before_the_trace_comes_with_its_first_request() -> None:
    day = trace((0, "a"), a=2.0)

    result = replay(day, budget_bytes=110, options=ReplayOptions(preloads=[(1.0, "a")]))

    assert (result.loads, result.cold_waits_s) == (1, (2.0,))


def test_a_request_for_a_model_of_unknown_size_is_refused() -> None:
    day = Trace({}, [TraceRequest(at_s=0.0, model_id="a")])

    with pytest.raises(ValueError, match="does not say how large a is"):
        replay(day, budget_bytes=100)


def test_a_day_without_requests_costs_nothing() -> None:
    result = replay(trace(a=1.0), budget_bytes=110)

    assert (result.requests, result.loads, result.waited_s, result.cold_wait_s(0.95)) == (0, 0, 0.0, 0.0)


def test_the_least_loading_of_equal_models_is_that_of_belady() -> None:
    """Room for two of three. Belady keeps what is asked next: a b c a b c loads a, b, c, then b once more."""
    day = trace(*((float(at), name) for at, name in enumerate("abcabc")), a=1.0, b=1.0, c=1.0)

    assert least_loading_s(day, 210) == 4.0
    assert least_loading_s(day, 310) == 3.0
    assert least_loading_s(day, 110) == 6.0


def test_the_least_loading_keeps_the_model_that_is_dear_to_load() -> None:
    day = trace(*((float(at), name) for at, name in enumerate("abcab")), a=9.0, b=1.0, c=1.0)

    assert least_loading_s(day, 210) == 9 + 1 + 1 + 1


def test_without_main_memory_both_bounds_are_the_same() -> None:
    day = trace(*((float(at), name) for at, name in enumerate("abcabcacb")), a=9.0, b=1.0, c=2.0)

    for budget in (110, 210, 310):
        assert least_moving_s(day, budget, 0, RATES) == least_loading_s(day, budget)


def test_with_main_memory_the_least_is_a_load_of_each_model_and_copies() -> None:
    """Room for one on the device: every request but the first of each model costs a copy and its check, 0.15 s."""
    day = trace(*((float(at), name) for at, name in enumerate("abcabc")), a=9.0, b=1.0, c=1.0)

    assert least_moving_s(day, 110, 200, RATES) == pytest.approx(11.0 + 3 * 0.15)


def test_the_least_keeps_in_main_memory_what_is_dear_to_load() -> None:
    """Room for one on the device and one in main memory, which stays with the dear one: b and c are loaded in turn."""
    day = trace(*((float(at), name) for at, name in enumerate("abcabca")), a=9.0, b=1.0, c=1.0)

    assert least_moving_s(day, 110, 100, RATES) == pytest.approx(9 + 1 + 1 + 0.15 + 1 + 1 + 0.15)


@pytest.mark.slow
@pytest.mark.parametrize("name", TRACES)
def test_on_every_shipped_trace_all_requests_are_answered_by_both_orders(name: str) -> None:
    day = make(name)

    for rules in (PoolPolicy(), PoolPolicy(eviction="cost")):
        result = replay(day, budget_bytes=int(0.8 * day.resident_bytes), rules=rules)

        assert (result.requests, result.failed) == (len(day.requests), 0)
        assert result.peak_bytes <= 0.8 * day.resident_bytes
