"""`embedyard pull`: bring models to disk before anyone asks for them, and bring branches up to date."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import click

from engines.errors import BadModel, HubUnreachable, ModelNotFound, OfflineMode
from engines.spec import ModelSpec
from engines.types import format_bytes
from router.cli.completion import model_names
from router.cli.output import is_terminal
from router.config.settings import Settings, SettingsError, load_settings
from router.registry.registry import Registry, RegistryError, read_registry, with_model_path

if TYPE_CHECKING:
    from rich.progress import Progress

    from engines.planner import ModelStore
    from engines.types import ModelFiles

FAILED = 1
MISTAKES = 2
"""Exit codes: a model could not be had; the command, the registry or the settings must be put right."""

_STEPS = 10
_LONG_BYTES = 10_000_000
"""In a pipe a download says so many times how far it is, if it is at least so large."""


class Report(Protocol):
    """Where progress and outcomes go: bars on a terminal, lines elsewhere."""

    def begin(self, spec: ModelSpec) -> None: ...

    def progress(self, done_bytes: int, total_bytes: int) -> None: ...

    def end(self, line: str, *, is_error: bool = False) -> None: ...


@click.command(
    epilog="""
\b
Examples:
  embedyard pull bge-m3              one model, by its name or an alias
  embedyard pull --all               every model of the registry
  embedyard pull --all && embedyard serve
"""
)
@click.argument("models", nargs=-1, metavar="[MODEL]...", shell_complete=model_names)
@click.option("--all", "wants_all", is_flag=True, help="Every model of the registry.")
@click.option("--registry", type=click.Path(path_type=Path), help="Another file than REGISTRY names.")
def command(models: tuple[str, ...], *, wants_all: bool, registry: Path | None) -> None:
    """Download models and verify them; what was downloaded in part is gone on with.

    A model without a pinned revision is brought to the hub's newest. Exit code 0: all are here, 1: some are not, 2: a
    mistake in the command or the registry.
    """
    if bool(models) == wants_all:
        raise click.UsageError("name models, or say --all")
    try:
        settings = load_settings(flags={"REGISTRY": str(registry)} if registry else {})
        found = with_model_path(_registry(settings), settings)
        specs = tuple(found.models.values()) if wants_all else tuple(found.resolve(name) for name in models)
    except (SettingsError, RegistryError, ModelNotFound) as error:
        click.echo(str(error), err=True)
        raise SystemExit(MISTAKES) from None
    if not _pull_all(specs):
        raise SystemExit(FAILED)


def _registry(settings: Settings) -> Registry:
    """`MODEL_PATH` alone is enough: then there need be no file."""
    if settings.model_path and not settings.registry.exists():
        return Registry()
    return read_registry(settings.registry)


def _pull_all(specs: tuple[ModelSpec, ...]) -> bool:
    """Pull one model after the other; returns whether all are here."""
    from engines.planner import ModelStore  # brings huggingface_hub, which a usage error need not wait for

    store = ModelStore()
    try:
        with _reporting() as report:
            outcomes = [_pull(store, spec, report) for spec in {spec.model_id: spec for spec in specs}.values()]
    finally:
        store.close()
    return all(outcomes)


def _pull(store: "ModelStore", spec: ModelSpec, report: Report) -> bool:
    """One model. What is here already stays good when the hub cannot be asked for anything newer."""
    report.begin(spec)
    try:
        files = store.fetch(spec, report.progress, refresh=True)
    except (HubUnreachable, OfflineMode) as error:
        kept = store.locate(spec)
        if kept is None:
            report.end(f"failed  {spec.model_id}  {error}", is_error=True)
            return False
        report.end(f"{_ok(spec, kept)}  (not asked for newer: {error})")
    except BadModel as error:
        report.end(f"failed  {spec.model_id}  {error}", is_error=True)
        return False
    else:
        report.end(_ok(spec, files))
    return True


def _ok(spec: ModelSpec, files: "ModelFiles") -> str:
    return f"ok  {spec.model_id}  {format_bytes(files.size_bytes)}  {files.revision[:12]}"


@contextmanager
def _reporting() -> Iterator[Report]:
    if not is_terminal():
        yield Lines()
        return
    from rich.console import Console  # only for a terminal: it costs more than the rest of the command
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=Console(force_terminal=True), transient=True) as progress:
        yield Bars(progress)


class Lines:
    """A line now and then, for logs: none of them is ever rewritten."""

    def begin(self, spec: ModelSpec) -> None:
        self._model_id = spec.model_id
        self._step: int | None = None

    def progress(self, done_bytes: int, total_bytes: int) -> None:
        step = done_bytes * _STEPS // max(1, total_bytes)
        # The first figures are what was here before; only what comes on top is news.
        if self._step is not None and self._step < step < _STEPS and total_bytes >= _LONG_BYTES:
            click.echo(f"...  {self._model_id}  {format_bytes(done_bytes)} of {format_bytes(total_bytes)}")
        self._step = step

    def end(self, line: str, *, is_error: bool = False) -> None:
        click.echo(line, err=is_error)


class Bars:
    """A bar for the model on its way; its outcome stays as a line above."""

    def __init__(self, progress: "Progress") -> None:
        self._progress = progress

    def begin(self, spec: ModelSpec) -> None:
        self._task = self._progress.add_task(spec.model_id, total=None)

    def progress(self, done_bytes: int, total_bytes: int) -> None:
        self._progress.update(self._task, completed=done_bytes, total=total_bytes)

    def end(self, line: str, *, is_error: bool = False) -> None:
        self._progress.remove_task(self._task)
        style = "red" if is_error else ""
        self._progress.console.print(line, style=style, markup=False, highlight=False, soft_wrap=True)
