"""Shows the progress of a run: a live table on a terminal, plain lines in a pipe, nothing with `--json`."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from router.loadgen.phases import Phase
from router.loadgen.report import Measured
from router.loadgen.results import Figures, Latency

if TYPE_CHECKING:
    from rich.live import Live
    from rich.table import Table

COLUMNS = ("load", "seconds", "requests", "texts/s", "tokens/s", "p50 ms", "p95 ms", "p99 ms", "errors")
NO_FIGURES = Figures(
    seconds=0.0, requests=0, failed=0, texts_per_s=0.0, tokens_per_s=None, latency_s=None, texts_each_s=()
)
_BLOCKS = " ▁▂▃▄▅▆▇█"
_SHOWN_S = 24


def cells(load: str, figures: Figures | Measured) -> tuple[str, ...]:
    """Format a row, in the order of `COLUMNS`."""
    tokens = "–" if figures.tokens_per_s is None else rate(figures.tokens_per_s)
    return (
        load,
        f"{figures.seconds:.1f}",
        str(figures.requests),
        rate(figures.texts_per_s),
        tokens,
        *percentiles(figures.latency_s),
        str(figures.failed),
    )


def rate(per_s: float) -> str:
    """Format a rate with about three significant digits."""
    return f"{per_s:.1f}" if per_s < 100 else f"{per_s:.0f}"


def percentiles(latency: Latency | None) -> tuple[str, str, str]:
    """Format p50, p95 and p99 in milliseconds."""
    if latency is None:
        return ("–", "–", "–")
    return milliseconds(latency.p50), milliseconds(latency.p95), milliseconds(latency.p99)


def milliseconds(seconds: float) -> str:
    """Format a latency in milliseconds."""
    return f"{1000 * seconds:.1f}" if seconds < 1 else f"{1000 * seconds:.0f}"


def spark(values: Sequence[int]) -> str:
    """Draw the last values as a line of block characters."""
    shown = values[-_SHOWN_S:]
    top = max(shown, default=0)
    return "".join(_BLOCKS[-(-value * (len(_BLOCKS) - 1) // top)] if top else _BLOCKS[0] for value in shown)


class NoProgress:
    """Shows nothing, for `--json`."""

    every_s = 60.0

    def begin(self, phase: Phase) -> None:
        """Do nothing."""

    def update(self, figures: Figures) -> None:
        """Do nothing."""

    def end(self, measured: Measured) -> None:
        """Do nothing."""


class Lines:
    """Prints lines, for a pipe: each phase's figures at its end, and a status line every few seconds.

    Args:
        print_result: receives the figures, tab-separated.
        print_status: receives status lines, which are not for programs.
    """

    every_s = 5.0

    def __init__(self, print_result: Callable[[str], None], print_status: Callable[[str], None]) -> None:
        self._print_result, self._print_status = print_result, print_status
        self._load = ""

    def begin(self, phase: Phase) -> None:
        self._load = str(phase)

    def update(self, figures: Figures) -> None:
        named = zip(COLUMNS[1:], cells(self._load, figures)[1:], strict=True)
        self._print_status(f"...  {self._load}: {', '.join(f'{name} {value}' for name, value in named)}")

    def end(self, measured: Measured) -> None:
        self._print_result("\t".join(cells(measured.load, measured)))


class LiveTable:
    """Shows a live table, for a terminal: one row per phase, with a sparkline of texts per second.

    Drawing takes about 5 ms of the sending loop: once per second, which does not affect a p99.
    """

    every_s = 1.0

    def __init__(self, live: "Live") -> None:
        self._live = live
        self._done: list[Measured] = []
        self._load = ""

    def begin(self, phase: Phase) -> None:
        self._load = str(phase)
        self.update(NO_FIGURES)  # the first drawing takes longest, so it happens before the load

    def update(self, figures: Figures) -> None:
        self._live.update(self._table(figures), refresh=True)

    def end(self, measured: Measured) -> None:
        self._done.append(measured)
        self._live.update(self._table(None), refresh=True)

    def _table(self, figures: Figures | None) -> "Table":
        from rich.table import Table

        table = Table(box=None, pad_edge=False, header_style="bold")
        table.add_column(COLUMNS[0], no_wrap=True)
        for name in COLUMNS[1:]:
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("texts in each second", no_wrap=True, style="cyan")
        for each in self._done:
            each_s = [moment.texts for moment in each.timeline]
            table.add_row(*cells(each.load, each), spark(each_s), style="red" if each.failed else "")
        if figures is not None:
            table.add_row(*cells(self._load, figures), spark(figures.texts_each_s), style="bold")
        return table
