"""Prints rows: as a table on a terminal, tab-separated in a pipe."""

import sys
from collections.abc import Collection, Sequence

import click

_GAP = 2
_MIN_WIDTH = 12


def is_terminal() -> bool:
    """Whether stdout is a terminal."""
    return sys.stdout.isatty()


def print_rows(
    header: Sequence[str], rows: Sequence[Sequence[str]], *, bold: Collection[int] = (), crop: Collection[str] = ()
) -> None:
    """Print one line per row. In a pipe without the header, columns separated by tabs.

    Args:
        bold: indexes of highlighted rows.
        crop: columns that are shortened with an ellipsis on a narrow terminal, or left out, last first.
    """
    rows = [[" ".join(cell.split()) for cell in row] for row in rows]
    if not is_terminal():
        for row in rows:
            click.echo("\t".join(row))
        return
    from rich.console import Console  # only for a terminal: importing it takes longer than the rest of a command
    from rich.table import Table
    from rich.text import Text

    console = Console()
    visible = _visible_columns(header, rows, crop, console.width)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for place, index in enumerate(visible):
        table.add_column(header[index], no_wrap=place == 0 or (bool(crop) and header[index] not in crop))
    for number, row in enumerate(rows):
        cells = (Text(row[index], no_wrap=header[index] in crop, overflow="ellipsis") for index in visible)
        table.add_row(*cells, style="bold" if number in bold else "")
    console.print(table)


def _visible_columns(
    header: Sequence[str], rows: Sequence[Sequence[str]], crop: Collection[str], width: int
) -> list[int]:
    """Return the indexes of the columns that fit; no cropped column becomes narrower than `_MIN_WIDTH`."""
    widest = [max(map(len, column)) + _GAP for column in zip(header, *rows, strict=True)]
    room = width - sum(size for name, size in zip(header, widest, strict=True) if name not in crop)
    cropped = [index for index, name in enumerate(header) if name in crop]
    while cropped and room < len(cropped) * _MIN_WIDTH:
        cropped.pop()
    return [index for index, name in enumerate(header) if name not in crop or index in cropped]
