"""Parquet and Arrow IPC, by pyarrow: the extra `embedyard[bulk]` (170 MB installed), which nothing else needs."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
import numpy as np
from numpy.typing import NDArray

from router.bulk.records import BulkError, Record, Vectors, VectorWidths
from router.bulk.sources import Columns, Source, check_columns

try:
    import pyarrow as pa
    import pyarrow.ipc as ipc
    import pyarrow.parquet as pq
except ImportError as error:
    raise BulkError("Parquet and Arrow need pyarrow, which is not installed: pip install 'embedyard[bulk]'") from error

_ROWS_AT_ONCE = 1024
_GROUP_BYTES = 8 * 2**20
"""Of a row group of the written Parquet file: what is in memory while it is written."""


def open_parquet(path: str) -> Any:
    """Open a Parquet file so that its pages are read as they are needed.

    Raises:
        BulkError: it is no Parquet file.
    """
    try:
        return pq.ParquetFile(path, pre_buffer=False, buffer_size=2**20)
    except (OSError, pa.ArrowException):
        raise BulkError(f"{path} is not a Parquet file that can be read") from None


def read_rows(source: Source, columns: Columns, start: int) -> Iterator[Mapping[str, Any]]:
    """Yield the rows from `start` on; row groups before it are not read."""
    with open_parquet(source.path) as file:
        check_columns(source, columns, file.schema_arrow.names)
        names = list(dict.fromkeys([columns.text, *([columns.id] if columns.id else []), *columns.kept]))
        groups: list[int] = []
        skip = start
        for group in range(file.num_row_groups):
            num_rows = file.metadata.row_group(group).num_rows
            if not groups and skip >= num_rows:
                skip -= num_rows
            else:
                groups.append(group)
        if not groups:
            return
        for batch in file.iter_batches(_ROWS_AT_ONCE, row_groups=groups, columns=names):
            if skip >= batch.num_rows:
                skip -= batch.num_rows
                continue
            yield from batch.slice(skip).to_pylist()
            skip = 0


def column_types(sources: "Sequence[Source]", columns: "Columns") -> "dict[str, Any]":
    """Return the Arrow types of the id and the kept columns.

    Parquet's own where all files are Parquet and agree; else ids are int64 where they are numbers of records, and
    everything else is a string.
    """
    found: dict[str, Any] = {"id": pa.int64() if columns.id is None else pa.string()}
    found |= {name: pa.string() for name in columns.kept}
    if not all(source.format == "parquet" for source in sources):
        return found
    schemas = [open_parquet(source.path).schema_arrow for source in sources]
    for name, origin in [("id", columns.id), *((name, name) for name in columns.kept)]:
        types = {
            str(schema.field(origin).type): schema.field(origin).type for schema in schemas if origin in schema.names
        }
        if len(types) == 1 and (name != "id" or pa.types.is_integer(next(iter(types.values())))):
            found[name] = next(iter(types.values()))
    return found


class ArrowStream:
    """Encodes windows as messages of an Arrow stream, which can be cut off behind any of them.

    Args:
        types: of the id and the kept columns.
        widths: of the vectors.
        outputs: which columns of vectors there are.
        number: the numpy type of dense vectors and those of tokens.
    """

    def __init__(
        self, types: Mapping[str, Any], widths: VectorWidths, outputs: Sequence[str], number: "np.dtype[Any]"
    ) -> None:
        value = pa.from_numpy_dtype(number)
        fields = [pa.field(name, kind) for name, kind in types.items()]
        if "dense" in outputs:
            fields.append(pa.field("embedding", pa.list_(value, widths.dense)))
        if "sparse" in outputs:
            terms = [pa.field("indices", pa.list_(pa.int32())), pa.field("values", pa.list_(pa.float32()))]
            fields.append(pa.field("sparse_embedding", pa.struct(terms)))
        if "multi_vector" in outputs:
            fields.append(pa.field("multi_vector_embedding", pa.list_(pa.list_(value, widths.tokens))))
        self._types, self._widths = types, widths
        self._schema = pa.schema(fields)

    def head(self) -> bytes:
        """Return the message with the schema."""
        return bytes(self._schema.serialize())

    def encode(self, records: Sequence[Record], vectors: Vectors) -> Iterator[bytes]:
        """Yield the message of a window."""
        arrays = [self._plain_column(name, kind, records) for name, kind in self._types.items()]
        if vectors.dense is not None:
            arrays.append(_fixed_lists(vectors.dense))
        if vectors.sparse is not None:
            entries, weights = ([row[side] for row in vectors.sparse] for side in (0, 1))
            arrays.append(pa.StructArray.from_arrays([_lists(entries), _lists(weights)], ["indices", "values"]))
        if vectors.tokens is not None:
            rows = np.concatenate([*vectors.tokens])
            offsets = np.cumsum([0, *map(len, vectors.tokens)]).astype(np.int32)
            arrays.append(pa.ListArray.from_arrays(pa.array(offsets), _fixed_lists(rows)))
        yield bytes(pa.RecordBatch.from_arrays(arrays, schema=self._schema).serialize())

    def _plain_column(self, name: str, kind: Any, records: Sequence[Record]) -> Any:
        cells: list[Any] = [record.id if name == "id" else record.kept[name] for record in records]
        if pa.types.is_string(kind):
            cells = [
                cell if cell is None or isinstance(cell, str) else msgspec.json.encode(cell).decode() for cell in cells
            ]
        return pa.array(cells, type=kind)


def _fixed_lists(matrix: Any) -> Any:
    return pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(matrix).reshape(-1)), matrix.shape[1])


def _lists(rows: Sequence[NDArray[Any]]) -> Any:
    offsets = np.cumsum([0, *map(len, rows)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate([*rows])))


def finish_arrow(stream: Path, target: BinaryIO) -> None:
    """Write the file format of Arrow IPC from a stream without its end."""
    with stream.open("rb") as source:
        reader = ipc.open_stream(source)
        with ipc.new_file(target, reader.schema) as writer:
            for batch in reader:
                writer.write_batch(batch)


def finish_parquet(stream: Path, target: BinaryIO) -> None:
    """Write Parquet from a stream without its end, in row groups of about 8 MB."""
    with stream.open("rb") as source:
        reader = ipc.open_stream(source)
        with pq.ParquetWriter(target, reader.schema, compression="zstd", use_dictionary=False) as writer:
            group: list[Any] = []
            for batch in reader:
                group.append(batch)
                if sum(one.nbytes for one in group) >= _GROUP_BYTES:
                    writer.write_table(pa.Table.from_batches(group))
                    group = []
                    pa.default_memory_pool().release_unused()
            if group:
                writer.write_table(pa.Table.from_batches(group))
