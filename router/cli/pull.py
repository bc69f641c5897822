"""`embedyard pull`: downloads models ahead of time, and updates models that follow a branch."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import click

from engines.errors import BadModel, HubUnreachable, OfflineMode
from engines.spec import ModelSpec
from engines.types import format_bytes
from router.cli.completion import model_names
from router.cli.output import is_terminal
from router.config.settings import SettingsError, load_settings
from router.registry.opening import NAMES, choose_models, open_registry
from router.registry.registry import RegistryError

if TYPE_CHECKING:
    from rich.progress import Progress

    from engines.planner import ModelStore
    from engines.types import ModelFiles

EXIT_FAILED = 1
EXIT_INVALID = 2
"""Exit codes: a download failed; invalid command, registry or settings."""

_STEPS = 10
_MIN_PROGRESS_BYTES = 10_000_000
"""In a pipe, downloads of at least so many bytes print their progress in so many steps."""


class PullReport(Protocol):
    """Shows progress and results: bars on a terminal, lines elsewhere."""

    def begin(self, spec: ModelSpec) -> None: ...

    def progress(self, done_bytes: int, total_bytes: int) -> None: ...

    def end(self, line: str, *, is_error: bool = False) -> None: ...


@click.command(
    epilog="""
\b
Examples:
  embedyard pull bge-m3              a model of the registry, by name or alias
  embedyard pull BAAI/bge-m3         a model of the hub; it need not be in the registry
  embedyard pull --all               every model of the registry
  embedyard pull --all && embedyard serve
"""
)
@click.argument("models", nargs=-1, metavar="[MODEL]...", shell_complete=model_names)
@click.option("--all", "is_all", is_flag=True, help="Every model of the registry.")
@click.option("--registry", type=click.Path(path_type=Path), help="Registry file, instead of REGISTRY.")
def command(models: tuple[str, ...], *, is_all: bool, registry: Path | None) -> None:
    """Download and verify models; resumes partial downloads.

    A model without a pinned revision is updated to the newest one on the hub. Exit code 0: all models are on disk; 1:
    some are not; 2: invalid command, registry or settings.
    """
    if bool(models) == is_all:
        raise click.UsageError(f"name models, or pass --all: {NAMES}")
    try:
        settings = load_settings(flags={"REGISTRY": str(registry)} if registry else {})
        found = open_registry(settings)
        specs = tuple((found if is_all else choose_models(found, models)).models.values())
    except (SettingsError, RegistryError) as error:
        click.echo(str(error), err=True)
        raise SystemExit(EXIT_INVALID) from None
    if not _pull_all(specs):
        raise SystemExit(EXIT_FAILED)


def _pull_all(specs: tuple[ModelSpec, ...]) -> bool:
    """Pull one model after the other; returns whether all are on disk."""
    from engines.planner import ModelStore  # late: imports huggingface_hub

    store = ModelStore()
    try:
        with _reporting() as report:
            outcomes = [_pull(store, spec, report) for spec in {spec.model_id: spec for spec in specs}.values()]
    finally:
        store.close()
    return all(outcomes)


def _pull(store: "ModelStore", spec: ModelSpec, report: PullReport) -> bool:
    """Pull one model. Files on disk are enough when the hub is not reachable for an update."""
    report.begin(spec)
    try:
        files = store.fetch(spec, report.progress, refresh=True)
    except (HubUnreachable, OfflineMode) as error:
        files_on_disk = store.locate(spec)
        if files_on_disk is None:
            report.end(f"failed  {spec.model_id}  {error}", is_error=True)
            return False
        report.end(f"{_ok(spec, files_on_disk)}  (not checked for updates: {error})")
    except BadModel as error:
        report.end(f"failed  {spec.model_id}  {error}", is_error=True)
        return False
    else:
        report.end(_ok(spec, files))
    return True


def _ok(spec: ModelSpec, files: "ModelFiles") -> str:
    revisions = "+".join(part.revision[:12] for part in files.parts or (files,))
    return f"ok  {spec.model_id}  {format_bytes(files.size_bytes)}  {revisions}"


@contextmanager
def _reporting() -> Iterator[PullReport]:
    if not is_terminal():
        yield PullLines()
        return
    from rich.console import Console  # only for a terminal: importing it takes longer than the rest of the command
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True),
        TextColumn("{task.fields[speed]}"), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=Console(force_terminal=True), transient=True) as progress:
        yield Bars(progress)


class PullLines:
    """Prints lines, for logs."""

    def begin(self, spec: ModelSpec) -> None:
        self._model_id = spec.model_id
        self._step: int | None = None

    def progress(self, done_bytes: int, total_bytes: int) -> None:
        step = done_bytes * _STEPS // max(1, total_bytes)
        # The first figures are of files on disk already; only what is downloaded now is progress.
        if self._step is not None and self._step < step < _STEPS and total_bytes >= _MIN_PROGRESS_BYTES:
            click.echo(f"...  {self._model_id}  {format_bytes(done_bytes)} of {format_bytes(total_bytes)}")
        self._step = step

    def end(self, line: str, *, is_error: bool = False) -> None:
        click.echo(line, err=is_error)


class Bars:
    """Shows a bar for the current model; results stay as lines above."""

    def __init__(self, progress: "Progress") -> None:
        self._progress = progress

    def begin(self, spec: ModelSpec) -> None:
        self._task = self._progress.add_task(spec.model_id, total=None, speed="")

    def progress(self, done_bytes: int, total_bytes: int) -> None:
        bytes_per_s = self._progress.tasks[-1].speed  # the only task; rich's own column has decimal units
        speed = f"{format_bytes(round(bytes_per_s))}/s" if bytes_per_s else ""
        self._progress.update(self._task, completed=done_bytes, total=total_bytes, speed=speed)

    def end(self, line: str, *, is_error: bool = False) -> None:
        self._progress.remove_task(self._task)
        style = "red" if is_error else ""
        self._progress.console.print(line, style=style, markup=False, highlight=False, soft_wrap=True)
