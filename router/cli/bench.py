"""`embedyard bench`: load-tests a running OpenAI-compatible server."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import click
from msgspec import Struct

from router.cli.output import is_terminal
from router.config.setting_values import is_loopback
from router.config.settings import SettingsError, load_settings
from router.version import embedyard_version

if TYPE_CHECKING:
    from router.loadgen import Phase
    from router.loadgen.http_client import Route, Target
    from router.loadgen.report import Measured, Report
    from router.loadgen.session import Progress

EXIT_FAILED = 1
EXIT_INVALID = 2
EXIT_INTERRUPTED = 130
"""Exit codes: a bound was exceeded; nothing could be measured; interrupted by Ctrl+C."""

_DEFAULT_RATE = 10.0
_CLIENT_BOUND = "the client was the bottleneck ({:.2f} cores, {:.0f} ms late): the figures are a lower bound"


class BenchOptions(Struct, frozen=True, kw_only=True):
    """The options of the command, see `--help`."""

    url: str
    route: "Route"
    model: str | None
    api_key: str | None
    rates: tuple[float, ...]
    clients: tuple[int, ...]
    seconds: float
    texts: int
    words: int
    file: Path | None
    dimensions: int | None
    input_type: str | None
    encoding_format: str
    timeout: float
    max_p95: float | None
    max_errors: float
    report: Path
    no_report: bool
    as_json: bool

    @property
    def phases(self) -> "list[Phase]":
        """The load phases, in order."""
        from router.loadgen import Phase

        rates = self.rates or (() if self.clients else (_DEFAULT_RATE,))
        return [*(Phase(per_s=rate) for rate in rates), *(Phase(clients=number) for number in self.clients)]

    @property
    def fields(self) -> dict[str, object]:
        """Extra fields of every request."""
        given = {"dimensions": self.dimensions, "input_type": self.input_type}
        if self.route != "embeddings" and any(value is not None for value in given.values()):
            raise click.UsageError("--dimensions and --input-type are fields of --route embeddings")
        return {name: value for name, value in given.items() if value is not None}

    def is_within_bounds(self, phase: "Measured") -> bool:
        """Whether a phase stayed within the bounds."""
        if phase.latency_s is None or 100 * phase.failed > self.max_errors * phase.requests:
            return False
        return self.max_p95 is None or 1000 * phase.latency_s.p95 <= self.max_p95


@click.command(
    epilog="""
\b
Examples:
  embedyard bench http://127.0.0.1:6008                      10 requests per second for 10 seconds
  embedyard bench URL --rate 20 --rate 40 --rate 80          find the saturation point
  embedyard bench URL --clients 32 --texts 16                32 clients, each waiting for its response
  embedyard bench URL --rate 50 --max-p95 100 && ./deploy    exit code 1 when p95 is above 100 ms
  embedyard bench URL --route rerank --texts 100             rank 100 documents per request
  embedyard bench URL --json | jq '.phases[].latency_s.p99'
"""
)
@click.argument("url", metavar="URL")
@click.option("--route", type=click.Choice(["embeddings", "rerank", "score"]), default="embeddings", show_default=True,
              help="Route below /v1. Rerank and score: a request has one query, and --texts documents.")  # fmt: skip
@click.option("--model", help="Model id. Default: the first one listed by the server.")
@click.option("--api-key", metavar="KEY", help="Default: API_KEY from the settings, for servers on this machine.")
@click.option("--rate", "rates", type=click.FloatRange(0, min_open=True), multiple=True, metavar="N",
              help="Requests per second at random times, whether or not the server keeps up. Repeatable: one phase "
                   "each. Default: 10.")  # fmt: skip
@click.option("--clients", type=click.IntRange(1), multiple=True, metavar="N",
              help="Number of clients, each waiting for its response. Repeatable; run after the rates.")  # fmt: skip
@click.option("--seconds", type=click.FloatRange(0, min_open=True), default=10.0, show_default=True,
              help="Duration of each phase.")  # fmt: skip
@click.option("--texts", type=click.IntRange(1), default=1, show_default=True, help="Texts per request.")
@click.option("--words", type=click.IntRange(1), default=12, show_default=True, help="Words per text.")
@click.option("--file", type=click.Path(path_type=Path, dir_okay=False), help="File with texts, one per line.")
@click.option("--dimensions", type=click.IntRange(1), help="`dimensions` of the requests.")
@click.option("--input-type", help="`input_type` of the requests: query or document.")
@click.option("--format", "encoding_format", type=click.Choice(["base64", "float"]), default="base64",
              show_default=True, help="`encoding_format` of the vectors.")  # fmt: skip
@click.option("--timeout", type=click.FloatRange(0, min_open=True), default=60.0, show_default=True, metavar="SECONDS",
              help="Timeout of a request.")  # fmt: skip
@click.option("--max-p95", type=click.FloatRange(0), metavar="MS", help="Exit with code 1 when a p95 exceeds MS.")
@click.option("--max-errors", type=click.FloatRange(0, 100), default=0.0, show_default=True, metavar="PERCENT",
              help="Exit with code 1 when more of a phase's requests fail.")  # fmt: skip
@click.option("--report", type=click.Path(path_type=Path), default="embedyard-bench", show_default=True, metavar="PATH",
              help="Write PATH.json and PATH.png.")  # fmt: skip
@click.option("--no-report", is_flag=True, help="Write no report.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def command(**options: Any) -> None:
    """Load-test the OpenAI-compatible server at URL.

    Latency is measured from the time a request was due, so that a stalling server cannot hide it. A warm-up request
    loads the model and is not counted.

    Exit code 0: every phase stayed within the bounds; 1: one did not; 2: nothing could be measured; 130: interrupted by
    Ctrl+C, the report has the measurements until then.
    """
    chosen = BenchOptions(**options)
    from router.loadgen import run
    from router.loadgen.report import as_json
    from router.loadgen.requests import CannotMeasure

    try:
        _allow_many_connections()
        report = run(lambda: _run_bench(chosen))
    except (CannotMeasure, SettingsError) as error:
        click.echo(str(error), err=True)
        raise SystemExit(EXIT_INVALID) from None
    if chosen.as_json:
        click.echo(as_json(report))
    _print_failures(report.phases)
    if not chosen.no_report:
        _save(report, chosen.report)
    if not report.is_whole:
        raise SystemExit(EXIT_INTERRUPTED)
    if not all(map(chosen.is_within_bounds, report.phases)):
        raise SystemExit(EXIT_FAILED)


def _allow_many_connections() -> None:
    """Raise the limit of open files: an open load needs a connection per unanswered request, often more than 1024."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _own_key(url: str) -> str | None:
    """Return the key from the settings for a server on this machine; other servers must not see it."""
    return load_settings().api_key if is_loopback(urlsplit(url).hostname or "") else None


