"""Preloads at stated times: each comes once, also over summer time, sleep and a clock that is set."""

from collections.abc import Sequence
from datetime import datetime, timedelta

import pytest
from structlog.testing import capture_logs

from engines.errors import OutOfMemory
from engines.spec import ModelSpec
from router.auth.guards import keyring_of
from router.config.settings import Settings
from router.registry.registry import Registry
from router.server.schedule import CHECK_EVERY_S, Schedule, run_schedule
from router.server.state import ServerState
from tests.testkit.backends import ScriptedBackend

FRIDAY = datetime(2026, 11, 27, 7, 59)
WORKDAYS = ModelSpec(model_id="a", source="x", preload_at="0 8 * * 1-5")
HOURLY = ModelSpec(model_id="b", source="x", preload_at="30 * * * *")
NEVER = ModelSpec(model_id="c", source="x")


def names(specs: Sequence[ModelSpec]) -> list[str]:
    return [spec.model_id for spec in specs]


def at(hour: int, minute: int, day: int = 27) -> datetime:
    return datetime(2026, 11, day, hour, minute)


def test_a_time_comes_once() -> None:
    schedule = Schedule(FRIDAY)

    assert names(schedule.due([WORKDAYS, HOURLY, NEVER], at(7, 59))) == []
    assert names(schedule.due([WORKDAYS, HOURLY, NEVER], at(8, 0))) == ["a"]
    assert names(schedule.due([WORKDAYS, HOURLY, NEVER], at(8, 1))) == []
    assert names(schedule.due([WORKDAYS, HOURLY, NEVER], at(8, 31))) == ["b"]


def test_workdays_are_no_weekends() -> None:
    schedule = Schedule(at(9, 0))

    assert names(schedule.due([WORKDAYS], at(9, 0, day=29))) == []
    assert names(schedule.due([WORKDAYS], at(8, 0, day=30))) == ["a"]


def test_times_that_passed_while_the_machine_slept_count_once() -> None:
    assert names(Schedule(FRIDAY).due([HOURLY], at(13, 0))) == ["b"]


def test_an_hour_that_comes_twice_brings_no_time_twice() -> None:
    """Summer time ends: the clock goes from three back to two."""
    schedule = Schedule(at(2, 0))

    assert names(schedule.due([HOURLY], at(2, 31))) == ["b"]
    assert names(schedule.due([HOURLY], at(2, 31) - timedelta(minutes=1))) == []
    assert names(schedule.due([HOURLY], at(2, 31))) == []
    assert names(schedule.due([HOURLY], at(3, 31))) == ["b"]


def test_a_clock_that_is_set_back_by_hours_does_not_stop_the_schedule() -> None:
    schedule = Schedule(at(20, 0))

    assert names(schedule.due([HOURLY], at(7, 0))) == []
    assert names(schedule.due([HOURLY], at(7, 31))) == ["b"]


async def run_until(times: list[datetime], backend: ScriptedBackend) -> None:
    """Runs the schedule until the times are over."""
    state = ServerState(Settings(), Registry(models={"a": WORKDAYS}), backend, keyring_of(Settings()), 0)
    now = iter(times)

    async def sleep(seconds: float) -> None:
        assert seconds == CHECK_EVERY_S

    with pytest.raises(RuntimeError, match="StopIteration"):
        await run_schedule(state, lambda: next(now), sleep)


async def test_the_model_is_preloaded_when_its_time_comes() -> None:
    backend = ScriptedBackend("a")

    with capture_logs() as logs:
        await run_until([at(7, 59), at(7, 59), at(8, 0), at(8, 1)], backend)

    assert backend.commands == [("preload", "a", False, False)]
    assert [(line["event"], line["model"]) for line in logs] == [("schedule.preloading", "a")]


async def test_a_preload_that_is_refused_is_logged_and_the_schedule_goes_on() -> None:
    backend = ScriptedBackend("a")
    backend.failures["a"] = OutOfMemory("pinned models leave no room")

    with capture_logs() as logs:
        await run_until([at(7, 59), at(8, 0), at(8, 0, day=30)], backend)

    assert [line["event"] for line in logs] == ["schedule.not_preloaded"] * 2
