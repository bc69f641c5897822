"""Tests of `ReplicaDirectory`, without a cluster."""

from router.backends.ray.replica_directory import ReplicaDirectory
from tests.testkit.snapshots import host


def test_who_waits_is_told_when_a_host_comes_and_when_one_that_was_silent_is_back() -> None:
    replicas, told = ReplicaDirectory(), []
    replicas.on_change = lambda: told.append(len(told))
    replicas.set_running({"x": {}})

    replicas.update(host("x"))
    replicas.update(host("x"))
    assert len(told) == 1

    replicas.directory.close("x")
    replicas.update(host("x"))
    assert len(told) == 2


def test_a_replica_that_does_not_run_any_more_is_not_heard() -> None:
    replicas, told = ReplicaDirectory(), []
    replicas.on_change = lambda: told.append(len(told))

    replicas.update(host("gone"))

    assert (told, replicas.directory.snapshots()) == ([], ())
