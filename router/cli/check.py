"""`embedyard check`: is the registry right, and would `serve` accept the settings?"""

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

MISTAKES = 2
"""The exit code when something must be put right."""


class Place(Struct, frozen=True, kw_only=True):
    """One mistake and where it is; a setting has no file and no line, but its name stands in the message."""

    message: str
    file: str | None = None
    line: int | None = None
    key: str | None = None
    entry: str | None = None


class Verdict(Struct, frozen=True, kw_only=True):
    """What `--json` prints. `models` is empty as long as there are mistakes."""

    models: tuple[str, ...] = ()
    mistakes: tuple[Place, ...] = ()


@click.command(
    epilog="""
\b
Examples:
  embedyard check                    the registry that REGISTRY names, and the settings
  embedyard check staging.yaml       that file alone
  embedyard check && embedyard serve
  embedyard check --json | jq -r '.mistakes[] | "\\(.file):\\(.line): \\(.message)"'
"""
)
@click.argument("registry", required=False, type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="The models, or every mistake with its place.")
def command(registry: Path | None, *, as_json: bool) -> None:
    """Say whether REGISTRY (default: the one the settings name), the settings and KEYS_FILE are right.

    One line per model, and exit code 0. Every mistake with its line and key, and exit code 2.
    """
    path = registry or _checked_settings(as_json=as_json)
    try:
        found = read_registry(path)
    except RegistryError as error:
        _refuse(error, path, as_json=as_json)
    if as_json:
        _print(Verdict(models=tuple(found.models)))
        return
    for spec in found.models.values():
        click.echo(_line(spec, is_default=spec.model_id == found.default_model))
    click.echo(f"{path}: {len(found.models)} models, no mistakes")


def _checked_settings(*, as_json: bool) -> Path:
    try:
        settings = load_settings()
    except SettingsError as error:
        _refuse(error, None, as_json=as_json)
    if settings.keys_file is not None:
        try:
            keys = read_keys(settings.keys_file)
        except KeysError as error:
            _refuse(error, settings.keys_file, as_json=as_json)
        if not as_json:
            click.echo(f"{settings.keys_file}: {len(keys)} keys, no mistakes")
    return settings.registry


def _refuse(error: SettingsError | FileError, file: Path | None, *, as_json: bool) -> NoReturn:
    if as_json:
        _print(Verdict(mistakes=tuple(_places(error, file))))
    else:
        click.echo(f"{file}: {error}" if file else str(error), err=True)
    raise SystemExit(MISTAKES) from None


def _places(error: SettingsError | FileError, file: Path | None) -> list[Place]:
    if isinstance(error, SettingsError):
        return [Place(message=message) for message in error.mistakes]
    return [
        Place(message=each.message, file=str(file), line=each.line, key=show_path(each.path) or None, entry=each.entry)
        for each in error.mistakes
    ]


def _print(verdict: Verdict) -> None:
    click.echo(msgspec.json.format(msgspec.json.encode(verdict), indent=2))


def _line(spec: ModelSpec, *, is_default: bool) -> str:
    revision = f"@{spec.revision}" if spec.revision else ""
    return f"ok  {spec.model_id}  {spec.source}{revision}{'  (default)' if is_default else ''}"
