"""`embedyard completion`: prints shell completion scripts; completes model names and key ids."""

from pathlib import Path

import click
from click.shell_completion import get_completion_class

from router.auth.key_file import read_keys
from router.config.settings import SettingsError, load_settings
from router.config.yaml_document import FileError
from router.registry.opening import open_registry


def model_names(ctx: click.Context, _: click.Parameter, incomplete: str) -> list[str]:
    """Complete models and aliases of the command's registry, in its order."""
    given = ctx.params.get("registry")
    try:
        found = open_registry(load_settings(flags={"REGISTRY": str(given)} if given else {}))
    except (FileError, SettingsError):
        return []
    return [name for name in (*found.models, *found.aliases) if name.startswith(incomplete)]


def key_ids(ctx: click.Context, _: click.Parameter, incomplete: str) -> list[str]:
    """Complete key ids of the command's key file."""
    try:
        path = ctx.params.get("file") or load_settings().keys_file
        return [key.id for key in read_keys(Path(path)) if key.id.startswith(incomplete)] if path else []
    except (FileError, SettingsError):
        return []


SHELLS = ("bash", "zsh", "fish")


@click.command(
    epilog="""
\b
Examples:
  embedyard completion bash > ~/.local/share/bash-completion/completions/embedyard
  embedyard completion zsh > ~/.zfunc/_embedyard      (with fpath+=~/.zfunc before compinit)
  embedyard completion fish > ~/.config/fish/completions/embedyard.fish
"""
)
@click.argument("shell", type=click.Choice(SHELLS))
@click.pass_context
def command(ctx: click.Context, shell: str) -> None:
    """Print the completion script for SHELL."""
    completer = get_completion_class(shell)
    if completer is None:
        raise click.UsageError(f"this version of click does not support completion for {shell}")
    click.echo(completer(ctx.find_root().command, {}, "embedyard", "_EMBEDYARD_COMPLETE").source())