async def _run_bench(chosen: BenchOptions) -> "Report":
    from router.loadgen.http_client import Target, encode
    from router.loadgen.report import Report, now
    from router.loadgen.requests import make_texts, resolve_model, warm_up
    from router.loadgen.session import Job, measure

    key = chosen.api_key or _own_key(chosen.url)
    target = resolve_model(Target(chosen.url, chosen.model or "", key, chosen.timeout, chosen.route))
    num_queries = 0 if chosen.route == "embeddings" else 1
    texts = make_texts(chosen.texts + num_queries, chosen.words, chosen.file)
    requests = [encode(target, call, chosen.encoding_format, **chosen.fields) for call in texts]
    started_at, dimensions = now(), await warm_up(target, requests[0])
    with _open_progress(chosen, target, dimensions) as progress:
        phases, is_whole = await measure(Job(target, requests, chosen.phases, chosen.seconds), progress)
    return Report(
        url=chosen.url,
        model=target.model,
        route=target.route,
        dimensions=dimensions,
        texts_per_request=chosen.texts,
        words=None if chosen.file else chosen.words,
        started_at=started_at,
        embedyard=embedyard_version(),
        is_whole=is_whole,
        phases=phases,
    )


@contextmanager
def _open_progress(chosen: BenchOptions, target: "Target", dimensions: int | None) -> "Iterator[Progress]":
    from router.loadgen.progress import Lines, LiveTable, NoProgress

    if chosen.as_json:
        yield NoProgress()
    elif not is_terminal():
        yield Lines(click.echo, lambda line: click.echo(line, err=True))
    else:
        from rich.console import Console  # only for a terminal: importing it is slow
        from rich.live import Live

        console = Console()
        what = target.route if dimensions is None else f"{dimensions} dimensions"
        heading = f"{target.model} at {target.url}: {chosen.texts} texts per request, {what}"
        console.print(heading, markup=False, highlight=False)
        with Live(console=console, auto_refresh=False) as live:
            yield LiveTable(live)


def _print_failures(phases: "Sequence[Measured]") -> None:
    """Print failures, and warn when the client was the bottleneck."""
    for phase in phases:
        for kind, failure in phase.failures.items():
            click.echo(f"{phase.load}: {failure.count} × {kind}: {failure.message}", err=True)
        if phase.is_client_bound:
            click.echo(
                f"{phase.load}: {_CLIENT_BOUND.format(phase.client_cores, 1000 * phase.client_late_p99_s)}", err=True
            )


def _save(report: "Report", stem: Path) -> None:
    """Write both files; a missing plot is not an error."""
    from router.loadgen.plot import PlotError, draw
    from router.loadgen.report import save

    json_path, png_path = stem.with_name(f"{stem.name}.json"), stem.with_name(f"{stem.name}.png")
    try:
        save(report, json_path)
        click.echo(f"report: {json_path}", err=True)
        draw(report, png_path)
        click.echo(f"plot: {png_path}", err=True)
    except PlotError as error:
        click.echo(str(error), err=True)
    except OSError as error:
        click.echo(f"{stem} cannot be written: {error.strerror}; choose another path with --report", err=True)
        raise SystemExit(EXIT_INVALID) from None
