"""`embedyard replay`: a table of what other budgets and orders of eviction would have cost."""

import gzip
import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from engines.trace import TraceModel, TraceRequest, encode_line
from router.cli.main import cli

GIB = 2**30


@pytest.fixture
def day(tmp_path: Path) -> Path:
    """Two models of 1 GiB that take turns."""
    models = [TraceModel(model_id=name, weight_bytes=GIB, workspace_bytes=0, load_s=2.0) for name in "ab"]
    requests = [TraceRequest(at_s=100.0 * at, model_id="ab"[at % 2], seconds=0.1) for at in range(6)]
    path = tmp_path / "day.jsonl"
    path.write_bytes(b"".join(map(encode_line, models)) + b"".join(map(encode_line, requests)))
    return path


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli, ["replay", *arguments], catch_exceptions=False)


def test_the_table_has_a_row_for_each_budget_and_order(day: Path) -> None:
    result = run(str(day), "--budget", "1GiB,2GiB")

    assert result.exit_code == 0
    rows = [line.split("\t") for line in result.stdout.splitlines()]
    assert [row[:7] for row in rows] == [
        ["1.0 GiB", "0 B", "lru", "6", "4", "0", "12.0 s"],
        ["1.0 GiB", "0 B", "cost", "6", "4", "0", "12.0 s"],
        ["2.0 GiB", "0 B", "lru", "2", "0", "0", "4.0 s"],
        ["2.0 GiB", "0 B", "cost", "2", "0", "0", "4.0 s"],
    ]
    assert result.stderr == "this day would have needed 2.0 GiB on the device for no reload\n"


def test_every_device_budget_is_combined_with_every_size_of_main_memory(day: Path) -> None:
    result = run(
        str(day), "--budget", "1GiB,2GiB", "--host-memory", "0,2GiB", "--policy", "lru", "--copy-rate", "4GiB/s"
    )

    rows = [line.split("\t") for line in result.stdout.splitlines()]
    assert [row[:7] for row in rows] == [
        ["1.0 GiB", "0 B", "lru", "6", "4", "0", "12.0 s"],
        ["1.0 GiB", "2.0 GiB", "lru", "2", "0", "4", "6.5 s"],
        ["2.0 GiB", "0 B", "lru", "2", "0", "0", "4.0 s"],
        ["2.0 GiB", "2.0 GiB", "lru", "2", "0", "0", "4.0 s"],
    ]
    assert result.stderr.splitlines()[1:] == [
        "or 1.0 GiB on the device and 2.0 GiB of main memory",
        "or 2.0 GiB on the device and 0 B of main memory",
    ]


def test_the_main_memory_that_is_said_to_suffice_does(day: Path) -> None:
    rows = json.loads(run(str(day), "--budget", "1GiB", "--host-memory", "2GiB", "--json").stdout)

    assert [(row["policy"], row["reloads"], row["host_peak_bytes"]) for row in rows] == [
        ("lru", 0, 2 * GIB),
        ("cost", 0, 2 * GIB),
    ]


def test_warm_and_scheduled_models_are_not_waited_for(day: Path) -> None:
    cold = json.loads(run(str(day), "--budget", "2GiB", "--policy", "lru", "--json").stdout)
    warm = run(
        str(day), "--budget", "2GiB", "--policy", "lru", "--warm", "a", "--preload-at", "b=* * * * *", "--json"
    )  # fmt: skip

    assert cold[0]["waited_s"] == 4.0
    assert json.loads(warm.stdout)[0]["waited_s"] == 0.0


def test_without_a_budget_half_of_the_memory_and_all_of_it_are_replayed(day: Path) -> None:
    rows = json.loads(run(str(day), "--policy", "lru", "--json").stdout)

    assert [(row["budget_bytes"], row["reloads"]) for row in rows] == [(GIB, 4), (2 * GIB, 0)]


def test_a_compressed_trace_is_read_too(day: Path) -> None:
    packed = day.with_suffix(".jsonl.gz")
    packed.write_bytes(gzip.compress(day.read_bytes()))

    assert run(str(packed), "--json").stdout == run(str(day), "--json").stdout


def test_a_plot_is_drawn(day: Path, tmp_path: Path) -> None:
    assert run(str(day), "--plot", str(tmp_path / "day.png")).exit_code == 0
    assert (tmp_path / "day.png").read_bytes().startswith(b"\x89PNG")


def test_requests_for_models_that_were_never_in_memory_are_left_out(day: Path) -> None:
    with day.open("ab") as file:
        file.write(encode_line(TraceRequest(at_s=1.0, model_id="unknown")))

    result = run(str(day), "--policy", "lru", "--budget", "2GiB")

    assert "1 request is left out: the model was never in memory" in result.stderr
    assert result.stdout.split("\t")[3] == "2"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--budget", "much"), "--budget is 'much', but must be "),
        (("--budget", ",".join(["1GiB"] * 17)), "at most 16 are replayed at once"),
        (("--policy", "fifo"), "'fifo' is no order of eviction: lru or cost"),
        (("--pin", "c"), "the trace has no model 'c'; it has a, b"),
        (("--warm", "c"), "the trace has no model 'c'; it has a, b"),
        (("--preload-at", "c=0 8 * * *"), "the trace has no model 'c'; it has a, b"),
        (("--preload-at", "a=often"), "--preload-at is 'a=often', but must be MODEL=CRON"),
        (("--budget", "0"), "--budget is '0', but must be more than 0"),
        (("--copy-rate", "0"), "--copy-rate is '0', but must be more than 0"),
        (("--disk-rate", "fast"), "--disk-rate is 'fast', but must be "),
        (("--host-memory", "much"), "--host-memory is 'much', but must be "),
        (
            ("--budget", ",".join(["1GiB"] * 8), "--host-memory", ",".join(["1GiB"] * 8)),
            "128 combinations, and at most 64 are replayed at once",
        ),
    ],
)
def test_a_mistake_is_said_with_what_is_allowed(day: Path, arguments: tuple[str, ...], message: str) -> None:
    result = run(str(day), *arguments)

    assert result.exit_code == 2
    assert message in result.stderr


def test_a_file_that_is_no_trace_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("hello\n")

    result = run(str(tmp_path / "x"))

    assert result.exit_code == 2
    assert "line 1 is no record of a trace" in result.stderr
