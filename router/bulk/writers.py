"""Encodes windows of vectors as bytes to append, and makes the finished file of them."""

import base64
import io
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Literal, Protocol

import msgspec
import numpy as np
import orjson

from router.bulk.records import BulkError, EmbedOptions, Record, Vectors, VectorWidths
from router.bulk.sources import Columns, Source
from router.schemas.inference import OutputDtype

OutputFormat = Literal["jsonl", "npy", "parquet", "arrow"]
_SUFFIXES: dict[str, OutputFormat] = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".npy": "npy", ".parquet": "parquet", ".arrow": "arrow", ".feather": "arrow",
}  # fmt: skip
_ROWS_AT_ONCE = 256
_NPY_HEAD_BYTES = 128
"""The length of the head that numpy writes for a matrix: it pads it for a row count of any size."""
NUMBERS: dict[OutputDtype, "np.dtype[Any]"] = {
    "float": np.dtype("<f4"), "int8": np.dtype(np.int8), "uint8": np.dtype(np.uint8),
    "binary": np.dtype(np.int8), "ubinary": np.dtype(np.uint8),
}  # fmt: skip


class WindowWriter(Protocol):
    """Encodes the output of one job.

    `encode` yields what a window adds to the file, and `encode_ids` what it adds to the file of ids, if the format has
    one. Nothing depends on earlier windows, so that a file may be cut off behind any window and continued.
    """

    has_ids_file: bool

    def head(self) -> bytes:
        """Return what stands before the first window."""

    def encode(self, records: Sequence[Record], vectors: Vectors) -> Iterator[bytes]:
        """Yield the bytes of a window."""

    def encode_ids(self, records: Sequence[Record]) -> bytes:
        """Return the bytes of a window in the file of ids."""

    def finish(self, partial: Path, target: BinaryIO, num_rows: int) -> None:
        """Write the finished file from the appended one."""


def output_format(path: Path, given: OutputFormat | None) -> OutputFormat:
    """Return the format of the output: the given one, or by its suffix.

    Raises:
        BulkError: it is unknown.
    """
    found = given or _SUFFIXES.get(path.suffix.lower())
    if found is None:
        raise BulkError(
            f"the format of {path} is unknown: name it with --output-format, or end it in .jsonl or .parquet"
        )
    return found


class JobShape(msgspec.Struct, frozen=True, kw_only=True):
    """What decides about the columns of the output."""

    sources: tuple[Source, ...]
    columns: Columns
    options: EmbedOptions
    widths: VectorWidths


def open_writer(kind: OutputFormat, shape: JobShape) -> WindowWriter:
    """Return the writer of a format.

    Raises:
        BulkError: the format cannot hold these outputs, or pyarrow is missing.
    """
    if kind == "jsonl":
        return JsonlWriter(shape.columns)
    if kind == "npy":
        return NpyWriter(shape)
    return ArrowWriter(kind, shape)


class JsonlWriter:
    """Writes one JSON object a line: id, kept columns, and the outputs as the HTTP API names them."""

    has_ids_file = False

    def __init__(self, columns: Columns) -> None:
        self._columns = columns

    def head(self) -> bytes:
        """See `WindowWriter`."""
        return b""

    def encode(self, records: Sequence[Record], vectors: Vectors) -> Iterator[bytes]:
        """See `WindowWriter`; in pieces, as a window of numbers takes megabytes."""
        for start in range(0, len(records), _ROWS_AT_ONCE):
            rows = range(start, min(start + _ROWS_AT_ONCE, len(records)))
            yield b"".join(_dump(_row(records[row]) | _outputs(vectors, row)) for row in rows)

    def encode_ids(self, records: Sequence[Record]) -> bytes:
        """See `WindowWriter`."""
        return b""

    def finish(self, partial: Path, target: BinaryIO, num_rows: int) -> None:
        """See `WindowWriter`."""
        _copy(partial, target)


