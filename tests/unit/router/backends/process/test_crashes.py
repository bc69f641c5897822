"""Crashes count against the models that ran; after three within ten minutes a model is quarantined."""

from contextlib import suppress

import pytest

from engines.errors import LoadFailed
from router.backends.process.crashes import CrashCounter
from tests.testkit.clocks import FakeClock


def test_the_third_death_within_ten_minutes_quarantines_the_model() -> None:
    clock = FakeClock()
    crashes = CrashCounter(clock)
    for _ in range(2):
        crashes.record_crash(["bad"])
        clock.advance(100)
        crashes.check("bad")
    crashes.record_crash(["bad", "by chance"])

    crashes.check("by chance")
    crashes.check("another")
    with pytest.raises(LoadFailed, match="3 crashes of a worker process within 10 minutes") as caught:
        crashes.check("bad")
    assert (caught.value.kind, caught.value.retry_after_s) == ("kills_host", 30.0)


def test_deaths_that_are_long_ago_do_not_count() -> None:
    clock = FakeClock()
    crashes = CrashCounter(clock)
    for _ in range(5):
        crashes.record_crash(["unlucky"])
        clock.advance(301)

    crashes.check("unlucky")


def test_a_quarantine_ends_by_itself_and_when_the_model_is_another_one() -> None:
    clock = FakeClock()
    crashes = CrashCounter(clock)
    for _ in range(3):
        crashes.record_crash(["a", "b"])
    crashes.clear("a")

    crashes.check("a")
    assert crashes.left_s("b") == 30.0
    clock.advance(30)
    crashes.check("b")


def test_a_model_that_goes_on_crashing_its_host_is_kept_out_longer_each_time() -> None:
    clock = FakeClock()
    crashes = CrashCounter(clock)
    lengths = []
    for _ in range(9):
        if crashes.record_crash(["bad"]) is not None:
            lengths.append(crashes.left_s("bad"))
        with suppress(LoadFailed):
            crashes.check("bad")
        clock.advance(crashes.left_s("bad") + 1)

    assert lengths == [30.0, 60.0, 120.0, 300.0, 600.0, 600.0, 600.0]


def test_a_later_quarantine_says_how_many_crashes_led_to_it() -> None:
    clock = FakeClock()
    crashes = CrashCounter(clock)
    for _ in range(4):
        clock.advance(crashes.left_s("bad"))
        crashes.record_crash(["bad"])

    with pytest.raises(
        LoadFailed, match=r"'bad' was running in 4 crashes of a worker process \(kills_host\); retried in 60 s"
    ):
        crashes.check("bad")


def test_a_model_that_has_run_for_ten_minutes_since_its_return_begins_anew() -> None:
    clock = FakeClock()
    crashes = CrashCounter(clock)
    for _ in range(4):
        clock.advance(crashes.left_s("a"))
        crashes.record_crash(["a"])
    clock.advance(60 + 600)

    assert [crashes.record_crash(["a"]) for _ in range(3)] == [None, None, "a"]
    assert crashes.left_s("a") == 30.0


def test_a_crash_of_a_call_that_was_sent_before_the_quarantine_does_not_lengthen_it() -> None:
    crashes = CrashCounter(FakeClock())
    for _ in range(5):
        crashes.record_crash(["bad"])

    assert crashes.left_s("bad") == 30.0


def test_of_the_models_of_a_crash_the_one_that_was_quarantined_is_the_cause() -> None:
    clock = FakeClock()
    crashes = CrashCounter(clock)
    for _ in range(3):
        crashes.record_crash(["bad"])
    clock.advance(31)

    assert crashes.record_crash(["bad", "busy"]) == "bad"
    crashes.check("busy")


def test_a_model_that_ran_beside_the_one_that_kills_is_not_quarantined_with_it() -> None:
    crashes = CrashCounter(FakeClock())
    for _ in range(3):
        crashes.record_crash(["busy", "bad"])

    crashes.check("busy")
    with pytest.raises(LoadFailed):
        crashes.check("bad")


def test_a_death_is_charged_once() -> None:
    crashes = CrashCounter(FakeClock())
    for _ in range(3):
        crashes.record_crash(["busy", "bad"])
    for _ in range(2):
        crashes.record_crash(["busy"])

    crashes.check("busy")
    crashes.record_crash(["busy"])
    with pytest.raises(LoadFailed):
        crashes.check("busy")


def test_the_model_that_ran_at_every_crash_is_the_cause() -> None:
    crashes = CrashCounter(FakeClock())
    for other in ("x", "y", "z"):
        crashes.record_crash(["bad", other])

    for other in ("x", "y", "z"):
        crashes.check(other)
    with pytest.raises(LoadFailed):
        crashes.check("bad")


def test_a_death_of_which_nothing_is_known_is_nobodys() -> None:
    crashes = CrashCounter(FakeClock())
    for _ in range(3):
        crashes.record_crash([])

    crashes.check("any")
