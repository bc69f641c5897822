"""`embedyard check`: is the registry right, and would `serve` accept the settings?"""

from pathlib import Path

import click

from engines.spec import ModelSpec
from router.keys_file import KeysError, read_keys
from router.registry import RegistryError, read_registry
from router.settings import SettingsError, load_settings

MISTAKES = 2
"""The exit code when something must be put right."""


@click.command(
    epilog="""
\b
Examples:
  embedyard check                    the registry that REGISTRY names, and the settings
  embedyard check staging.yaml       that file alone
  embedyard check && embedyard serve
"""
)
@click.argument("registry", required=False, type=click.Path(path_type=Path))
def command(registry: Path | None) -> None:
    """Say whether REGISTRY (default: the one the settings name), the settings and KEYS_FILE are right.

    One line per model, and exit code 0. Every mistake with its line and key, and exit code 2.
    """
    path = registry or _checked_settings()
    try:
        found = read_registry(path)
    except RegistryError as error:
        click.echo(f"{path}: {error}", err=True)
        raise SystemExit(MISTAKES) from None
    for spec in found.models.values():
        click.echo(_line(spec, is_default=spec.model_id == found.default_model))
    click.echo(f"{path}: {len(found.models)} models, no mistakes")


def _checked_settings() -> Path:
    try:
        settings = load_settings()
        if settings.keys_file is not None:
            keys = read_keys(settings.keys_file)
            click.echo(f"{settings.keys_file}: {len(keys)} keys, no mistakes")
    except (SettingsError, KeysError) as error:
        click.echo(str(error), err=True)
        raise SystemExit(MISTAKES) from None
    return settings.registry


def _line(spec: ModelSpec, *, is_default: bool) -> str:
    revision = f"@{spec.revision}" if spec.revision else ""
    return f"ok  {spec.model_id}  {spec.source}{revision}{'  (default)' if is_default else ''}"
