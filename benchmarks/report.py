"""A measurement's result: a Markdown table for people, and one JSON file with everything for programs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from benchmarks.machine import Machine

RESULTS = Path(__file__).parent / "results"


class Report(Struct, frozen=True, kw_only=True):
    """What one benchmark found.

    `settings`: what it was asked to do; `samples`: every single sample, by whatever keys the benchmark has;
    `notes`: what a reader must know before quoting a figure.
    """

    name: str
    title: str
    machine: Machine
    settings: dict[str, Any]
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]
    samples: dict[str, Any]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        settings = ", ".join(f"{name} {_plain(value)}" for name, value in self.settings.items())
        notes = [f"- {note}" for note in self.notes]
        return "\n".join(
            [f"## {self.title}", "", table(self.header, self.rows), "", *notes, settings, self.machine.describe()]
        )


def save(report: Report, folder: Path = RESULTS) -> Path:
    """Write the report as `NAME.json`; the last one of a name stays."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{report.name}.json"
    path.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=1) + b"\n")
    return path


def publish(report: Report, folder: Path | None) -> None:
    """Print the report, and save it when there is a folder to save it in."""
    print(f"\n{report}", flush=True)
    if folder is not None:
        print(f"saved: {save(report, folder)}", flush=True)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns stand under one another; the first is left-aligned, the others right."""
    widths = [max(len(cell) for cell in column) for column in zip(header, *rows, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join(_line(cells, widths) for cells in (header, rule, *rows))


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    first, *rest = (
        cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(cells, widths, strict=True))
    )
    return f"| {' | '.join([first, *rest])} |"


def _plain(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
