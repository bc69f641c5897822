"""Progress output of a run."""

import io

import pytest
from rich.console import Console
from rich.live import Live

from router.loadgen import Phase
from router.loadgen.progress import COLUMNS, Lines, LiveTable, spark
from router.loadgen.results import Figures, Latency
from tests.testkit.load_reports import measured

FIGURES = Figures(
    seconds=2.0, requests=40, failed=1, texts_per_s=19.5, tokens_per_s=None,
    latency_s=Latency(0.01234, 0.02, 0.5, 2.0, 2.5), texts_each_s=(10, 29),
)  # fmt: skip


def test_a_pipe_gets_one_line_a_phase_and_notes_go_elsewhere() -> None:
    said: list[str] = []
    told: list[str] = []
    lines = Lines(said.append, told.append)
    lines.begin(Phase(per_s=20.0))
    lines.update(FIGURES)
    lines.end(measured(20.0, texts=[10, 20], failed=[0, 0]))

    assert len(said) == 1
    assert said[0].split("\t")[0] == "20 requests/s"
    assert len(said[0].split("\t")) == len(COLUMNS)
    assert told == [
        "...  20 requests/s: seconds 2.0, requests 40, texts/s 19.5, tokens/s –, p50 ms 12.3, p95 ms 500.0, "
        "p99 ms 2000, errors 1"
    ]


def test_a_terminal_sees_the_phase_that_runs_under_those_that_are_over() -> None:
    with Live(console=Console(file=io.StringIO()), auto_refresh=False) as live:
        table = LiveTable(live)
        table.begin(Phase(per_s=20.0))
        table.end(measured(20.0, texts=[10, 20], failed=[0, 0]))
        table.begin(Phase(clients=8))
        table.update(FIGURES)
    paper = Console(file=io.StringIO(), width=140)
    with paper.capture() as seen:
        paper.print(live.get_renderable())
    head, first, second = [line.rstrip() for line in seen.get().splitlines()]

    assert all(name in head for name in COLUMNS)
    assert first.split()[:2] == ["20", "requests/s"]
    assert second.split()[:4] == ["8", "clients", "2.0", "40"]
    assert second.endswith("▃█")


@pytest.mark.parametrize(("values", "line"), [((), ""), ((0, 0), "  "), ((1, 4, 8), "▁▄█"), ((1, 1000), "▁█")])
def test_the_last_seconds_are_a_line(values: tuple[int, ...], line: str) -> None:
    assert spark(values) == line
    assert len(spark((1,) * 100)) == 24
