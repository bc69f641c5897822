"""Hosts are ranked for a model from snapshots only."""

from collections import Counter

import msgspec
import pytest

from engines.errors import EngineError, LoadFailed, ModelLoading, ModelTooLarge, OutOfMemory
from engines.spec import ModelSpec
from engines.types import HostSnapshot, ModelStatus, State
from router.backends.placement import (
    earliest_retry,
    may_succeed_elsewhere,
    not_resident,
    pick_replica_host,
    rank_hosts,
    ranked_hosts,
    replica_host,
    warm_first,
)


def model(
    model_id: str, state: State = "cold", *, weight_bytes: int = 0, used_at: float | None = None, **more: int
) -> ModelStatus:
    return ModelStatus(
        model_id=model_id,
        state=state,
        host_id="h",
        device="cpu",
        source="x",
        weight_bytes=weight_bytes,
        last_used_at=used_at,
        leases=more.get("leases", 0),
        waiters=more.get("waiters", 0),
        pinned=bool(more.get("pinned", 0)),
    )


def host(
    host_id: str,
    *models: ModelStatus,
    budget: int = 100,
    claimed: int = 0,
    ceiling: int | None = None,
    draining: bool = False,
) -> HostSnapshot:
    """Create a snapshot. Every host may serve `m` by default; residents are evicted in the order listed."""
    used = sum(status.weight_bytes for status in models)
    listed = models if any(status.model_id == "m" for status in models) else (*models, model("m"))
    return HostSnapshot(
        host_id=host_id,
        device="cpu",
        total_bytes=budget,
        budget_bytes=budget,
        used_bytes=used,
        workspace_bytes=0,
        free_bytes=budget - used,
        residents=tuple(status.model_id for status in models if status.weight_bytes),
        models=listed,
        is_draining=draining,
        claimed_bytes=claimed,
        ceiling_bytes=ceiling,
    )


def test_where_it_is_resident_comes_first_and_the_readier_before_the_less_ready() -> None:
    hosts = [
        host("free"),
        host("loading", model("m", "loading", weight_bytes=50)),
        host("ready", model("m", "ready", weight_bytes=50), budget=50),
        host("warming", model("m", "warming", weight_bytes=50)),
    ]

    assert rank_hosts("m", 50, hosts) == ["ready", "warming", "loading", "free"]


def test_free_memory_comes_before_evictions() -> None:
    full = host("full", model("old", "ready", weight_bytes=80, used_at=1))

    assert rank_hosts("m", 50, [full, host("free")]) == ["free", "full"]


def test_the_host_whose_victims_have_been_idle_longest_comes_before_others() -> None:
    fresh = host("fresh", model("a", "ready", weight_bytes=80, used_at=50))
    stale = host("stale", model("a", "ready", weight_bytes=80, used_at=10))

    assert rank_hosts("m", 50, [fresh, stale]) == ["stale", "fresh"]


def test_all_that_must_leave_count_and_not_only_the_first() -> None:
    small = host(
        "small", model("a", "ready", weight_bytes=10, used_at=1), model("b", "ready", weight_bytes=90, used_at=99)
    )
    large = host("large", model("a", "ready", weight_bytes=100, used_at=50))

    assert rank_hosts("m", 50, [small, large]) == ["large", "small"]


def test_pinned_busy_and_leaving_models_are_no_victims() -> None:
    pinned = host("pinned", model("a", "ready", weight_bytes=90, used_at=1, pinned=1))
    busy = host("busy", model("a", "ready", weight_bytes=90, used_at=1, leases=1))
    idle = host("idle", model("a", "ready", weight_bytes=90, used_at=70))

    assert rank_hosts("m", 50, [pinned, busy, idle])[0] == "idle"


def test_claimed_memory_is_not_free() -> None:
    promised = host("promised", claimed=80)
    full = host("full", model("a", "ready", weight_bytes=90, used_at=1))

    assert rank_hosts("m", 50, [promised, host("free")]) == ["free", "promised"]
    assert rank_hosts("m", 50, [promised, full]) == ["full", "promised"]


def test_a_host_that_only_waits_for_memory_is_not_the_models_home() -> None:
    waiting = host("waiting", model("m", "waiting_space", waiters=3), model("a", "ready", weight_bytes=90), claimed=50)

    assert rank_hosts("m", 50, [waiting, host("free")]) == ["free", "waiting"]


