"""`embedyard replay`: replays a day's requests with other budgets, orders of eviction and pinned models."""

import gzip
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

import click
import msgspec
from cronsim import CronSim, CronSimError
from msgspec import Struct

from engines.spec import Eviction
from engines.trace import MAX_LINE_BYTES, Trace, read_trace
from engines.types import format_bytes
from router.cli.output import print_rows
from router.config.quantities import parse_bytes

if TYPE_CHECKING:
    from engines.replay import ReplayResult

EXIT_INVALID = 2
"""Exit code: invalid command, trace or file."""

COLUMNS = (
    "budget", "host memory", "policy", "loads", "reloads", "wakes", "waited", "p95 of cold waits", "failed"
)  # fmt: skip
POLICIES: tuple[Eviction, ...] = ("lru", "cost")
_NOT_INSTALLED = "no plot written: matplotlib is not installed (pip install 'embedyard[bench]')"
_MAX_BUDGETS = 16
_MAX_REPLAYS = 64
_MAX_TIMES = 10_000
"""Times of one schedule within a trace: a year of every hour."""


class ReplayCommand(Struct, frozen=True, kw_only=True):
    """The options of the command, as they were given."""

    budgets: str | None
    host_memory: str
    policy: str
    pin: tuple[str, ...]
    warm: tuple[str, ...]
    preload_at: tuple[str, ...]
    copy_rate: str
    disk_rate: str
    plot: Path | None
    as_json: bool


class ReplayRow(Struct, frozen=True, kw_only=True):
    """The result of one replay. Times in seconds; `cold_p95_s`: of the requests that waited for their model.

    `reloads`: from disk; `wakes`: from main memory.
    """

    budget_bytes: int
    host_memory_bytes: int
    policy: Eviction
    requests: int
    loads: int
    reloads: int
    wakes: int
    waited_s: float
    cold_p95_s: float
    failed: int
    peak_bytes: int
    host_peak_bytes: int


