"""Tests the rejoin window after a batch, on times that tests choose."""

import pytest

from engines.batching.batch import RejoinWindow

FEW, MANY = 12, 500


def test_without_an_earlier_batch_there_is_no_wait() -> None:
    assert RejoinWindow().wait_s(FEW, 5.0) == 0.0


def test_texts_queued_when_a_batch_ends_wait_for_the_clients_it_answered_and_no_longer() -> None:
    window = RejoinWindow()

    window.on_batch_done(2, took_s=0.1, now_s=5.0)

    assert window.wait_s(FEW, 5.0) == pytest.approx(0.035)
    window.on_admitted()
    assert window.wait_s(FEW, 5.01) == pytest.approx(0.025)
    window.on_admitted()
    assert window.wait_s(FEW, 5.01) == 0.0


def test_a_lone_client_that_sends_again_does_not_wait() -> None:
    window = RejoinWindow()

    window.on_batch_done(1, took_s=0.1, now_s=5.0)
    window.on_admitted()

    assert window.wait_s(FEW, 5.0) == 0.0


def test_a_batch_that_is_large_enough_does_not_wait() -> None:
    window = RejoinWindow()

    window.on_batch_done(2, took_s=0.1, now_s=5.0)

    assert window.wait_s(MANY, 5.0) == 0.0


def test_the_wait_ends_and_is_not_taken_up_again() -> None:
    window = RejoinWindow()
    window.on_batch_done(2, took_s=0.1, now_s=5.0)
    window.on_admitted()

    assert window.wait_s(FEW, 5.04) == 0.0
    assert window.wait_s(FEW, 5.0) == 0.0


def test_after_a_wait_in_vain_the_next_sixteen_batches_do_without() -> None:
    window = RejoinWindow()
    window.on_batch_done(2, took_s=0.1, now_s=5.0)
    assert window.wait_s(FEW, 5.04) == 0.0

    waits = []
    for number in range(17):
        window.on_batch_done(2, took_s=0.1, now_s=6.0 + number)
        waits.append(window.wait_s(FEW, 6.0 + number) > 0)

    assert waits == [False] * 16 + [True]
