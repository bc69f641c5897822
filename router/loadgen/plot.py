"""Plots a run: throughput and latencies per second, phase after phase. Needs matplotlib."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec import Struct

from router.loadgen.report import Measured, Report
from router.loadgen.results import Latency, Moment

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NOT_INSTALLED = "no plot written: matplotlib is not installed (pip install 'embedyard[bench]')"

_INK, _SOFT, _ACCENT, _BAD, _LINE = "#1c211f", "#5b6661", "#1f6f5c", "#a5342b", "#e0e4e1"
_LINES = (("p50", _ACCENT, 1.8), ("p95", "#c98b4a", 1.4), ("p99", "#8e6c8a", 1.2))


class PlotError(Exception):
    """The plot cannot be drawn; the message has the remedy."""


class _Span(Struct, frozen=True):
    """One phase on the time axis."""

    measured: Measured
    start_s: int

    @property
    def end_s(self) -> int:
        return self.start_s + max(1, len(self.measured.timeline))

    def times(self) -> list[float]:
        return [self.start_s + moment.at_s + 0.5 for moment in self.measured.timeline]


def draw(report: Report, path: Path) -> None:
    """Draw the report and write a PNG.

    Raises:
        PlotError: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise PlotError(NOT_INSTALLED) from None
    spans = list(_layout_phases(report.phases))
    figure = Figure(figsize=(10, 6), layout="constrained", facecolor="white")
    upper, lower = figure.subplots(2, 1, sharex=True)
    figure.suptitle(_title(report), fontsize=12, color=_INK, x=0.02, ha="left")
    for axes in (upper, lower):
        _style_axes(axes, spans)
    _throughput(upper, spans, report.texts_per_request)
    _latencies(lower, spans)
    _add_legend(figure)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _title(report: Report) -> str:
    texts = "1 text" if report.texts_per_request == 1 else f"{report.texts_per_request} texts"
    return f"{report.model} at {report.url}, {texts} a request"


def _layout_phases(phases: Sequence[Measured]) -> Iterator[_Span]:
    start_s = 0
    for measured in phases:
        span = _Span(measured, start_s)
        yield span
        start_s = span.end_s


def _style_axes(axes: "Axes", spans: Sequence[_Span]) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", linewidth=0.6, color=_LINE)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_SOFT, labelsize=9)
    axes.set_xlim(0, spans[-1].end_s if spans else 1)
    for span in spans[1:]:
        axes.axvline(span.start_s, color=_SOFT, linewidth=0.7, linestyle=":")


def _throughput(axes: "Axes", spans: Sequence[_Span], texts_per_request: int) -> None:
    """Draw bars of answered texts, failed ones on top, and a dashed line at the requested rate."""
    for span in spans:
        times, answered = span.times(), [moment.texts for moment in span.measured.timeline]
        failed = [moment.failed * texts_per_request for moment in span.measured.timeline]
        axes.bar(times, answered, 0.9, color=_ACCENT, alpha=0.85, label="answered")
        if any(failed):
            axes.bar(times, failed, 0.9, bottom=answered, color=_BAD, label="failed")
        if span.measured.requests_per_s:
            requested = span.measured.requests_per_s * texts_per_request
            axes.hlines(requested, span.start_s, span.end_s, color=_INK, linewidth=1, linestyle="--", label="asked for")
        axes.annotate(
            span.measured.load, (span.start_s, 1.0), (4, 4), xycoords=("data", "axes fraction"),
            textcoords="offset points", fontsize=9, color=_SOFT,
        )  # fmt: skip
    axes.set_ylabel("texts in a second", color=_SOFT, fontsize=9)
    axes.set_ylim(bottom=0)


def _latencies(axes: "Axes", spans: Sequence[_Span]) -> None:
    from matplotlib.ticker import LogFormatter

    for name, colour, width in _LINES:
        for span in spans:
            values = [_value(moment, name) for moment in span.measured.timeline]
            axes.plot(span.times(), values, marker=".", color=colour, linewidth=width, label=name)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1.5, 0.5)))  # labels only while there are few ticks
    axes.set_ylabel("latency in ms", color=_SOFT, fontsize=9)
    axes.set_xlabel("seconds", color=_SOFT, fontsize=9)


def _add_legend(figure: "Figure") -> None:
    """Add the legend below the plots, with each label once."""
    by_label = {
        label: handle for axes in figure.axes for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        list(by_label.values()),
        list(by_label),
        loc="outside lower center",
        ncols=6,
        frameon=False,
        fontsize=9,
        labelcolor=_SOFT,
    )


def _value(moment: Moment, name: str) -> float:
    """Return milliseconds; NaN, which breaks the line, where nothing was answered."""
    latency: Latency | None = moment.latency_s
    return float("nan") if latency is None else 1000 * float(getattr(latency, name))
