"""`embedyard check`: validates the registry, the settings and the key file, and looks for folders and packages."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

import click
import msgspec
from msgspec import Struct

from engines.spec import ModelSpec, parts_of
from router.auth.key_file import KeysError, read_keys
from router.cli.start_warnings import target_dim_warnings
from router.config.settings import DEFAULT_REGISTRY, Settings, SettingsError, load_settings, unknown_settings
from router.config.yaml_document import FileError, show_path
from router.registry.opening import is_embedded_only, missing_sources, open_registry
from router.registry.registry import Registry, RegistryError, read_registry

EXIT_MISSING = 1
EXIT_INVALID = 2
"""Exit codes: a folder or package is not on this machine; an invalid registry, settings or key file."""


class MistakeRecord(Struct, frozen=True, kw_only=True):
    """One mistake and its location; a setting has no file and line, but its name is in the message."""

    message: str
    file: str | None = None
    line: int | None = None
    key: str | None = None
    entry: str | None = None


class CheckResult(Struct, frozen=True, kw_only=True):
    """The output of `--json`. `models` is empty when there are mistakes.

    `missing`: models whose folder or package is not on this machine, with the reason. `warnings`: as `serve` prints.
    """

    models: tuple[str, ...] = ()
    mistakes: tuple[MistakeRecord, ...] = ()
    missing: dict[str, str] = {}
    warnings: tuple[str, ...] = ()


@click.command(
    epilog="""
\b
Examples:
  embedyard check                    what `embedyard serve` will see here
  embedyard check staging.yaml       only this file, wherever its models are
  embedyard check && embedyard serve
  embedyard check --json | jq -r '.mistakes[] | "\\(.file):\\(.line): \\(.message)"'
"""
)
@click.argument("registry", required=False, type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print the models, or every mistake with its location, as JSON.")
def command(registry: Path | None, *, as_json: bool) -> None:
    """Validate the settings, KEYS_FILE and the registry, and look for its folders and packages; or only REGISTRY.

    Prints one line per model, or every mistake with its line and key. Exit code 0: valid; 1: a folder or package is
    not on this machine; 2: mistakes.
    """
    settings = None if registry else _checked_settings(as_json=as_json)
    path = registry or (settings.registry if settings else DEFAULT_REGISTRY)
    try:
        found = read_registry(path) if settings is None else open_registry(settings)
    except RegistryError as error:
        _exit_invalid(error, path, as_json=as_json)
    missing = missing_sources(found.models.values()) if settings else {}
    warnings = (*unknown_settings(), *target_dim_warnings(settings, found)) if settings else ()
    if as_json:
        _print(CheckResult(models=tuple(found.models), missing=missing, warnings=warnings))
    else:
        _print_lines(found, path, missing, warnings)
    if missing:
        raise SystemExit(EXIT_MISSING)


def _print_lines(registry: Registry, path: Path, missing: Mapping[str, str], warnings: Sequence[str]) -> None:
    for spec in registry.models.values():
        click.echo(_line(spec, missing.get(spec.model_id), is_default=spec.model_id == registry.default_model))
    for warning in warnings:
        click.echo(f"warning: {warning}", err=True)
    lost = f", {len(missing)} not on this machine" if missing else ""
    noun = "model" if len(registry.models) == 1 else "models"
    origin = f"without a {path} the embedded model is served" if is_embedded_only(registry) else str(path)
    click.echo(f"{origin}: {len(registry.models)} {noun}, no mistakes{lost}")


def _checked_settings(*, as_json: bool) -> Settings:
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
    return settings


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


def _line(spec: ModelSpec, missing: str | None, *, is_default: bool) -> str:
    shown = " + ".join(f"{each.source}@{each.revision}" if each.revision else each.source for each in parts_of(spec))
    shown = f"{spec.model_id}  {shown}{'  (default)' if is_default else ''}"
    return f"missing  {shown}  {missing}" if missing else f"ok  {shown}"
