"""Who waits for whom when a batch has ended: on times that tests choose."""

import pytest

from engines.batching.queue import RejoinWindow

FEW, MANY = 12, 500


def test_nobody_waits_before_a_batch_has_ended() -> None:
    assert RejoinWindow().wait_s(FEW, 5.0) == 0.0


def test_who_waits_when_a_batch_ends_waits_for_those_it_has_answered_and_no_longer() -> None:
    company = RejoinWindow()

    company.on_batch_done(2, took_s=0.1, now_s=5.0)

    assert company.wait_s(FEW, 5.0) == pytest.approx(0.035)
    company.on_admitted()
    assert company.wait_s(FEW, 5.01) == pytest.approx(0.025)
    company.on_admitted()
    assert company.wait_s(FEW, 5.01) == 0.0


def test_a_lone_client_who_asks_again_waits_for_nobody() -> None:
    company = RejoinWindow()

    company.on_batch_done(1, took_s=0.1, now_s=5.0)
    company.on_admitted()

    assert company.wait_s(FEW, 5.0) == 0.0


def test_a_batch_that_is_large_enough_waits_for_nobody() -> None:
    company = RejoinWindow()

    company.on_batch_done(2, took_s=0.1, now_s=5.0)

    assert company.wait_s(MANY, 5.0) == 0.0


def test_the_wait_ends_and_is_not_taken_up_again() -> None:
    company = RejoinWindow()
    company.on_batch_done(2, took_s=0.1, now_s=5.0)
    company.on_admitted()

    assert company.wait_s(FEW, 5.04) == 0.0
    assert company.wait_s(FEW, 5.0) == 0.0


def test_after_a_wait_in_vain_the_next_sixteen_batches_do_without() -> None:
    company = RejoinWindow()
    company.on_batch_done(2, took_s=0.1, now_s=5.0)
    assert company.wait_s(FEW, 5.04) == 0.0

    waits = []
    for number in range(17):
        company.on_batch_done(2, took_s=0.1, now_s=6.0 + number)
        waits.append(company.wait_s(FEW, 6.0 + number) > 0)

    assert waits == [False] * 16 + [True]
