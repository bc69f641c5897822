"""Tests the tables and verdicts of benchmarks, without measuring."""

import json
from pathlib import Path

import pytest

from benchmarks.http import rerank as rerank_http
from benchmarks.lib.machine import Machine
from benchmarks.lib.peers import BASE, OURS
from benchmarks.lib.report import Report, save, table
from benchmarks.lib.workloads import Workload
from benchmarks.offline import regression, throughput
from benchmarks.offline.ceiling import read_shape
from benchmarks.offline.throughput import Case, make_cases
from router.loadgen import Outcome, Sample

MACHINE = Machine(
    cpu="test", cores=2, instructions=("avx2",), memory_bytes=1, system="Linux", python="3.11", packages={"torch": "2"},
    commit="abc", started_at="now", load_at_start=0.1,
)  # fmt: skip
CASE = Case("short", Workload("short", ("a b", "c d"), (40, 60)), 2)


def report(**changes: object) -> Report:
    given = {
        "name": "x", "title": "X", "machine": MACHINE, "settings": {"rounds": 2}, "header": ("a", "b"),
        "rows": [("1", "2")], "samples": {},
    }  # fmt: skip
    return Report(**(given | changes))  # type: ignore[arg-type]  # a test's table of fields


def test_a_table_is_markdown_whose_columns_stand_under_one_another() -> None:
    assert table(("name", "x"), [("a", "1.0"), ("long name", "2")]) == "\n".join([
        "| name      |   x |",
        "| --------- | --: |",
        "| a         | 1.0 |",
        "| long name |   2 |",
    ])  # fmt: skip


def test_a_report_is_saved_with_machine_versions_and_every_sample(tmp_path: Path) -> None:
    path = save(report(samples={"seconds": [1.0, 2.0]}), tmp_path)
    kept = json.loads(path.read_text())

    assert path.name == "x.json"
    assert kept["machine"]["cpu"] == "test"
    assert kept["samples"] == {"seconds": [1.0, 2.0]}


def test_figures_of_a_busy_machine_say_so() -> None:
    from msgspec import structs

    assert "do not quote" not in MACHINE.describe()
    assert "do not quote" in structs.replace(MACHINE, other_cores=0.9).describe()


def test_a_row_of_throughput_has_the_bases_tokens_a_second_and_ratios() -> None:
    samples = {"short": {"base": [2.0, 2.0], "own": [1.0, 1.0]}}

    (row,) = throughput.rows_beside_base([CASE], samples, ["own", "base"], "base")

    assert row == ("short (1 × 2 texts, 100 tokens)", "50", "2.00 (2.00–2.00)")


def test_cases_shrink_for_slow_models_but_not_to_nothing() -> None:
    (case,) = make_cases(["long"], lambda text: 2 + len(text.split()), scale=0.001)

    assert (len(case.workload.texts), case.texts_per_call) == (1, 1)


@pytest.mark.parametrize(
    ("now", "before", "is_slower"),
    [([1.2, 1.2], [1.0, 1.0], True), ([1.2, 0.9], [1.0, 1.0], False), ([1.02, 1.02], [1.0, 1.0], False)],
)
def test_slower_in_every_round_and_by_more_than_noise_is_a_regression(
    now: list[float], before: list[float], is_slower: bool
) -> None:
    found = regression.regressions(
        report(samples={"before": "abc", "seconds": {"short": {regression.NOW: now, "abc": before}}})
    )

    assert bool(found) == is_slower


def test_a_commit_that_git_does_not_know_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="git finds no commit"):
        regression.unpack("nonsense", tmp_path)


def test_the_last_commits_engine_is_unpacked(tmp_path: Path) -> None:
    regression.unpack("HEAD", tmp_path)

    assert (tmp_path / "engines" / "host.py").exists()
    assert not (tmp_path / "tests").exists()


def test_the_arithmetic_of_a_model_is_that_of_its_config(tmp_path: Path) -> None:
    config = {"hidden_size": 384, "num_attention_heads": 12, "intermediate_size": 1536, "num_hidden_layers": 6}
    (tmp_path / "config.json").write_text(json.dumps(config))
    shape = read_shape(tmp_path)

    assert shape.linear_flops == 2 * 6 * (4 * 384 * 384 + 2 * 384 * 1536)
    assert shape.flops([10, 20]) == shape.linear_flops * 30 + 4 * 6 * 384 * (100 + 400)


def test_a_gated_layer_and_grouped_keys_are_counted(tmp_path: Path) -> None:
    config = {
        "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "intermediate_size": 128,
        "num_hidden_layers": 1, "hidden_act": "silu",
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))

    assert sum(a * b for a, b in read_shape(tmp_path).linears) == 64 * 128 + 2 * 64 * 64 + 128 * 64 + 3 * 64 * 128


def test_the_picture_of_a_comparison_has_every_program_and_ours_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = []
    monkeypatch.setattr(throughput, "draw_bars", lambda *given: drawn.append(given))
    names = (BASE.name, "another", OURS)
    seconds = {name: [float(place)] for place, name in enumerate(names, 1)}

    throughput.draw(
        report(samples={"seconds": {"short": seconds}, "off_by": dict.fromkeys(names, 0.0)}), tmp_path / "x.svg"
    )

    assert [(groups, series) for _, _, groups, series in drawn] == [
        (["short"], {OURS: [pytest.approx(1 / 3)], BASE.name: [1.0], "another": [0.5]})
    ]
    assert next(iter(drawn[0][3])) == OURS


def test_a_row_of_rerankers_over_http_has_both_ratios_to_the_best_peer() -> None:
    def rounds(wall_s: float, core_s: float) -> list[rerank_http.Measured]:
        samples = (Sample(0.0, wall_s, 100, 200),)
        return [rerank_http.Measured(Outcome(wall_s=wall_s, client_cores=0.1, samples=samples), core_s)]

    found = {OURS: rounds(1.0, 2.0), "one": rounds(2.0, 3.0), "other": rounds(4.0, 2.5)}

    assert rerank_http.row("mixed", found) == (
        "mixed", "100.0", "50.0", "25.0", "2.00 (2.00–2.00)", "1,000 / 2,000 / 4,000", "50.0 / 33.3 / 40.0",
        "1.25 (1.25–1.25)",
    )  # fmt: skip
