"""`embedyard check`: validates the registry, the settings and the key file."""

from pathlib import Path
from typing import NoReturn

import click
import msgspec
from msgspec import Struct

from engines.spec import ModelSpec
from router.auth.key_file import KeysError, read_keys
from router.config.settings import SettingsError, load_settings
from router.config.yaml_document import FileError, show_path
from router.registry.registry import RegistryError, read_registry

EXIT_INVALID = 2
"""Exit code for an invalid registry, settings or key file."""


class MistakeRecord(Struct, frozen=True, kw_only=True):
    """One mistake and its location; a setting has no file and line, but its name is in the message."""

    message: str
    file: str | None = None
    line: int | None = None
    key: str | None = None
    entry: str | None = None


class CheckResult(Struct, frozen=True, kw_only=True):
    """The output of `--json`. `models` is empty when there are mistakes."""

    models: tuple[str, ...] = ()
    mistakes: tuple[MistakeRecord, ...] = ()


@click.command(
    epilog="""
\b
Examples:
  embedyard check                    the registry in REGISTRY, and the settings
  embedyard check staging.yaml       only this file
  embedyard check && embedyard serve
  embedyard check --json | jq -r '.mistakes[] | "\\(.file):\\(.line): \\(.message)"'
"""
)
@click.argument("registry", required=False, type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print the models, or every mistake with its location, as JSON.")
def command(registry: Path | None, *, as_json: bool) -> None:
    """Validate REGISTRY (default: from the settings), the settings and KEYS_FILE.

    Prints one line per model, or every mistake with its line and key. Exit code 0: valid; 2: mistakes.
    """
    path = registry or _checked_settings(as_json=as_json)
    try:
        found = read_registry(path)
    except RegistryError as error:
        _exit_invalid(error, path, as_json=as_json)
    if as_json:
        _print(CheckResult(models=tuple(found.models)))
        return
    for spec in found.models.values():
        click.echo(_line(spec, is_default=spec.model_id == found.default_model))
    click.echo(f"{path}: {len(found.models)} models, no mistakes")


def _checked_settings(*, as_json: bool) -> Path:
    try:
        settings = load_settings()
    except SettingsError as error:
        _exit_invalid(error, None, as_json=as_json)
    if settings.keys_file is not None:
        try:
            keys = read_keys(settings.keys_file)
        except KeysError as error:
            _exit_invalid(error, settings.keys_file, as_json=as_json)
        if not as_json:
            click.echo(f"{settings.keys_file}: {len(keys)} keys, no mistakes")
    return settings.registry


def _exit_invalid(error: SettingsError | FileError, file: Path | None, *, as_json: bool) -> NoReturn:
    if as_json:
        _print(CheckResult(mistakes=tuple(_records(error, file))))
    else:
        click.echo(f"{file}: {error}" if file else str(error), err=True)
    raise SystemExit(EXIT_INVALID) from None


def _records(error: SettingsError | FileError, file: Path | None) -> list[MistakeRecord]:
    if isinstance(error, SettingsError):
        return [MistakeRecord(message=message) for message in error.mistakes]
    return [
        MistakeRecord(
            message=each.message, file=str(file), line=each.line, key=show_path(each.path) or None, entry=each.entry
        )
        for each in error.mistakes
    ]


def _print(verdict: CheckResult) -> None:
    click.echo(msgspec.json.format(msgspec.json.encode(verdict), indent=2))


def _line(spec: ModelSpec, *, is_default: bool) -> str:
    revision = f"@{spec.revision}" if spec.revision else ""
    return f"ok  {spec.model_id}  {spec.source}{revision}{'  (default)' if is_default else ''}"
