"""What a router knows of the replicas, without a cluster."""

from router.backends.ray.replica_directory import ReplicaDirectory
from tests.testkit.snapshots import host


def test_who_waits_is_told_when_a_host_comes_and_when_one_that_was_silent_is_back() -> None:
    board, told = ReplicaDirectory(), []
    board.on_change = lambda: told.append(len(told))
    board.see({"x": {}})

    board.note(host("x"))
    board.note(host("x"))
    assert len(told) == 1

    board.ledger.close("x")
    board.note(host("x"))
    assert len(told) == 2


def test_a_replica_that_does_not_run_any_more_is_not_heard() -> None:
    board, told = ReplicaDirectory(), []
    board.on_change = lambda: told.append(len(told))

    board.note(host("gone"))

    assert (told, board.ledger.snapshots()) == ([], ())
