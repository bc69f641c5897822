"""`embedyard`: finds the subcommand and runs it. Each lives in `router/cli/NAME.py` as `command`.

A subcommand is imported only when it is asked for, so that `embedyard check` never pays for torch or the server, and
`.env` can set `HF_*` before anything imports huggingface_hub.
"""

import importlib
from importlib.metadata import PackageNotFoundError, version

import click

from router.config.settings import export_hub_variables

SUMMARIES = {
    "serve": "Serve the models of the registry.",
    "check": "Say whether the registry and the settings are right.",
    "models": "Show the models of the registry.",
    "pull": "Download models ahead of time.",
    "plan": "Say what loading models would need, without loading them.",
    "calibrate": "Print a model's ranges for int8 vectors.",
    "keys": "Make API keys.",
    "bench": "Measure a running server, this one or any other with OpenAI's API.",
    "ray": "Put hosts on a Ray cluster.",
    "doctor": "Look for what is wrong with this machine or setup.",
    "completion": "Print the completion script for a shell.",
}
"""One line each for `--help`, which must not import them all."""

MODULES = {"ray": "ray_deploy"}
"""Modules of commands that are not called as the command is."""

EXAMPLES = """
\b
Examples:
  embedyard check                    is registry.yaml right? are the settings?
  embedyard serve                    serve it on http://127.0.0.1:6008
  embedyard models                   what is in the registry
  embedyard doctor                   what is wrong, and what to do
  embedyard COMMAND --help           more about one command

Settings come from the environment and from .env; .env.example lists them all.
"""


class LazyGroup(click.Group):
    """A group whose subcommands are modules, imported on demand."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(SUMMARIES)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in SUMMARIES:
            return None
        command: click.Command = importlib.import_module(f"router.cli.{MODULES.get(cmd_name, cmd_name)}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, SUMMARIES.get(name, "")) for name in self.list_commands(ctx)])


def _print_version(ctx: click.Context, _option: click.Parameter, is_asked: bool) -> None:
    if not is_asked:
        return
    try:
        click.echo(f"embedyard {version('embedyard')}")
    except PackageNotFoundError:
        click.echo("embedyard, run from its source folder without being installed")
    ctx.exit()


@click.group(cls=LazyGroup, epilog=EXAMPLES, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=_print_version, help="Show it.")
def cli() -> None:
    """One embeddings server for many models: OpenAI-compatible, loads on demand, evicts under a memory budget."""


def main() -> None:
    """The `embedyard` command."""
    export_hub_variables()
    cli(prog_name="embedyard")
