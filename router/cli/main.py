"""`embedyard`: the command group. Each subcommand is `command` in `router/cli/NAME.py`.

Subcommands are imported on use, so that `embedyard check` does not import torch or the server, and `.env` can set
`HF_*` before anything imports huggingface_hub.
"""

import importlib
from difflib import get_close_matches
from importlib.metadata import PackageNotFoundError, version

import click

from engines.collection import freeze
from router.config.settings import export_hub_variables

SUMMARIES = {
    "serve": "Serve the models of the registry, or those that are named.",
    "init": "Write a first registry.",
    "add": "Add a model to the registry.",
    "check": "Validate the registry and the settings.",
    "models": "Show the models of the registry.",
    "pull": "Download models ahead of time.",
    "plan": "Predict what loading models would need, without loading them.",
    "replay": "Replay a day's requests with other budgets and orders of eviction.",
    "precision": "Measure what a reduced dtype of a model costs and gains on this machine.",
    "spaces": "List embedding spaces; of two registries or servers, say which indexes must be rebuilt.",
    "calibrate": "Compute a model's ranges for int8 vectors.",
    "embed": "Embed files of texts, in this process or by a running server.",
    "keys": "Create, list and revoke API keys.",
    "bench": "Load-test a running server with an OpenAI-compatible API.",
    "ray": "Deploy hosts to a Ray cluster.",
    "doctor": "Diagnose this machine and its configuration.",
    "completion": "Print a shell completion script.",
}
"""One line each for `--help`, which must not import the modules."""

MODULES = {"ray": "ray_deploy"}
"""Commands whose module has another name."""

EXAMPLES = """
\b
Examples:
  embedyard check                    validate registry.yaml and the settings
  embedyard serve                    serve on http://127.0.0.1:6008
  embedyard serve BAAI/bge-m3        the same, with one model of the hub
  embedyard add BAAI/bge-m3          add it to registry.yaml
  embedyard models                   list the models of the registry
  embedyard doctor                   find problems and their remedies
  embedyard COMMAND --help           help for one command

Settings come from the environment and from .env; .env.example lists them all.
"""


class LazyGroup(click.Group):
    """A click group that imports the modules of its subcommands on use."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(SUMMARIES)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in SUMMARIES:
            return None
        command: click.Command = importlib.import_module(f"router.cli.{MODULES.get(cmd_name, cmd_name)}").command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        close = get_close_matches(args[0], SUMMARIES, n=1)
        if args[0] not in SUMMARIES and close:
            ctx.fail(f"No such command {args[0]!r}: did you mean {close[0]}?")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, SUMMARIES.get(name, "")) for name in self.list_commands(ctx)])


def _print_version(ctx: click.Context, _option: click.Parameter, is_asked: bool) -> None:
    if not is_asked:
        return
    try:
        click.echo(f"embedyard {version('embedyard')}")
    except PackageNotFoundError:
        click.echo("embedyard (run from source, not installed)")
    ctx.exit()


@click.group(cls=LazyGroup, epilog=EXAMPLES, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_print_version, help="Show the version."
)
def cli() -> None:
    """One embeddings server for many models: OpenAI-compatible, loads on demand, evicts under a memory budget."""


def main() -> None:
    """Run the `embedyard` command."""
    export_hub_variables()
    try:
        cli(prog_name="embedyard")
    finally:
        freeze()  # the interpreter's last collection takes 2 s where torch was imported