def _row(record: Record) -> dict[str, Any]:
    return {"id": record.id, **{name: _plain(value) for name, value in record.kept.items()}}


def _plain(value: Any) -> Any:
    """Return a value of a kept column as JSON can hold it: Parquet has dates, decimals and bytes, too."""
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    return value if isinstance(value, str | int | float | bool | None | dict | list) else str(value)


def _outputs(vectors: Vectors, row: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if vectors.dense is not None:
        found["embedding"] = vectors.dense[row]
    if vectors.sparse is not None:
        indices, values = vectors.sparse[row]
        found["sparse_embedding"] = {"indices": indices, "values": values}
    if vectors.tokens is not None:
        found["multi_vector_embedding"] = vectors.tokens[row]
    return found


def _dump(row: Mapping[str, Any]) -> bytes:
    return orjson.dumps(row, default=_contiguous, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE)


def _contiguous(value: Any) -> Any:
    """orjson asks for what it cannot write: arrays that are not contiguous, integers of more than 64 bits."""
    return np.ascontiguousarray(value) if isinstance(value, np.ndarray) else str(value)


class NpyWriter:
    """Writes the dense vectors as one matrix, and ids and kept columns as JSON lines beside it."""

    has_ids_file = True

    def __init__(self, shape: JobShape) -> None:
        if shape.options.outputs != ("dense",):
            raise BulkError(".npy holds dense vectors only: write .parquet, .arrow or .jsonl")
        self._width, self._number = shape.widths.dense, NUMBERS[shape.options.dtype]

    def head(self) -> bytes:
        """See `WindowWriter`; room for the head, which has the number of rows."""
        return b"\0" * _NPY_HEAD_BYTES

    def encode(self, records: Sequence[Record], vectors: Vectors) -> Iterator[bytes]:
        """See `WindowWriter`."""
        assert vectors.dense is not None, "checked when the writer was opened"
        yield np.ascontiguousarray(vectors.dense, self._number).tobytes()

    def encode_ids(self, records: Sequence[Record]) -> bytes:
        """See `WindowWriter`."""
        return b"".join(_dump(_row(record)) for record in records)

    def finish(self, partial: Path, target: BinaryIO, num_rows: int) -> None:
        """See `WindowWriter`."""
        head = io.BytesIO()
        fields = {"descr": np.lib.format.dtype_to_descr(self._number), "fortran_order": False}
        np.lib.format.write_array_header_1_0(head, fields | {"shape": (num_rows, self._width)})
        target.write(head.getvalue())
        _copy(partial, target, _NPY_HEAD_BYTES)


class ArrowWriter:
    """Writes Parquet or the file format of Arrow IPC, by way of an Arrow stream."""

    has_ids_file = False

    def __init__(self, kind: OutputFormat, shape: JobShape) -> None:
        from router.bulk import arrow_files  # late: pyarrow is optional

        number = NUMBERS[shape.options.dtype]
        types = arrow_files.column_types(shape.sources, shape.columns)
        self._stream = arrow_files.ArrowStream(types, shape.widths, shape.options.outputs, number)
        self._finish = arrow_files.finish_parquet if kind == "parquet" else arrow_files.finish_arrow

    def head(self) -> bytes:
        """See `WindowWriter`."""
        return self._stream.head()

    def encode(self, records: Sequence[Record], vectors: Vectors) -> Iterator[bytes]:
        """See `WindowWriter`."""
        return self._stream.encode(records, vectors)

    def encode_ids(self, records: Sequence[Record]) -> bytes:
        """See `WindowWriter`."""
        return b""

    def finish(self, partial: Path, target: BinaryIO, num_rows: int) -> None:
        """See `WindowWriter`."""
        self._finish(partial, target)


def _copy(partial: Path, target: BinaryIO, start: int = 0) -> None:
    with partial.open("rb") as source:
        source.seek(start)
        shutil.copyfileobj(source, target, 2**20)
