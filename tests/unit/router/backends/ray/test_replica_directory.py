"""Tests of `ReplicaDirectory`, without a cluster."""

from router.backends.ray.replica_directory import ReplicaDirectory
from tests.testkit.snapshots import host


def test_waiters_are_notified_when_a_host_is_added_and_when_a_silent_one_is_back() -> None:
    replicas, told = ReplicaDirectory(), []
    replicas.on_change = lambda: told.append(len(told))
    replicas.set_running({"x": {}})

    replicas.update(host("x"))
    replicas.update(host("x"))
    assert len(told) == 1

    replicas.directory.close("x")
    replicas.update(host("x"))
    assert len(told) == 2


def test_messages_of_an_ended_replica_are_ignored() -> None:
    replicas, told = ReplicaDirectory(), []
    replicas.on_change = lambda: told.append(len(told))

    replicas.update(host("gone"))

    assert (told, replicas.directory.snapshots()) == ([], ())
