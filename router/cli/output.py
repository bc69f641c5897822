"""Rows for eyes, pipes and programs: a table on a terminal, tabs in a pipe."""

import sys
from collections.abc import Collection, Sequence

import click

_GAP = 2
_LEAST = 12


def is_terminal() -> bool:
    """Whether a person is looking."""
    return sys.stdout.isatty()


def print_rows(
    header: Sequence[str], rows: Sequence[Sequence[str]], *, bold: Collection[int] = (), crop: Collection[str] = ()
) -> None:
    """One line a row. In a pipe without the header, columns parted by tabs.

    Args:
        bold: indexes of rows to stand out.
        crop: the first columns to suffer on a narrow terminal: they end in an ellipsis, or are left out, last first.
    """
    rows = [[" ".join(cell.split()) for cell in row] for row in rows]
    if not is_terminal():
        for row in rows:
            click.echo("\t".join(row))
        return
    from rich.console import Console  # only for a terminal: it costs more than the rest of a command
    from rich.table import Table
    from rich.text import Text

    console = Console()
    shown = _shown(header, rows, crop, console.width)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for place, index in enumerate(shown):
        table.add_column(header[index], no_wrap=place == 0 or (bool(crop) and header[index] not in crop))
    for number, row in enumerate(rows):
        cells = (Text(row[index], no_wrap=header[index] in crop, overflow="ellipsis") for index in shown)
        table.add_row(*cells, style="bold" if number in bold else "")
    console.print(table)


def _shown(header: Sequence[str], rows: Sequence[Sequence[str]], crop: Collection[str], width: int) -> list[int]:
    """Indexes of the columns that have room: none of those that may be cropped gets narrower than is worth reading."""
    widest = [max(map(len, column)) + _GAP for column in zip(header, *rows, strict=True)]
    room = width - sum(size for name, size in zip(header, widest, strict=True) if name not in crop)
    cropped = [index for index, name in enumerate(header) if name in crop]
    while cropped and room < len(cropped) * _LEAST:
        cropped.pop()
    return [index for index, name in enumerate(header) if name not in crop or index in cropped]
