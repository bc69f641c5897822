"""`embedyard completion`: the script that lets a shell complete commands and options."""

import click
from click.shell_completion import get_completion_class

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
        raise click.UsageError(f"this version of click has no completion for {shell}")
    click.echo(completer(ctx.find_root().command, {}, "embedyard", "_EMBEDYARD_COMPLETE").source())
