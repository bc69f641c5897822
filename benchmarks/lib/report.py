"""Prints reports as Markdown tables, saves them as JSON, draws them as SVG, and runs the commands that make them.

matplotlib is in the dependency group `bench`; without it there are tables but no plots.
"""

import importlib
import importlib.util
import sys
from argparse import ArgumentParser
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from benchmarks.lib.machine import Machine

RESULTS = Path(__file__).parents[1] / "results"


class Report(Struct, frozen=True, kw_only=True):
    """The results of one benchmark.

    `settings`: its parameters; `samples`: every single sample, by keys that the benchmark chooses;
    `notes`: what a reader must know before quoting a figure.
    """

    name: str
    title: str
    machine: Machine
    settings: dict[str, Any]
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]
    samples: dict[str, Any]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        settings = ", ".join(f"{name} {_plain(value)}" for name, value in self.settings.items())
        notes = [f"- {note}" for note in self.notes]
        return "\n".join(
            [f"## {self.title}", "", table(self.header, self.rows), "", *notes, settings, self.machine.describe()]
        )


def save(report: Report, folder: Path = RESULTS) -> Path:
    """Write the report as `NAME.json`, which replaces an earlier one of that name."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{report.name}.json"
    path.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=1) + b"\n")
    return path


def publish(report: Report, folder: Path | None) -> None:
    """Print the report, and save it when there is a folder to save it in."""
    print(f"\n{report}", flush=True)
    if folder is not None:
        print(f"saved: {save(report, folder)}", flush=True)


def add_save_option(parser: ArgumentParser, *, by_default: bool = True) -> None:
    """Add `--no-save`, or `--save` where nothing is saved without it: `results` is a folder for `publish`, or None."""
    parser.add_argument(
        "--no-save" if by_default else "--save",
        dest="results",
        action="store_const",
        const=None if by_default else RESULTS,
        default=RESULTS if by_default else None,
    )


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table with aligned columns: the first to the left, the others to the right."""
    widths = [max(len(cell) for cell in column) for column in zip(header, *rows, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join(_line(cells, widths) for cells in (header, rule, *rows))


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    first, *rest = (
        cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(cells, widths, strict=True))
    )
    return f"| {' | '.join([first, *rest])} |"


def _plain(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


_COLOURS = ("#1b6ca8", "#9aa5b1", "#c98b4a", "#b5651d", "#7a8b55", "#8e6c8a", "#5f7470", "#c2b280")


def can_draw() -> bool:
    """Tell whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def draw_bars(path: Path, title: str, groups: Sequence[str], series: Mapping[str, Sequence[float]]) -> None:
    """Draw ratios to a base of 1: one group of bars for each workload and one colour for each program.

    Args:
        series: by program, one value a group; the first is ours.
    """
    figure, axes = _bars(title, groups, series)
    axes.axhline(1.0, color="#333333", linewidth=0.8)
    axes.set_ylabel("times as fast as the base")
    _finish(figure, axes, path)


def draw_seconds(path: Path, title: str, groups: Sequence[str], series: Mapping[str, Sequence[float | None]]) -> None:
    """Draw seconds on a logarithmic axis, each above its bar: one group of bars for each model.

    Args:
        series: by program, one value a group, None where it was not measured; the first is ours.
    """
    figure, axes = _bars(title, groups, series)
    for bars in axes.containers:
        axes.bar_label(bars, fmt=lambda seconds: f"{seconds:.2g}" if seconds else "", fontsize=6)
    axes.set_yscale("log")
    axes.set_ylabel("seconds")
    _finish(figure, axes, path, loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=2)


def draw_stacked(path: Path, title: str, groups: Sequence[str], series: Mapping[str, Sequence[float]]) -> None:
    """Draw seconds of steps on each other, one bar for each group."""
    figure, axes = _figure(title)
    below = [0.0] * len(groups)
    for number, (name, values) in enumerate(series.items()):
        axes.bar(range(len(groups)), values, 0.5, below, label=name, color=_colour(number))
        below = [before + value for before, value in zip(below, values, strict=True)]
    axes.set_xticks(range(len(groups)), groups)
    axes.set_ylabel("seconds")
    _finish(figure, axes, path)


def _bars(title: str, groups: Sequence[str], series: Mapping[str, Sequence[float | None]]) -> tuple[Any, Any]:
    figure, axes = _figure(title)
    width = 0.8 / len(series)
    for number, (name, values) in enumerate(series.items()):
        places = [place - 0.4 + (number + 0.5) * width for place in range(len(groups))]
        axes.bar(places, [value or 0.0 for value in values], width, label=name, color=_colour(number))
    axes.set_xticks(range(len(groups)), groups)
    return figure, axes


def draw_lines(path: Path, title: str, clients: Sequence[int], series: Mapping[str, Sequence[float]]) -> None:
    """Draw texts a second over the number of clients, one line for each server; the first is ours."""
    figure, axes = _figure(title)
    for number, (name, values) in enumerate(series.items()):
        axes.plot(clients, values, marker="o", label=name, color=_colour(number))
    axes.set_xscale("log", base=2)
    axes.set_xticks(clients, [str(number) for number in clients])
    axes.set_xlabel("clients")
    axes.set_ylabel("texts a second")
    axes.set_ylim(bottom=0)
    _finish(figure, axes, path)


def _colour(number: int) -> str:
    return _COLOURS[number % len(_COLOURS)]


def _figure(title: str) -> tuple[Any, Any]:
    # By name, because the type checker runs where matplotlib is not installed.
    matplotlib: Any = importlib.import_module("matplotlib")
    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "embedyard"  # the same figures give the same file
    pyplot: Any = importlib.import_module("matplotlib.pyplot")
    figure, axes = pyplot.subplots(figsize=(9, 4.5))
    axes.set_title(title, fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", linewidth=0.3)
    axes.set_axisbelow(True)
    return figure, axes


def _finish(figure: Any, axes: Any, path: Path, **legend: Any) -> None:
    axes.legend(frameon=False, fontsize=8, **legend)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
    importlib.import_module("matplotlib.pyplot").close(figure)


def run_command(commands: Mapping[str, Callable[[Sequence[str]], None]], argv: Sequence[str] | None = None) -> None:
    """Run the command that the first argument names, or the first command where none is named."""
    given = list(sys.argv[1:] if argv is None else argv)
    if given[:1] in (["-h"], ["--help"]):
        print(f"commands: {', '.join(commands)}; each has its own --help. The first one:\n")
    name = given.pop(0) if given and given[0] in commands else next(iter(commands))
    commands[name](given)
