"""Reads records from JSONL, CSV, plain lines and Parquet, one at a time, from any place between two of them."""

import codecs
import csv
import sys
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from router.bulk.records import BulkError, Cursor, Record, Refusal
from router.bulk.sources import STDIN, Columns, Source, check_columns

MAX_LINE_BYTES = 16 * 2**20
"""Longer lines are refused without being held in memory; no model reads so much."""

_PIECE_BYTES = 2**20
_TOO_LONG = Refusal("invalid_value", f"the line is longer than {MAX_LINE_BYTES} bytes: split it")
_NOT_UTF8 = Refusal("invalid_value", "the line is not UTF-8")
_EMPTY = Refusal("empty_input", "the text is empty")


def read_records(sources: Sequence[Source], columns: Columns, start: Cursor) -> Iterator[Record]:
    """Yield the records behind a place. A line that cannot be read is a record with a refusal.

    Raises:
        BulkError: a column is missing, or standard input is not what it was.
    """
    number = start.number
    for index in range(start.source, len(sources)):
        here = start if index == start.source else Cursor(index, 0, number)
        for record in _READERS[sources[index].format](sources[index], columns, here):
            number = record.number
            yield record


class _ByteLines:
    """Yields the lines of a stream from an offset on, with their ends; None for one that is too long.

    Attributes:
        offset: bytes read.
        checksum: of them, for standard input.
    """

    def __init__(self, source: Source, start: Cursor) -> None:
        self._is_stdin = source.path == STDIN
        self._stream: BinaryIO = sys.stdin.buffer if self._is_stdin else Path(source.path).open("rb")  # noqa: SIM115  # closed by `close`
        self.offset, self.checksum = start.offset, start.checksum
        if self._is_stdin:
            self._skip(start)
        else:
            self._stream.seek(start.offset)

    def __iter__(self) -> Iterator[bytes | None]:
        while line := self._read():
            is_whole = len(line) <= MAX_LINE_BYTES or line.endswith(b"\n")
            while not is_whole:
                line, rest = b"", self._read()
                is_whole = not rest or rest.endswith(b"\n")
            yield line or None

    def seek(self, offset: int) -> None:
        """Continue at an offset of a file."""
        self._stream.seek(offset)
        self.offset = offset

    def close(self) -> None:
        """Close the file."""
        if not self._is_stdin:
            self._stream.close()

    def _read(self) -> bytes:
        line, is_first = self._stream.readline(MAX_LINE_BYTES + 1), not self.offset
        self.offset += len(line)
        if self._is_stdin:
            self.checksum = zlib.crc32(line, self.checksum)
        return line.removeprefix(codecs.BOM_UTF8) or b"\n" if is_first and line else line

    def _skip(self, start: Cursor) -> None:
        checksum, left = 0, start.offset
        while left and (piece := self._stream.read(min(left, _PIECE_BYTES))):
            checksum, left = zlib.crc32(piece, checksum), left - len(piece)
        if left or checksum != start.checksum:
            raise BulkError(
                "standard input does not begin as it did: send the same input, or remove the journal to begin anew"
            )


def _read_jsonl(source: Source, columns: Columns, start: Cursor) -> Iterator[Record]:
    lines, number = _ByteLines(source, start), start.number
    try:
        for line in lines:
            number += 1
            if line is None or line.strip():
                after = Cursor(start.source, lines.offset, number, lines.checksum)
                yield _decode_line(line, columns, number, after)
    finally:
        lines.close()


def _decode_line(line: bytes | None, columns: Columns, number: int, after: Cursor) -> Record:
    if line is None:
        return Record(number, number, "", after, refusal=_TOO_LONG)
    try:
        fields = msgspec.json.decode(line)
    except UnicodeDecodeError:
        return Record(number, number, "", after, refusal=_NOT_UTF8)
    except (msgspec.DecodeError, RecursionError) as error:
        return Record(number, number, "", after, refusal=Refusal("invalid_json", f"the line is not JSON: {error}"))
    if isinstance(fields, str) and columns.id is None:
        fields = {columns.text: fields}
    if not isinstance(fields, dict):
        return Record(number, number, "", after, refusal=Refusal("invalid_value", "the line is no JSON object"))
    return _record(fields, columns, number, after)


