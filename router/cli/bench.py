"""`embedyard bench`: how a running server, ours or another, holds up under load."""

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
    from router.loadgen.http_client import Target
    from router.loadgen.report import Measured, Report
    from router.loadgen.session import Screen

FAILED = 1
MISTAKES = 2
INTERRUPTED = 130
"""Exit codes: a bound was exceeded; nothing could be measured; Ctrl+C ended it early."""

_DEFAULT_RATE = 10.0


_BUSY = "this client was the bottleneck ({:.2f} cores, {:.0f} ms late): take the figures as the least the server can do"


class Asked(Struct, frozen=True, kw_only=True):
    """The options, as they are described in `--help`."""

    url: str
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
        """The loads, in their order."""
        from router.loadgen import Phase

        rates = self.rates or (() if self.clients else (_DEFAULT_RATE,))
        return [*(Phase(per_s=rate) for rate in rates), *(Phase(clients=number) for number in self.clients)]

    @property
    def fields(self) -> dict[str, object]:
        """Of every request, beside the model and its input."""
        given = {"dimensions": self.dimensions, "input_type": self.input_type}
        return {name: value for name, value in given.items() if value is not None}

    def is_met_by(self, phase: "Measured") -> bool:
        """Whether a load stayed within the bounds."""
        if phase.latency_s is None or 100 * phase.failed > self.max_errors * phase.requests:
            return False
        return self.max_p95 is None or 1000 * phase.latency_s.p95 <= self.max_p95


@click.command(
    epilog="""
\b
Examples:
  embedyard bench http://127.0.0.1:6008                      10 requests a second for 10 seconds
  embedyard bench URL --rate 20 --rate 40 --rate 80          where does it stop keeping up?
  embedyard bench URL --clients 32 --texts 16                32 clients, each waiting for its answer
  embedyard bench URL --rate 50 --max-p95 100 && ./deploy    exit code 1 when p95 is above 100 ms
  embedyard bench URL --json | jq '.phases[].latency_s.p99'
"""
)
@click.argument("url", metavar="URL")
@click.option("--model", help="As the server calls it. Default: the first that it lists.")
@click.option("--api-key", metavar="KEY", help="Default: API_KEY of this setup, for servers on this machine.")
@click.option("--rate", "rates", type=click.FloatRange(0, min_open=True), multiple=True, metavar="N",
              help="Requests a second, at random moments, whether or not the server keeps up. Again for another load. "
                   "Default: 10.")  # fmt: skip
@click.option("--clients", type=click.IntRange(1), multiple=True, metavar="N",
              help="So many clients, each waiting for its answer, instead of or after the rates.")  # fmt: skip
@click.option("--seconds", type=click.FloatRange(0, min_open=True), default=10.0, show_default=True,
              help="Of each load.")  # fmt: skip
@click.option("--texts", type=click.IntRange(1), default=1, show_default=True, help="In a request.")
@click.option("--words", type=click.IntRange(1), default=12, show_default=True, help="In a text.")
@click.option("--file", type=click.Path(path_type=Path, dir_okay=False), help="Texts of your own, one a line.")
@click.option("--dimensions", type=click.IntRange(1), help="As in the API.")
@click.option("--input-type", help="As in the API: query or document.")
@click.option("--format", "encoding_format", type=click.Choice(["base64", "float"]), default="base64",
              show_default=True, help="Of the vectors.")  # fmt: skip
@click.option("--timeout", type=click.FloatRange(0, min_open=True), default=60.0, show_default=True, metavar="SECONDS",
              help="An answer that takes longer is an error.")  # fmt: skip
@click.option("--max-p95", type=click.FloatRange(0), metavar="MS", help="Exit with 1 when a load's p95 is above.")
@click.option("--max-errors", type=click.FloatRange(0, 100), default=0.0, show_default=True, metavar="PERCENT",
              help="Exit with 1 when more of a load's requests fail.")  # fmt: skip
@click.option("--report", type=click.Path(path_type=Path), default="embedyard-bench", show_default=True, metavar="PATH",
              help="Where PATH.json and PATH.png are written.")  # fmt: skip
