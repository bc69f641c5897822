"""Plots for the README, as SVG. matplotlib is of the group `bench`: without it there are tables and no plots."""

import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_COLOURS = ("#1b6ca8", "#9aa5b1", "#c98b4a", "#b5651d", "#7a8b55", "#8e6c8a", "#5f7470", "#c2b280")


def is_available() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def bars(path: Path, title: str, groups: Sequence[str], series: Mapping[str, Sequence[float]]) -> None:
    """Ratios to a base of 1, one group of bars for each workload and one colour for each program.

    Args:
        series: by program, one value a group; the first is ours.
    """
    figure, axes = _figure(title)
    width = 0.8 / len(series)
    for number, (name, values) in enumerate(series.items()):
        places = [place - 0.4 + (number + 0.5) * width for place in range(len(groups))]
        axes.bar(places, values, width, label=name, color=_colour(number))
    axes.axhline(1.0, color="#333333", linewidth=0.8)
    axes.set_xticks(range(len(groups)), groups)
    axes.set_ylabel("times as fast as the base")
    _finish(figure, axes, path)


def lines(path: Path, title: str, clients: Sequence[int], series: Mapping[str, Sequence[float]]) -> None:
    """Texts a second over the number of clients, one line for each server; the first is ours."""
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


def _finish(figure: Any, axes: Any, path: Path) -> None:
    axes.legend(frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
    importlib.import_module("matplotlib.pyplot").close(figure)
