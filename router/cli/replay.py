"""`embedyard replay`: replays a day's requests with other budgets, orders of eviction and pinned models."""

import gzip
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

import click
import msgspec
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

COLUMNS = ("budget", "policy", "loads", "reloads", "waited", "p95 of cold waits", "failed")
POLICIES: tuple[Eviction, ...] = ("lru", "cost")
_NOT_INSTALLED = "no plot written: matplotlib is not installed (pip install 'embedyard[bench]')"
_MAX_BUDGETS = 16


class ReplayRow(Struct, frozen=True, kw_only=True):
    """The result of one replay. Times in seconds; `cold_p95_s`: of the requests that waited for a load."""

    budget_bytes: int
    policy: Eviction
    requests: int
    loads: int
    reloads: int
    waited_s: float
    cold_p95_s: float
    failed: int
    peak_bytes: int


@click.command(
    epilog="""
\b
Examples:
  REPLAY_TRACE=day.jsonl embedyard serve       write a trace while serving
  embedyard replay day.jsonl                   the day again, with half of the memory that it would need, and with all
  embedyard replay day.jsonl --budget 24GiB,48GiB --policy cost --pin bge-m3
  embedyard replay day.jsonl --plot day.png
"""
)
@click.argument("trace", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--budget", "budgets", help="Memory of the device, several with commas, as in 24GiB,48GiB.")
@click.option("--policy", default="lru,cost", show_default=True, help="Orders of eviction: lru, cost or both.")
@click.option("--pin", multiple=True, metavar="MODEL", help="A model that never leaves; may be repeated.")
@click.option("--plot", type=click.Path(path_type=Path), help="Draw the table as a PNG or SVG.")
@click.option("--json", "as_json", is_flag=True, help="Print the results as JSON.")
def command(
    trace: Path, *, budgets: str | None, policy: str, pin: tuple[str, ...], plot: Path | None, as_json: bool
) -> None:
    """Replay the requests of TRACE in virtual time, and print what they would have waited.

    The pool's own rules decide; loads and requests take as long as they did. Nothing is loaded. Exit code 0: replayed;
    2: invalid options, trace or file.
    """
    try:
        found = _described(read_file(trace))
        _check_pins(pin, found)
        rows = [
            _run(found, budget, cast(Eviction, name), pin)
            for budget in _budgets(budgets, found)
            for name in _policies(policy)
        ]
        if plot is not None:
            draw(rows, plot)
    except (ValueError, OSError) as error:
        click.echo(str(error), err=True)
        raise SystemExit(EXIT_INVALID) from None
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(rows), indent=2))
        return
    print_rows(COLUMNS, [_cells(row) for row in rows])
    need = found.resident_bytes
    click.echo(f"with {format_bytes(need)} no model would have been loaded twice", err=True)


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


def _check_pins(pins: Sequence[str], trace: Trace) -> None:
    for model_id in pins:
        if model_id not in trace.models:
            raise ValueError(f"the trace has no model {model_id!r}; it has {', '.join(sorted(trace.models))}")


def _budgets(text: str | None, trace: Trace) -> list[int]:
    if text is None:
        largest = max(model.weight_bytes + model.workspace_bytes for model in trace.models.values())
        return sorted({max(largest, trace.resident_bytes // 2), trace.resident_bytes})
    try:
        found = [parse_bytes(part.strip()) for part in text.split(",")]
    except ValueError as error:
        raise ValueError(f"--budget is {text!r}, but must be {error}") from None
    if len(found) > _MAX_BUDGETS:
        raise ValueError(f"{len(found)} budgets, and at most {_MAX_BUDGETS} are replayed at once")
    return found


def _policies(text: str) -> list[str]:
    names = [part.strip() for part in text.split(",")]
    for name in names:
        if name not in POLICIES:
            raise ValueError(f"{name!r} is no order of eviction: {' or '.join(POLICIES)}")
    return names


def _run(trace: Trace, budget_bytes: int, policy: Eviction, pins: Sequence[str]) -> ReplayRow:
    from engines.replay import PoolPolicy, replay  # late: the other commands need no pool

    with _progress(f"{format_bytes(budget_bytes)}, {policy}", len(trace.requests)) as on_progress:
        result = replay(
            trace,
            budget_bytes=budget_bytes,
            rules=PoolPolicy(eviction=policy),
            pinned=pins,
            on_progress=on_progress,
        )
    return row_of(result, budget_bytes, policy)


def row_of(result: "ReplayResult", budget_bytes: int, policy: Eviction) -> ReplayRow:
    """Return the row of a result."""
    return ReplayRow(
        budget_bytes=budget_bytes,
        policy=policy,
        requests=result.requests,
        loads=result.loads,
        reloads=result.reloads,
        waited_s=round(result.waited_s, 3),
        cold_p95_s=round(result.cold_wait_s(0.95), 3),
        failed=result.failed,
        peak_bytes=result.peak_bytes,
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
        row.policy,
        f"{row.loads}",
        f"{row.reloads}",
        f"{row.waited_s:,.1f} s",
        f"{row.cold_p95_s:.1f} s",
        f"{row.failed}",
    )


def draw(rows: Sequence[ReplayRow], path: Path) -> None:
    """Draw the seconds waited and the reloads against the budget, a line for each order of eviction.

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
    for policy in dict.fromkeys(row.policy for row in rows):
        chosen = sorted((row for row in rows if row.policy == policy), key=lambda row: row.budget_bytes)
        budgets = [row.budget_bytes / 2**30 for row in chosen]
        waits.plot(budgets, [row.waited_s for row in chosen], marker="o", label=policy)
        reloads.plot(budgets, [row.reloads for row in chosen], marker="o", label=policy)
    for axes, title in ((waits, "seconds that requests waited for models"), (reloads, "reloads")):
        _style(axes, title)
    figure.savefig(path, dpi=120)


def _style(axes: Any, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xlabel("budget, GiB")
    axes.set_ylim(bottom=0)
    axes.grid(visible=True, alpha=0.3)
    axes.legend(frameon=False)
