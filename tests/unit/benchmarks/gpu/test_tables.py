"""What is said of a GPU: only what a result file of one has."""

from pathlib import Path

import pytest

from benchmarks.gpu import tables
from benchmarks.gpu.plan import BUDGET_S, PARTS
from benchmarks.gpu.results import Device, PartResult, Record, RunResult, State, read
from benchmarks.gpu.tables import GOALS, failures, findings, goal_rows, plain_table, replaced
from benchmarks.lib.report import RESULTS

ROOT = Path(__file__).parents[4]


def result(kind: str, part: str, records: list[Record], state: State = "done") -> RunResult:
    device = Device(kind=kind, name="NVIDIA H200" if kind == "cuda" else "EPYC")  # type: ignore[arg-type]  # either
    found = PartResult(state=state, records=records, measured_at="2026-12-01 10:00 UTC", reason="why")
    return RunResult(device=device, parts={part: found})


def row(results: list[RunResult], begin: str, language: str = "en") -> tuple[str, ...]:
    return next(row for row in goal_rows(results, language) if row[0].startswith(begin))


def speeds(times: float) -> list[Record]:
    return [{"model": "bge-base", "workload": "mixed", "times": each, "ok": True} for each in (2.0, times)]


def test_without_a_result_nothing_is_claimed() -> None:
    assert {row[2:] for row in goal_rows([])} == {("–", "not yet")}
    assert len(goal_rows([])) == len(GOALS)


def test_a_cpus_run_gives_no_figure_for_a_gpu() -> None:
    assert row([result("cpu", "throughput", speeds(3.0))], "mixed lengths")[2:] == (
        "–", "not yet; its code ran on a CPU, 2026-12-01",
    )  # fmt: skip


@pytest.mark.parametrize(("times", "state"), [(1.6, "met"), (1.4, "missed")])
def test_the_worst_model_decides_whether_a_goal_is_met(times: float, state: str) -> None:
    both = [result("cuda", "throughput", speeds(times)), result("cpu", "throughput", speeds(9.0))]

    assert row(both, "mixed lengths")[1:] == ("≥ 1.5", f"2.00, {times:.2f}", f"{state} on NVIDIA H200, 2026-12-01")


def test_a_part_that_did_not_end_meets_no_goal_and_still_tells_what_it_found() -> None:
    assert row([result("cuda", "throughput", speeds(2.0), "timed out")], "mixed lengths")[3].startswith("missed")


@pytest.mark.parametrize(
    ("p50_ms", "figure", "state"), [(2.5, "2.50 ms / 6.00 ms", "met"), (3.5, "3.50 ms / 6.00 ms", "missed")]
)
def test_a_short_text_over_http_has_three_milliseconds(p50_ms: float, figure: str, state: str) -> None:
    records: list[Record] = [
        {"what": "with graphs", "p50_ms": p50_ms, "ok": True}, {"what": "without graphs", "p50_ms": 6.0, "ok": True},
    ]  # fmt: skip

    found = row([result("cuda", "http-latency", records)], "one short text over HTTP")

    assert found[2:] == (figure, f"{state} on NVIDIA H200, 2026-12-01")


def test_the_share_of_the_peak_is_forty_percent_or_missed() -> None:
    records: list[Record] = [{"share": 0.39, "ok": True}]

    assert row([result("cuda", "roofline", records)], "share of the")[2:] == (
        "39 %", "missed on NVIDIA H200, 2026-12-01",
    )  # fmt: skip


@pytest.mark.parametrize(("off_by", "state"), [(0.01, "met"), (0.2, "missed")])
def test_every_head_of_a_reranker_must_give_the_scores_of_float32(off_by: float, state: str) -> None:
    records: list[Record] = [
        {"head": "first token", "off_by": 0.001, "ok": True}, {"head": "mean", "off_by": off_by, "ok": state == "met"},
        {"workload": "documents", "times": 2.0, "ok": True},
    ]  # fmt: skip

    found = row([result("cuda", "rerankers", records)], "heads of rerankers")

    good = 2 if state == "met" else 1
    assert found[2:] == (f"{good} / 2, {off_by:.0e}", f"{state} on NVIDIA H200, 2026-12-01")
    assert row([result("cuda", "rerankers", records)], "a query and 100 documents")[2] == "2.00"


def test_what_must_not_be_is_listed_and_what_could_not_be_tried_is_not() -> None:
    found = result("cuda", "recipes", [
        {"recipe": "a", "ok": True, "cosine": 0.9999}, {"recipe": "b", "ok": False, "raised": "x"},
        {"recipe": "c", "ok": None},
    ])  # fmt: skip

    assert failures(found) == ["recipes: {'recipe': 'b', 'ok': False, 'raised': 'x'}"]
    assert failures(found, only=["kernel"]) == []
    assert failures(result("cuda", "recipes", [], "timed out")) == ["recipes: timed out, why"]
    assert "1 / 2, 0.999900" in findings(found)


def test_the_parts_leave_time_within_ten_minutes() -> None:
    assert sum(part.expected_s for part in PARTS) <= 0.9 * BUDGET_S
    assert BUDGET_S <= 600
    assert all(part.expected_s <= part.limit_s for part in PARTS)


def test_every_part_of_the_goals_is_measured() -> None:
    assert {goal.part for goal in GOALS} <= {part.name for part in PARTS}


@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_table_of_the_documentation_is_that_of_the_result_files(language: str) -> None:
    results = [read(path) for path in sorted(RESULTS.glob("gpu-*.json"))]
    text = plain_table(tables._WORDS[language]["header"], goal_rows(results, language))
    page = tables.PAGES[language].read_text()

    assert replaced(page, text) == page, "run `python -m benchmarks.gpu --tables`"


def test_a_page_without_a_place_for_the_table_is_an_error() -> None:
    with pytest.raises(ValueError, match="no place"):
        replaced("# Benchmarks\n", "| a |")


@pytest.mark.parametrize(
    ("page", "sentence"),
    [("README.md", "No figure is from a GPU yet"), ("README.zh-CN.md", "目前没有任何数字来自 GPU")],
)
def test_the_readme_says_that_no_figure_is_from_a_gpu_as_long_as_that_is_so(page: str, sentence: str) -> None:
    kinds = {read(path).device.kind for path in RESULTS.glob("gpu-*.json")}

    assert (sentence in (ROOT / page).read_text()) == ("cuda" not in kinds)
