"""Names the files of a job's input, their formats and the columns that are read."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from msgspec import Struct

from router.bulk.records import BulkError

InputFormat = Literal["jsonl", "csv", "tsv", "parquet", "lines"]
STDIN = "-"

_SUFFIXES: dict[str, InputFormat] = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".tsv": "tsv", ".parquet": "parquet", ".txt": "lines",
}  # fmt: skip


class Columns(Struct, frozen=True):
    """The columns that are read: the text, the id (None: the number of the record), and those that are kept."""

    text: str = "text"
    id: str | None = None
    kept: tuple[str, ...] = ()


class Source(Struct, frozen=True):
    """A file of the input, or standard input: `-`."""

    path: str
    format: InputFormat

    @property
    def num_bytes(self) -> int:
        """The size of the file; 0 for standard input."""
        return 0 if self.path == STDIN else Path(self.path).stat().st_size


def open_sources(paths: Sequence[str], given: InputFormat | None) -> tuple[Source, ...]:
    """Return the sources, each with its format: the given one, or by its suffix.

    Raises:
        BulkError: a file is not there, its format is unknown, or standard input is named beside other files.
    """
    if STDIN in paths and len(paths) > 1:
        raise BulkError("standard input (-) cannot be read beside other files")
    found = []
    for path in paths:
        if path != STDIN and not Path(path).is_file():
            raise BulkError(f"{path} is not a file")
        kind = given or _SUFFIXES.get(Path(path).suffix.lower())
        if kind is None:
            raise BulkError(f"the format of {path} is unknown: name it with --format")
        if kind == "parquet" and path == STDIN:
            raise BulkError("Parquet cannot be read from standard input: name the file")
        found.append(Source(path, kind))
    return tuple(found)


def check_columns(source: Source, columns: Columns, names: Sequence[str]) -> None:
    """Check that a table has the columns that are read.

    Raises:
        BulkError: naming those that it has.
    """
    wanted = (columns.text, *([columns.id] if columns.id else []), *columns.kept)
    missing = [name for name in wanted if name not in names]
    if missing:
        known = ", ".join(names) or "none"
        raise BulkError(f"{source.path} has no column {missing[0]!r} (its columns: {known}); see --text-column")