def _record(fields: Mapping[str, Any], columns: Columns, number: int, after: Cursor) -> Record:
    """Return the record of a row with names; one without a text or an id has a refusal."""
    identity = number if columns.id is None else fields.get(columns.id)
    if isinstance(identity, bool) or not isinstance(identity, str | int):
        refusal = Refusal("invalid_value", f"{columns.id!r} must be a string or an integer")
        return Record(number, number, "", after, refusal=refusal)
    text = fields.get(columns.text)
    if not isinstance(text, str):
        wrong = "is missing" if text is None else f"must be a string, not {type(text).__name__}"
        return Record(number, identity, "", after, refusal=Refusal("invalid_value", f"{columns.text!r} {wrong}"))
    kept = {name: fields.get(name) for name in columns.kept}
    return Record(number, identity, text, after, kept, None if text else _EMPTY)


def _read_plain(source: Source, columns: Columns, start: Cursor) -> Iterator[Record]:
    lines, number = _ByteLines(source, start), start.number
    try:
        for line in lines:
            number += 1
            if line is not None and not line.strip():
                continue
            after = Cursor(start.source, lines.offset, number, lines.checksum)
            try:
                text = None if line is None else line.decode().rstrip("\r\n")
            except UnicodeDecodeError:
                yield Record(number, number, "", after, refusal=_NOT_UTF8)
            else:
                yield Record(number, number, text or "", after, refusal=_TOO_LONG if text is None else None)
    finally:
        lines.close()


class _BadLine(Exception):
    """A line that csv must not see."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.message)
        self.refusal = refusal


def _read_csv(source: Source, columns: Columns, start: Cursor) -> Iterator[Record]:
    """Yield the rows of a file with a header; csv reads exactly the lines of a row, so the offset is behind it."""
    csv.field_size_limit(MAX_LINE_BYTES)
    delimiter = "\t" if source.format == "tsv" else ","
    lines = _ByteLines(source, Cursor(start.source) if source.path != STDIN or not start.offset else start)
    try:
        names = _csv_header(source, columns, lines, start, delimiter)
        number = start.number
        rows = csv.reader(_TextLines(lines), delimiter=delimiter)
        while True:
            number += 1
            row, refusal = _next_row(rows)
            if row is None and refusal is None:
                return
            after = Cursor(start.source, lines.offset, number, lines.checksum)
            if refusal is not None:
                yield Record(number, number, "", after, refusal=refusal)
            elif row:
                yield _record(dict(zip(names, row, strict=False)), columns, number, after)
            else:
                number -= 1  # a blank line
    finally:
        lines.close()


def _next_row(rows: Iterator[list[str]]) -> tuple[list[str] | None, Refusal | None]:
    try:
        return next(rows, None), None
    except _BadLine as error:
        return None, error.refusal
    except csv.Error as error:
        return None, Refusal("invalid_value", f"the row is not CSV: {error}")


class _TextLines:
    """The lines of a CSV file as csv wants them: with their ends, which a quoted field may hold."""

    def __init__(self, lines: _ByteLines) -> None:
        self._lines = iter(lines)

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = next(self._lines)
        if line is None:
            raise _BadLine(_TOO_LONG)
        try:
            return line.decode()
        except UnicodeDecodeError:
            raise _BadLine(_NOT_UTF8) from None


def _csv_header(source: Source, columns: Columns, lines: _ByteLines, start: Cursor, delimiter: str) -> list[str]:
    if source.path == STDIN and start.offset:
        raise BulkError(
            "CSV from standard input cannot be continued: name the file, or remove the journal to begin anew"
        )
    header, _ = _next_row(csv.reader(_TextLines(lines), delimiter=delimiter))
    names = header or []
    check_columns(source, columns, names)
    if start.offset:
        lines.seek(start.offset)
    return names


def _read_parquet(source: Source, columns: Columns, start: Cursor) -> Iterator[Record]:
    from router.bulk.arrow_files import read_rows  # late: pyarrow is optional

    number, offset = start.number, start.offset
    for row in read_rows(source, columns, start.offset):
        number, offset = number + 1, offset + 1
        yield _record(row, columns, number, Cursor(start.source, offset, number))


_READERS = {"jsonl": _read_jsonl, "csv": _read_csv, "tsv": _read_csv, "lines": _read_plain, "parquet": _read_parquet}