@click.option("--no-report", is_flag=True, help="Write neither.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def command(**options: Any) -> None:
    """Put load on the OpenAI-compatible server at URL, and say how it holds up.

    Latency counts from the moment a request was due, so that a server that stalls cannot hide it. A first request
    brings the model into memory and is not counted. Exit code 0: every load stayed within bounds; 1: one did not; 2:
    nothing could be measured; 130: Ctrl+C ended it early, and the report tells of what was measured until then.
    """
    asked = Asked(**options)
    from router.loadgen import run
    from router.loadgen.report import as_json
    from router.loadgen.requests import CannotMeasure

    try:
        _allow_many_connections()
        report = run(lambda: _measured(asked))
    except (CannotMeasure, SettingsError) as error:
        click.echo(str(error), err=True)
        raise SystemExit(MISTAKES) from None
    if asked.as_json:
        click.echo(as_json(report))
    _explain(report.phases)
    if not asked.no_report:
        _save(report, asked.report)
    if not report.is_whole:
        raise SystemExit(INTERRUPTED)
    if not all(map(asked.is_met_by, report.phases)):
        raise SystemExit(FAILED)


def _allow_many_connections() -> None:
    """An open load has as many connections as the server is behind; the usual limit of 1024 files is soon reached."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _own_key(url: str) -> str | None:
    """This setup's key, for a server on this machine; somebody else's would only learn it."""
    return load_settings().api_key if is_loopback(urlsplit(url).hostname or "") else None


async def _measured(asked: Asked) -> "Report":
    from router.loadgen.http_client import Target, encode
    from router.loadgen.report import Report, now
    from router.loadgen.requests import calls, first, with_model
    from router.loadgen.session import Job, measure

    target = Target(asked.url, asked.model or "", asked.api_key or _own_key(asked.url), asked.timeout)
    target = with_model(target)
    texts = calls(asked.texts, asked.words, asked.file)
    requests = [encode(target, call, asked.encoding_format, **asked.fields) for call in texts]
    started_at, dimensions = now(), await first(target, requests[0])
    with _screen(asked, target, dimensions) as screen:
        phases, is_whole = await measure(Job(target, requests, asked.phases, asked.seconds), screen)
    return Report(
        url=asked.url,
        model=target.model,
        dimensions=dimensions,
        texts_per_request=asked.texts,
        words=None if asked.file else asked.words,
        started_at=started_at,
        embedyard=embedyard_version(),
        is_whole=is_whole,
        phases=phases,
    )


@contextmanager
def _screen(asked: Asked, target: "Target", dimensions: int) -> "Iterator[Screen]":
    from router.loadgen.progress import Lines, LiveTable, Silence

    if asked.as_json:
        yield Silence()
    elif not is_terminal():
        yield Lines(click.echo, lambda line: click.echo(line, err=True))
    else:
        from rich.console import Console  # only for a terminal, as in the other commands
        from rich.live import Live

        console = Console()
        heading = f"{target.model} at {target.url}: {asked.texts} texts a request, vectors of {dimensions}"
        console.print(heading, markup=False, highlight=False)
        with Live(console=console, auto_refresh=False) as live:
            yield LiveTable(live)


def _explain(phases: "Sequence[Measured]") -> None:
    """What a table does not say."""
    for phase in phases:
        for kind, failure in phase.failures.items():
            click.echo(f"{phase.load}: {failure.count} × {kind}: {failure.message}", err=True)
        if phase.is_clients_own:
            click.echo(f"{phase.load}: {_BUSY.format(phase.client_cores, 1000 * phase.client_late_p99_s)}", err=True)


def _save(report: "Report", stem: Path) -> None:
    """Both files; that a picture cannot be made is no failure of the measurement."""
    from router.loadgen.plot import NoPicture, draw
    from router.loadgen.report import save

    json_path, png_path = stem.with_name(f"{stem.name}.json"), stem.with_name(f"{stem.name}.png")
    try:
        save(report, json_path)
        click.echo(f"report: {json_path}", err=True)
        draw(report, png_path)
        click.echo(f"picture: {png_path}", err=True)
    except NoPicture as error:
        click.echo(str(error), err=True)
    except OSError as error:
        click.echo(f"{stem} cannot be written: {error.strerror}; name another place with --report", err=True)
        raise SystemExit(MISTAKES) from None
