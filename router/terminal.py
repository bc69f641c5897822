"""Rows for eyes, pipes and programs: a table on a terminal, tabs in a pipe."""

import sys
from collections.abc import Collection, Sequence

import click


def is_terminal() -> bool:
    """Whether a person is looking."""
    return sys.stdout.isatty()


def print_rows(header: Sequence[str], rows: Sequence[Sequence[str]], *, bold: Collection[int] = ()) -> None:
    """One line a row. In a pipe without the header, columns parted by tabs; `bold` are indexes of rows to stand out."""
    rows = [[" ".join(cell.split()) for cell in row] for row in rows]
    if not is_terminal():
        for row in rows:
            click.echo("\t".join(row))
        return
    from rich.console import Console  # only for a terminal: it costs more than the rest of a command
    from rich.table import Table

    table = Table(*header, box=None, pad_edge=False, header_style="bold")
    table.columns[0].no_wrap = True
    for index, row in enumerate(rows):
        table.add_row(*row, style="bold" if index in bold else "")
    Console().print(table)