def test_among_equal_hosts_the_one_that_already_expects_the_model_gets_all_requests() -> None:
    for host_id in "abcdef":
        hosts = [host(other) for other in "abcdef" if other != host_id]
        expecting = host(host_id, model("m", "fetching", waiters=1), claimed=50)

        assert rank_hosts("m", 50, [*hosts, expecting])[0] == host_id


def test_of_hosts_where_a_model_fits_one_that_has_it_parked_comes_first() -> None:
    cold = [host(str(number)) for number in range(8)]
    parked = host("p", model("m", "parked"))

    assert rank_hosts("m", 10, [*cold, parked])[0] == "p"
    assert rank_hosts("m", 10, [parked, host("w", model("m", "waking")), host("r", model("m", "ready"))]) == [
        "r", "w", "p",
    ]  # fmt: skip


def test_a_parked_model_is_in_memory_for_one_that_is_warm_and_not_for_one_that_is_preloaded() -> None:
    preloaded, warm = ModelSpec(model_id="m", source="x", preload=True), ModelSpec(model_id="m", source="x", warm=True)
    views = [View(host("h", model("m", "parked")))]

    assert list(not_resident([preloaded], views)) == [preloaded]
    assert list(not_resident([warm], views)) == []
    assert warm_first([preloaded, warm]) == [warm, preloaded]


def test_a_host_too_small_draining_or_for_another_device_comes_last() -> None:
    small, draining = host("small", budget=40), host("draining", draining=True)
    foreign = msgspec.structs.replace(host("foreign"), models=())
    full = host("full", model("a", "ready", weight_bytes=90, used_at=1))

    assert rank_hosts("m", 50, [small, draining, foreign, full])[0] == "full"
    assert rank_hosts("m", 50, [small, draining, foreign, full])[-1] == "draining"


def test_where_it_failed_to_load_comes_after_every_host_that_could_have_it() -> None:
    failed = host("failed", model("m", "failed"))
    full = host("full", model("a", "ready", weight_bytes=90, used_at=1))
    busy = host("busy", model("a", "ready", weight_bytes=90, leases=1))

    assert rank_hosts("m", 50, [failed, busy, full]) == ["full", "failed", "busy"]


def test_memory_that_other_processes_hold_is_not_free() -> None:
    held = host("held", ceiling=40)
    shared = host("shared", model("a", "ready", weight_bytes=40, used_at=1), ceiling=80)

    assert rank_hosts("m", 50, [held, host("free")]) == ["free", "held"]
    assert rank_hosts("m", 50, [held, shared]) == ["shared", "held"]
    assert pick_replica_host(ModelSpec(model_id="m", source="x", replicas=2), 50, [held, ready_at("home")]) is None


def test_a_host_where_a_load_hangs_serves_what_it_has_and_gets_nothing_else() -> None:
    stuck = msgspec.structs.replace(host("stuck"), stuck="a load hangs")
    full = host("full", model("a", "ready", weight_bytes=90, used_at=1))
    having = msgspec.structs.replace(ready_at("having"), stuck="a load hangs")

    assert rank_hosts("m", 50, [stuck, full]) == ["full", "stuck"]
    assert rank_hosts("m", 50, [full, having]) == ["having", "full"]


def ready_at(host_id: str) -> HostSnapshot:
    return host(host_id, model("m", "ready", weight_bytes=50))


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ModelTooLarge("x"), True),
        (LoadFailed("x"), True),
        (LoadFailed("x", kind="self_check_failed"), True),
        (OutOfMemory("x", stage="load"), True),
        (OutOfMemory("x"), False),
        (LoadFailed("x", kind="hub_unreachable"), False),
        (LoadFailed("x", kind="broken_files"), False),
        (LoadFailed("x", kind="unsupported_model"), False),
        (LoadFailed("x", kind="no_device"), False),
        (ModelLoading("x"), False),
    ],
)
def test_what_may_be_the_hosts_fault_is_tried_on_another(error: EngineError, expected: bool) -> None:
    assert may_succeed_elsewhere(error) is expected


def test_the_error_that_may_pass_soonest_is_returned() -> None:
    never, late, soon = ModelTooLarge("x"), LoadFailed("x", retry_after_s=300), OutOfMemory("x", retry_after_s=10)

    assert earliest_retry(None, never) is never
    assert earliest_retry(never, late) is late
    assert earliest_retry(late, soon) is earliest_retry(soon, late) is soon
    assert earliest_retry(late, never) is late


