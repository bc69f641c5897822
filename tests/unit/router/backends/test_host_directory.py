"""Hosts are chosen from snapshots that are older than the calls in flight."""

from typing import Any

import pytest

from engines.errors import LoadFailed
from engines.spec import ModelSpec
from engines.types import HostSnapshot, ModelStatus, State
from router.backends.host_directory import HostDirectory
from tests.testkit.snapshots import host

SPEC = ModelSpec(model_id="a", source="a")


def status(model_id: str, host_id: str, state: State = "cold", **more: Any) -> ModelStatus:
    return ModelStatus(
        model_id=model_id, state=state, host_id=host_id, device="cpu", source="s", need_bytes=1000, **more
    )  # fmt: skip


def directory_of(*hosts: HostSnapshot) -> HostDirectory:
    made = HostDirectory()
    for snapshot in hosts:
        made.update(snapshot)
    return made


def test_a_model_sent_to_a_host_is_expected_there_before_the_host_reports_it() -> None:
    directory = directory_of(*(host(name, status("a", name), status("b", name)) for name in "xy"))
    home = directory.ranked(SPEC)[0]
    other = ModelSpec(model_id="b", source="b")
    with directory.in_flight(home, "a"):
        assert directory.ranked(SPEC)[0] == home
        assert directory.ranked(other)[0] != home, "its bytes are claimed there"
    directory.begin(home, "b")
    assert directory.ranked(other)[0] == home


def test_simultaneous_requests_for_cold_models_do_not_over_commit_a_host() -> None:
    specs = [ModelSpec(model_id=f"m{index}", source="s") for index in range(6)]
    directory = directory_of(
        *(host(name, *(status(spec.model_id, name) for spec in specs), free=3000) for name in "xy")
    )
    homes = []
    for spec in specs:
        homes.append(directory.ranked(spec)[0])
        directory.begin(homes[-1], spec.model_id)

    assert sorted(homes) == ["x"] * 3 + ["y"] * 3


def test_a_ready_model_is_used_where_this_router_runs_the_fewest_calls() -> None:
    directory = directory_of(*(host(name, status("a", name, "ready")) for name in "xyz"), host("w", status("a", "w")))
    found = []
    for _ in range(6):
        found.append(directory.ranked(SPEC)[0])
        directory.begin(found[-1], "a")

    assert sorted(found) == ["x", "x", "y", "y", "z", "z"]


def test_calls_of_other_routers_count_on_a_tie() -> None:
    directory = directory_of(
        host("x", status("a", "x", "ready", leases=5)), host("y", status("a", "y", "ready", leases=1))
    )

    assert directory.ranked(SPEC) == ["y", "x"]


def test_a_host_that_drains_or_is_avoided_gets_nothing() -> None:
    directory = directory_of(
        host("x", status("a", "x", "ready")), host("y", status("a", "y"), is_draining=True), host("z", status("a", "z"))
    )
    directory.close("x")
    directory.close("nobody")

    assert directory.ranked(SPEC) == ["z"]
    assert directory.ranked(SPEC, avoid={"z"}) == []
    directory.forget("z")
    assert sorted(directory.devices()) == ["x", "y"]
    assert directory.snapshot("z") is None


def test_a_device_that_no_host_has_is_refused() -> None:
    with pytest.raises(LoadFailed, match="requires device 'cuda'; this server has cpu"):
        directory_of(host("x")).ranked(ModelSpec(model_id="a", source="a", device="cuda"))
    assert directory_of().ranked(ModelSpec(model_id="a", source="a", device="cuda")) == []


def test_one_more_copy_goes_where_there_is_free_memory_and_only_when_all_are_busy() -> None:
    hot = ModelSpec(model_id="a", source="a", replicas=2)
    directory = directory_of(
        host("x", status("a", "x", "ready")), host("y", status("a", "y")), host("z", status("a", "z"))
    )

    assert directory.pick_replica_host(hot, calls=0) is None
    assert directory.pick_replica_host(SPEC, calls=9) is None
    second = directory.pick_replica_host(hot, calls=1)
    assert second in ("y", "z")
    directory.begin(second, "a")
    assert directory.pick_replica_host(hot, calls=9) is None, "one is on its way"


def test_no_other_model_has_to_leave_for_a_copy() -> None:
    hot = ModelSpec(model_id="a", source="a", replicas=2)
    full = host("y", status("a", "y"), status("b", "y", "ready", weight_bytes=4500), free=500, used=4500)

    assert directory_of(host("x", status("a", "x", "ready")), full).pick_replica_host(hot, calls=9) is None


def test_models_that_no_host_has_or_expects_are_unloaded() -> None:
    specs = [ModelSpec(model_id=name, source="s") for name in "abc"]
    directory = directory_of(
        host("x", status("a", "x"), status("b", "x", "loading")), host("y", status("a", "y", "failed"))
    )

    assert [spec.model_id for spec in directory.not_resident(specs)] == ["a"]
