"""Names that a shell may complete on the command line: models of the registry, and keys. Never raises, never prints."""

from pathlib import Path

import click

from router.keys_file import read_keys
from router.registry import open_registry
from router.settings import SettingsError, load_settings
from router.yaml_document import FileError


def model_names(ctx: click.Context, _: click.Parameter, incomplete: str) -> list[str]:
    """Models and aliases of the registry that the command would use, in its order."""
    given = ctx.params.get("registry")
    try:
        found = open_registry(load_settings(flags={"REGISTRY": str(given)} if given else {}))
    except (FileError, SettingsError):
        return []
    return [name for name in (*found.models, *found.aliases) if name.startswith(incomplete)]


def key_ids(ctx: click.Context, _: click.Parameter, incomplete: str) -> list[str]:
    """Keys of the file that the command would use."""
    try:
        path = ctx.params.get("file") or load_settings().keys_file
        return [key.id for key in read_keys(Path(path)) if key.id.startswith(incomplete)] if path else []
    except (FileError, SettingsError):
        return []