def test_among_equals_models_spread_and_a_lost_host_moves_only_its_own() -> None:
    hosts = [host(host_id) for host_id in ("a", "b", "c")]
    before = {f"model-{index}": placed(f"model-{index}", hosts) for index in range(300)}
    after = {model_id: placed(model_id, hosts[:2]) for model_id in before}

    assert min(Counter(before.values()).values()) > 60
    assert all(after[model_id] == host_id for model_id, host_id in before.items() if host_id != "c")


def placed(model_id: str, hosts: list[HostSnapshot]) -> str:
    """Return the first choice for a model that all hosts may serve."""
    known = [msgspec.structs.replace(one, models=(model(model_id),)) for one in hosts]
    return rank_hosts(model_id, 10, known)[0]


def test_the_order_of_the_snapshots_does_not_matter() -> None:
    hosts = [host("a"), host("b", claimed=60), host("c", model("x", "ready", weight_bytes=90, used_at=5))]

    assert rank_hosts("m", 50, hosts) == rank_hosts("m", 50, hosts[::-1])


def test_a_copy_is_placed_where_it_fits_but_not_where_the_model_failed_or_the_host_drains() -> None:
    spec = ModelSpec(model_id="m", source="x", replicas=2)
    home = host("a", model("m", "ready", weight_bytes=40))

    assert pick_replica_host(spec, 40, [home, host("b")]) == "b"
    assert pick_replica_host(spec, 40, [home, host("b", model("m", "failed"))]) is None
    assert pick_replica_host(spec, 40, [home, host("b", draining=True)]) is None


class View:
    """A `HostView` of a snapshot; it counts how often the whole is asked for."""

    def __init__(self, snapshot: HostSnapshot, load: int = 0) -> None:
        self.host_id = snapshot.host_id
        self.states: dict[str, State] = {status.model_id: status.state for status in snapshot.models}
        self.num_snapshots = 0
        self._snapshot = snapshot
        self._load = load

    def state(self, model_id: str) -> State | None:
        return self.states.get(model_id)

    def load(self, model_id: str) -> tuple[int, ...]:
        assert self.states[model_id] == "ready"
        return (self._load,)

    def need_bytes(self, model_id: str) -> int:
        return 40

    def snapshot(self) -> HostSnapshot:
        self.num_snapshots += 1
        return self._snapshot


def ready(host_id: str, load: int) -> View:
    return View(host(host_id, model("m", "ready", weight_bytes=40, leases=load)), load)


def test_a_call_goes_to_the_least_busy_host_that_is_ready_and_needs_no_snapshot() -> None:
    views = [View(host("cold")), ready("busy", 3), ready("idle", 1)]

    assert ranked_hosts("m", views) == ["idle", "busy"]
    assert [view.num_snapshots for view in views] == [0, 0, 0]


def test_a_call_for_a_cold_model_goes_where_it_fits() -> None:
    full = View(host("full", model("x", "ready", weight_bytes=90)))

    assert ranked_hosts("m", [full, View(host("free"))]) == ["free", "full"]
    assert ranked_hosts("m", []) == []


@pytest.mark.parametrize(("num_busy", "found"), [(0, None), (1, None), (2, "free"), (9, "free")])
def test_one_more_copy_is_needed_when_all_that_are_ready_are_busy(num_busy: int, found: str | None) -> None:
    spec = ModelSpec(model_id="m", source="x", replicas=3)

    assert replica_host(spec, [ready("a", 1), ready("b", 1), View(host("free"))], num_busy) == found


def test_a_model_that_is_ready_nowhere_gets_no_copy() -> None:
    assert replica_host(ModelSpec(model_id="m", source="x", replicas=3), [View(host("free"))], 9) is None


def test_wanted_models_are_looked_at_in_turn_so_that_loads_begun_before_count() -> None:
    specs = [ModelSpec(model_id=model_id, source="x") for model_id in ("m", "n", "elsewhere")]
    view = View(host("a", model("m"), model("n", "failed")))
    found = []
    for spec in not_resident(specs, [view]):
        found.append(spec.model_id)
        view.states["n"] = "loading"

    assert found == ["m"]
    view.states = {"m": "waiting_space", "n": "cold"}
    assert [spec.model_id for spec in not_resident(specs, [view])] == ["n"]