@click.command(
    epilog="""
\b
Examples:
  REPLAY_TRACE=day.jsonl embedyard serve       write a trace while serving
  embedyard replay day.jsonl                   the day again, with half of the memory that it would need, and with all
  embedyard replay day.jsonl --budget 24GiB,48GiB --policy cost --pin bge-m3
  embedyard replay day.jsonl --budget 24GiB --host-memory 0,64GiB --plot day.png
  embedyard replay day.jsonl --warm bge-m3 --preload-at "reranker=0 8 * * 1-5"
"""
)
@click.argument("trace", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--budget", "budgets", help="Memory of the device, several with commas, as in 24GiB,48GiB.")
@click.option(
    "--host-memory", default="0", show_default=True, help="Main memory for parked models, several with commas."
)
@click.option("--policy", default="lru,cost", show_default=True, help="Orders of eviction: lru, cost or both.")
@click.option("--pin", multiple=True, metavar="MODEL", help="A model that never leaves; may be repeated.")
@click.option("--warm", multiple=True, metavar="MODEL", help="Load it before the first request; may be repeated.")
@click.option(
    "--preload-at", multiple=True, metavar="MODEL=CRON", help="Load it at these times, local ones; may be repeated."
)
@click.option(
    "--copy-rate", default="10GB", show_default=True, help="Bytes a second to and from main memory, where unknown."
)
@click.option("--disk-rate", default="2GB", show_default=True, help="Bytes a second from disk, where unknown.")
@click.option("--plot", type=click.Path(path_type=Path), help="Draw the table as a PNG or SVG.")
@click.option("--json", "as_json", is_flag=True, help="Print the results as JSON.")
def command(trace: Path, **options: Any) -> None:
    """Replay the requests of TRACE in virtual time, and print what they would have waited.

    The pool's own rules decide; loads and requests take as long as they did. Nothing is loaded. Exit code 0: replayed;
    2: invalid options, trace or file.
    """
    asked = ReplayCommand(**options)
    try:
        found = _described(read_file(trace))
        replays = Replays(found, asked)
        rows = replays.rows()
        if asked.plot is not None:
            draw(rows, asked.plot)
        if asked.as_json:
            click.echo(msgspec.json.format(msgspec.json.encode(rows), indent=2))
            return
        print_rows(COLUMNS, [_cells(row) for row in rows])
        for line in replays.needs():
            click.echo(line, err=True)
    except (ValueError, OSError) as error:
        click.echo(str(error), err=True)
        raise SystemExit(EXIT_INVALID) from None


class Replays:
    """All replays of one trace that a command asks for.

    Raises:
        ValueError: an option is not valid.
    """

    def __init__(self, trace: Trace, asked: ReplayCommand) -> None:
        self._trace = trace
        self._budgets = _budgets(asked.budgets, trace)
        self._host_budgets = _sizes(asked.host_memory, "--host-memory", zero=True)
        self._policies = _policies(asked.policy)
        num_replays = len(self._budgets) * len(self._host_budgets) * len(self._policies)
        if num_replays > _MAX_REPLAYS:
            raise ValueError(f"{num_replays} combinations, and at most {_MAX_REPLAYS} are replayed at once")
        _check_models((*asked.pin, *asked.warm), trace)
        self._pins, self._warm = asked.pin, asked.warm
        self._preloads = sorted(time for text in asked.preload_at for time in _preloads(text, trace))
        self._copy_rate, self._disk_rate = _rate(asked.copy_rate, "--copy-rate"), _rate(asked.disk_rate, "--disk-rate")

    def rows(self) -> list[ReplayRow]:
        """Replay every combination."""
        return [
            self._run(budget, host_budget, policy)
            for budget in self._budgets
            for host_budget in self._host_budgets
            for policy in self._policies
        ]

    def needs(self) -> Iterator[str]:
        """Say how much memory the day would have needed, so that no model is loaded from disk twice."""
        needed = format_bytes(self._trace.resident_bytes)
        yield f"this day would have needed {needed} on the device for no reload"
        if any(self._host_budgets):
            unbounded = sum(model.weight_bytes for model in self._trace.models.values())
            for budget in self._budgets:
                peak = self._run(budget, unbounded, self._policies[0]).host_peak_bytes
                yield f"or {format_bytes(budget)} on the device and {format_bytes(peak)} of main memory"

    def _run(self, budget_bytes: int, host_bytes: int, policy: Eviction) -> ReplayRow:
        from engines.replay import PoolPolicy, ReplayOptions, TierRates, replay  # late: the other commands need no pool

        label = f"{format_bytes(budget_bytes)}, {format_bytes(host_bytes)}, {policy}"
        with _progress(label, len(self._trace.requests)) as on_progress:
            result = replay(
                self._trace,
                budget_bytes=budget_bytes,
                rules=PoolPolicy(eviction=policy),
                pinned=self._pins,
                options=ReplayOptions(
                    host_budget_bytes=host_bytes,
                    warm=self._warm,
                    preloads=self._preloads,
                    rates=TierRates(copy_bytes_per_s=self._copy_rate, disk_bytes_per_s=self._disk_rate),
                ),
                on_progress=on_progress,
            )
        return row_of(result, budget_bytes, host_bytes, policy)


def read_file(path: Path) -> Trace:
    """Read a trace, compressed with gzip if the name ends in `.gz`.

    Raises:
        ValueError: a line is no record.
        OSError: the file cannot be read.
    """
    with cast(IO[bytes], gzip.open(path) if path.suffix == ".gz" else path.open("rb")) as file:  # it is one
        return read_trace(iter(lambda: file.readline(MAX_LINE_BYTES), b""))


def _described(trace: Trace) -> Trace:
    """Leave out the requests for models whose size the trace does not have, and say so."""
    known = [request for request in trace.requests if request.model_id in trace.models]
    if not known:
        raise ValueError("the trace has no request for a model that was in memory: nothing to replay")
    if left_out := len(trace.requests) - len(known):
        requests = "1 request is" if left_out == 1 else f"{left_out} requests are"
        click.echo(f"{requests} left out: the model was never in memory", err=True)
    return Trace(trace.models, known)


def _check_models(model_ids: Sequence[str], trace: Trace) -> None:
    for model_id in model_ids:
        if model_id not in trace.models:
            raise ValueError(f"the trace has no model {model_id!r}; it has {', '.join(sorted(trace.models))}")


def _budgets(text: str | None, trace: Trace) -> list[int]:
    if text is None:
        largest = max(model.weight_bytes + model.workspace_bytes for model in trace.models.values())
        return sorted({max(largest, trace.resident_bytes // 2), trace.resident_bytes})
    return _sizes(text, "--budget")


def _sizes(text: str, option: str, *, zero: bool = False) -> list[int]:
    try:
        found = [parse_bytes(part.strip()) for part in text.split(",")]
    except ValueError as error:
        raise ValueError(f"{option} is {text!r}, but must be {error}") from None
    if len(found) > _MAX_BUDGETS:
        raise ValueError(f"{len(found)} budgets, and at most {_MAX_BUDGETS} are replayed at once")
    if not zero and 0 in found:
        raise ValueError(f"{option} is {text!r}, but must be more than 0")
    return found


def _rate(text: str, option: str) -> float:
    return float(_sizes(text.removesuffix("/s"), option)[0])


def _policies(text: str) -> list[Eviction]:
    names = [part.strip() for part in text.split(",")]
    for name in names:
        if name not in POLICIES:
            raise ValueError(f"{name!r} is no order of eviction: {' or '.join(POLICIES)}")
    return [cast(Eviction, name) for name in names]


def _preloads(text: str, trace: Trace) -> Iterator[tuple[float, str]]:
    """Yield the times of `MODEL=CRON` during the trace, as Unix times, with the model."""
    model_id, _, words = text.rpartition("=")
    _check_models([model_id], trace)
    try:
        first, last = (datetime.fromtimestamp(trace.requests[at].at_s) for at in (0, -1))  # local, as cron's
        times = CronSim(words, first)
        for _ in range(_MAX_TIMES):
            at = next(times)
            if at > last:
                return
            yield at.timestamp(), model_id
    except (CronSimError, StopIteration, OverflowError):
        raise ValueError(f"--preload-at is {text!r}, but must be MODEL=CRON, as in bge-m3=0 8 * * 1-5") from None
    raise ValueError(f"--preload-at is {text!r}: more than {_MAX_TIMES} times in this trace")


def row_of(result: "ReplayResult", budget_bytes: int, host_bytes: int, policy: Eviction) -> ReplayRow:
    """Return the row of a result."""
    return ReplayRow(
        budget_bytes=budget_bytes,
        host_memory_bytes=host_bytes,
        policy=policy,
        requests=result.requests,
        loads=result.loads,
        reloads=result.reloads,
        wakes=result.wakes,
        waited_s=round(result.waited_s, 3),
        cold_p95_s=round(result.cold_wait_s(0.95), 3),
        failed=result.failed,
        peak_bytes=result.peak_bytes,
        host_peak_bytes=result.host_peak_bytes,
    )


@contextmanager
def _progress(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show a bar on a terminal."""
    if not sys.stderr.isatty():
        yield lambda done: None
        return
    with click.progressbar(length=total, label=label, file=sys.stderr) as bar:
        yield lambda done: bar.update(done - bar.pos)


def _cells(row: ReplayRow) -> tuple[str, ...]:
    return (
        format_bytes(row.budget_bytes),
        format_bytes(row.host_memory_bytes),
        row.policy,
        f"{row.loads}",
        f"{row.reloads}",
        f"{row.wakes}",
        f"{row.waited_s:,.1f} s",
        f"{row.cold_p95_s:.2f} s",
        f"{row.failed}",
    )


def draw(rows: Sequence[ReplayRow], path: Path) -> None:
    """Draw the seconds waited and the reloads against the budget, a line for each order of eviction and host budget.

    Raises:
        ValueError: matplotlib is not installed, or does not write files of this kind.
        OSError: the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError(_NOT_INSTALLED) from None
    figure = Figure(figsize=(9, 4), layout="constrained", facecolor="white")
    waits, reloads = figure.subplots(1, 2)
    has_host = any(row.host_memory_bytes for row in rows)
    for policy, host_bytes in dict.fromkeys((row.policy, row.host_memory_bytes) for row in rows):
        line = [row for row in rows if (row.policy, row.host_memory_bytes) == (policy, host_bytes)]
        line.sort(key=lambda row: row.budget_bytes)
        budgets = [row.budget_bytes / 2**30 for row in line]
        label = f"{policy}, {format_bytes(host_bytes)} of main memory" if has_host else policy
        look: dict[str, Any] = {"marker": "o", "label": label, "linestyle": "-" if host_bytes == 0 else "--"}
        waits.plot(budgets, [row.waited_s for row in line], **look)
        reloads.plot(budgets, [row.reloads for row in line], **look)
    for axes, title in ((waits, "seconds that requests waited for models"), (reloads, "reloads from disk")):
        _style(axes, title)
    figure.savefig(path, dpi=120)


def _style(axes: Any, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xlabel("budget of the device, GiB")
    axes.set_ylim(bottom=0)
    axes.grid(visible=True, alpha=0.3)
    axes.legend(frameon=False)
