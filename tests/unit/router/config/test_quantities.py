"""Tests the parsers of quantities."""

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.spec import NEVER_IDLE
from engines.types import Budget
from router.config.quantities import (
    parse_budget,
    parse_bytes,
    parse_cache_bytes,
    parse_device,
    parse_duration_s,
    parse_host_budget,
    parse_keep_alive_s,
)


@pytest.mark.parametrize(
    ("written", "size_bytes"),
    [
        ("20GiB", 20 * 2**30),
        ("500MB", 500_000_000),
        ("1.5 gib", 3 * 2**29),
        ("12kb", 12_000),
        ("7 B", 7),
        ("1024", 1024),
        (4096, 4096),
        ("2TiB", 2 * 2**40),
    ],
)
def test_a_size_is_read(written: object, size_bytes: int) -> None:
    assert parse_bytes(written) == size_bytes


@pytest.mark.parametrize(
    "written", ["", "GiB", "-1", "1 potato", "1..5GB", "٣GB", "1e3", 1.5, True, None, ["1GB"]], ids=repr
)
def test_what_is_no_size_is_refused_with_an_example(written: object) -> None:
    with pytest.raises(ValueError, match="500MB, 20GiB"):
        parse_bytes(written)


@given(st.integers(min_value=0, max_value=2**60))
def test_a_number_of_bytes_is_exact(size_bytes: int) -> None:
    assert parse_bytes(str(size_bytes)) == parse_bytes(f"{size_bytes}B") == parse_bytes(size_bytes) == size_bytes


@pytest.mark.parametrize(
    ("written", "seconds"),
    [
        ("10m", 600.0),
        ("30s", 30.0),
        ("1h30m", 5400.0),
        ("2d", 172_800.0),
        ("500ms", 0.5),
        ("1.5h", 5400.0),
        ("45", 45.0),
        (0, 0.0),
        (0.25, 0.25),
    ],
)
def test_a_duration_is_read(written: object, seconds: float) -> None:
    assert parse_duration_s(written) == seconds


@pytest.mark.parametrize(
    "written",
    ["", "m", "10 minutes", "-1", -1, "1m-", "inf", float("inf"), float("nan"), "9" * 400, True, None],
    ids=repr,
)
def test_what_is_no_duration_is_refused(written: object) -> None:
    with pytest.raises(ValueError, match="30s, 10m"):
        parse_duration_s(written)


@pytest.mark.parametrize("written", [-1, "-1", -1.0], ids=repr)
def test_minus_one_keeps_a_model_for_ever(written: object) -> None:
    assert parse_keep_alive_s(written) == NEVER_IDLE


@pytest.mark.parametrize("written", [-2, "-5m", "never", False])
def test_no_other_negative_time_is_a_keep_alive(written: object) -> None:
    with pytest.raises(ValueError, match=r"or -1 \(stay until memory is needed\)"):
        parse_keep_alive_s(written)


def test_keep_alive_reads_durations_too() -> None:
    assert [parse_keep_alive_s(written) for written in ("10m", 0, 90)] == [600.0, 0.0, 90.0]


def test_a_budget_is_a_part_or_a_size() -> None:
    assert parse_budget("80%") == Budget(fraction=0.8)
    assert parse_budget("20GiB") == Budget(size_bytes=20 * 2**30)


@pytest.mark.parametrize("written", ["0%", "100.5%", "-5%", "%", "many", "", None, 0.8])
def test_a_budget_out_of_bounds_is_refused(written: object) -> None:
    with pytest.raises(ValueError, match=r"20GiB"):
        parse_budget(written)


@pytest.mark.parametrize("written", [20, "20", "1MB"], ids=repr)
def test_a_budget_without_its_unit_is_refused(written: object) -> None:
    with pytest.raises(ValueError, match="with the unit and at least 16MiB"):
        parse_budget(written)


def test_a_budget_never_exceeds_the_device() -> None:
    assert parse_budget("20GiB").of(8 * 2**30) == 8 * 2**30
    assert parse_budget("50%").of(8 * 2**30) == 4 * 2**30
    assert parse_budget("100%").of(1001) == 1001


def test_a_budget_prints_as_people_write_it() -> None:
    assert [str(parse_budget(text)) for text in ("80%", "12.5%", "20GiB")] == ["80%", "12.5%", "20.00 GiB"]


def test_devices_are_read() -> None:
    assert [parse_device(name) for name in ("auto", "cpu", "cuda", " cuda:3 ")] == ["auto", "cpu", "cuda", "cuda:3"]


@pytest.mark.parametrize("written", ["gpu", "cuda:", "cuda:-1", "cuda:x", "CPU", "cpu\nx", 0, None])
def test_other_devices_are_refused(written: object) -> None:
    with pytest.raises(ValueError, match="auto, cpu, cuda or cuda:N"):
        parse_device(written)


@pytest.mark.parametrize(("written", "size_bytes"), [("256MiB", 2**28), (0, 0), (2**20, 2**20), ("1GB", 10**9)])
def test_a_cache_is_a_size_or_nothing(written: object, size_bytes: int) -> None:
    assert parse_cache_bytes(written) == size_bytes


@pytest.mark.parametrize("written", [256, "1KiB", "many", True, -1, None])
def test_a_cache_that_holds_nothing_of_use_is_refused(written: object) -> None:
    with pytest.raises(ValueError, match="at least 1MiB, or 0"):
        parse_cache_bytes(written)


@pytest.mark.parametrize("parse", [parse_duration_s, parse_keep_alive_s, parse_bytes, parse_budget, parse_cache_bytes])
@pytest.mark.parametrize(
    "written",
    ["1" * 6000 + "x", "1" * 65, "1s" * 40, " " * 65 + "1", 10**5000],
    ids=["no unit", "digits", "parts", "spaces", "a number"],
)
def test_no_quantity_is_longer_than_people_write(parse: Callable[[object], object], written: object) -> None:
    with pytest.raises(ValueError, match="such as"):
        parse(written)


def test_a_duration_beyond_what_timers_take_is_as_good_as_for_ever() -> None:
    assert parse_duration_s("9" * 60) == parse_duration_s("99999999999999d") == 1e9


def test_a_host_budget_may_be_nothing() -> None:
    assert parse_host_budget("0") == parse_host_budget(0) == Budget(size_bytes=0)
    assert parse_host_budget("30%") == Budget(fraction=0.3)


@pytest.mark.parametrize("written", [False, "20", "0%", "-1", ""])
def test_a_host_budget_that_is_none_says_what_is_allowed(written: object) -> None:
    with pytest.raises(ValueError, match="or 0 for none"):
        parse_host_budget(written)
