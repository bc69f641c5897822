"""`embedyard doctor`: what is installed, what is here, and what to do where something is wrong."""

from collections.abc import Sequence

import click
import msgspec

from router.diagnosis import Finding, examine
from router.terminal import is_terminal

FAILED = 1
"""The exit code when serving would not work."""

_STYLES = {"ok": "green", "warn": "yellow", "fail": "red"}


@click.command(
    epilog="""
\b
Examples:
  embedyard doctor                   a table; in a pipe, one finding a line
  embedyard doctor --json            for programs
  embedyard doctor && embedyard serve
"""
)
@click.option("--json", "as_json", is_flag=True, help="A JSON list of findings.")
def command(*, as_json: bool) -> None:
    """Look for what is wrong with this machine or setup, and say what to do.

    Exit code 0: serving would work, perhaps within limits; 1: it would not.
    """
    findings = tuple(examine())
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(findings), indent=2))
    elif is_terminal():
        _print_table(findings)
    else:
        for finding in findings:
            click.echo("\t".join(_cells(finding)))
    if any(finding.verdict == "fail" for finding in findings):
        raise SystemExit(FAILED)


def _cells(finding: Finding) -> tuple[str, ...]:
    cells = (finding.verdict, finding.name, finding.detail, finding.cure)
    return tuple(" ".join(cell.split()) for cell in cells)


def _print_table(findings: Sequence[Finding]) -> None:
    from rich.console import Console  # only for a terminal, as in `embedyard models`
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, show_header=False)
    for finding in findings:
        said = Text(finding.detail)
        if finding.cure:
            said.append(f"\n→ {finding.cure}", style="bold")
        table.add_row(Text(finding.verdict, style=_STYLES[finding.verdict]), Text(finding.name), said)
    Console().print(table)
