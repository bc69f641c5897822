"""Checks that weight files are complete and computes their size on a device.

Owns the safetensors header (8 bytes of length, a JSON of tensors, then the data) and the byte arithmetic. Reads bytes
through a `ReadRange`, which serves folders and hubs alike.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from engines.errors import BrokenFiles
from engines.form_cache import LENGTH_BYTES

ReadRange = Callable[[str, int, int], bytes]
"""(file, start, end) → the bytes from `start` up to and excluding `end`."""

DTYPE_BITS: Mapping[str, int] = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "U16": 16, "I16": 16, "F16": 16, "BF16": 16,
    "U32": 32, "I32": 32, "F32": 32, "U64": 64, "I64": 64, "F64": 64, "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
"""Bits per element of the safetensors dtypes."""

BYTES_OF: Mapping[str, float] = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "int8": 1, "int4": 0.625}
"""Bytes per element of the dtypes that models are stored and run in; int4 with the scales of its groups of 32."""

_ATTENDS = re.compile(r"self_attn\.[qkv]_proj\.weight$")
"""Names of a decoder's matrices that give queries, keys or values."""

_INT8_BESIDE_INT4 = re.compile(r"embed|(query|key|value|[qkv]_(proj|lin)|attn\.[qkv]|qkv)\.weight$")
"""Names of matrices that keep a byte a weight where int4 is asked for: tables; queries, keys and values."""

_BYTES_A_ROW = 8
"""Beside a row of int8: its scale and its sum."""

_CONFIG = "config.json"
_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library itself
_FIRST_READ_BYTES = 128 * 1024  # holds nearly every header, so that one request is enough


class WeightCount(Struct, frozen=True, kw_only=True):
    """The contents of a model's weight files, before a dtype is chosen.

    `float_elements` are converted on loading, `fixed_bytes` (integers, booleans) are not. `matrix_elements` are in
    matrices, which have `matrix_rows` in all, and `matrix_int8_bytes` where int8 is asked for, beside a float32 scale a
    row; `matrix_int4_bytes` where int4 is. `pickled_bytes` is the size of pytorch_model.bin files, whose `stored_dtype`
    comes from config.json.
    """

    float_elements: int = 0
    matrix_elements: int = 0
    matrix_int8_bytes: int = 0
    matrix_int4_bytes: int = 0
    matrix_rows: int = 0
    fixed_bytes: int = 0
    pickled_bytes: int = 0
    stored_dtype: str = "float32"

    def bytes_in(self, dtype: str) -> int:
        """Returns the bytes of the weights once loaded in `dtype`.

        An upper bound: it counts every tensor in the files, while an embedder drops the heads (`cls`, `lm_head`,
        `pooler`). For pickled files it is an estimate from their size.
        """
        element_bytes = BYTES_OF[dtype]
        pickled = math.ceil(self.pickled_bytes * element_bytes / BYTES_OF.get(self.stored_dtype, 2))
        if dtype in ("int8", "int4"):
            rest = self.float_elements - self.matrix_elements
            wide = _BYTES_A_ROW * self.matrix_rows + 4 * rest
            rounded = self.matrix_int8_bytes if dtype == "int8" else self.matrix_int4_bytes
            return rounded + wide + self.fixed_bytes + pickled
        return math.ceil(self.float_elements * element_bytes) + self.fixed_bytes + pickled


class TensorEntry(Struct, frozen=True):
    """One tensor of a header; `start` and `end` are byte offsets in the data section."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def int8_bytes(self) -> int:
        """Bytes where int8 is asked for.

        A decoder's queries, keys and values keep 16 bits (`engines/models/weight_forms.py`).
        """
        return self.elements * (2 if _ATTENDS.search(self.name) else 1)

    @property
    def int4_bytes(self) -> int:
        """Bytes where int4 is asked for (`engines/layers/weight_only.py`)."""
        fits = not (self.shape[0] % 64 or self.shape[1] % 32) and not _INT8_BESIDE_INT4.search(self.name)
        return math.ceil(self.elements * BYTES_OF["int4"]) if fits else self.elements

    @property
    def is_float(self) -> bool:
        return self.dtype.startswith(("F", "BF"))


def target_dtype(dtype: str, device: str) -> str:
    """Returns the dtype that a model runs in: `auto` is float32 on CPU and bfloat16 on a GPU."""
    if dtype != "auto":
        return dtype
    return "float32" if device.split(":")[0] == "cpu" else "bfloat16"


def read_header(file: str, size_bytes: int, read: ReadRange) -> tuple[TensorEntry, ...]:
    """Returns the tensors of a safetensors file of `size_bytes`, after checking that they fill it exactly.

    Raises:
        BrokenFiles: truncated, overlong, or not a safetensors file.
    """
    head = read(file, 0, min(size_bytes, _FIRST_READ_BYTES))
    length = int.from_bytes(head[:LENGTH_BYTES], "little")
    data_start = LENGTH_BYTES + length
    if len(head) < LENGTH_BYTES or length > _MAX_HEADER_BYTES or data_start > size_bytes:
        raise _broken_error(file, f"its header claims {length} bytes, but the file has {size_bytes}")
    if data_start > len(head):
        head += read(file, len(head), data_start)
    tensors = _tensors(file, head[LENGTH_BYTES:data_start])
    _check_offsets(file, tensors, size_bytes - data_start)
    return tensors


def count_weights(sizes: Mapping[str, int], weights: Iterable[str], read: ReadRange) -> WeightCount:
    """Sums up the weight files of a model; `sizes` holds the bytes of all its files.

    Raises:
        BrokenFiles: a safetensors header is broken.
    """
    files = tuple(weights)
    safetensors = [file for file in files if file.endswith(".safetensors")]
    pickled = [file for file in files if file not in safetensors]
    tensors = [tensor for file in safetensors for tensor in read_header(file, sizes[file], read)]
    matrices = [tensor for tensor in tensors if tensor.is_float and len(tensor.shape) == 2]
    return WeightCount(
        float_elements=sum(tensor.elements for tensor in tensors if tensor.is_float),
        matrix_elements=sum(matrix.elements for matrix in matrices),
        matrix_int8_bytes=sum(matrix.int8_bytes for matrix in matrices),
        matrix_int4_bytes=sum(matrix.int4_bytes for matrix in matrices),
        matrix_rows=sum(matrix.shape[0] for matrix in matrices),
        fixed_bytes=sum(tensor.end - tensor.start for tensor in tensors if not tensor.is_float),
        pickled_bytes=sum(sizes[file] for file in pickled),
        stored_dtype=_stored_dtype(pickled, sizes, read),
    )


def read_range(folder: Path, file: str, start: int, end: int) -> bytes:
    """Reads a byte range of a file in `folder`; with the folder bound it is a `ReadRange`."""
    with (folder / file).open("rb") as content:
        content.seek(start)
        return content.read(end - start)


def _stored_dtype(pickled: Sequence[str], sizes: Mapping[str, int], read: ReadRange) -> str:
    """Returns the dtype of the stored weights according to config.json; float32 for older configs without one."""
    configs = [f"{folder}{_CONFIG}" for folder in dict.fromkeys(file[: file.rfind("/") + 1] for file in pickled)]
    config_json = next((read(name, 0, sizes[name]) for name in configs if name in sizes), b"{}")
    try:
        config = msgspec.json.decode(config_json)
    except msgspec.DecodeError:
        return "float32"
    named = str(config.get("dtype") or config.get("torch_dtype")) if isinstance(config, dict) else ""
    return named if named in BYTES_OF else "float32"


def _tensors(file: str, header: bytes) -> tuple[TensorEntry, ...]:
    try:
        entries = msgspec.json.decode(header)
        return tuple(_tensor(name, entry) for name, entry in entries.items() if name != "__metadata__")
    except (msgspec.DecodeError, AttributeError, KeyError, TypeError, ValueError, RecursionError):
        raise _broken_error(file, "it has no valid safetensors header") from None


def _tensor(name: str, entry: dict[str, Any]) -> TensorEntry:
    start, end = msgspec.convert(entry["data_offsets"], tuple[int, int])
    shape = msgspec.convert(entry["shape"], tuple[int, ...])
    return TensorEntry(name, str(entry["dtype"]), shape, start, end)


def _check_offsets(file: str, tensors: Iterable[TensorEntry], data_bytes: int) -> None:
    """Checks that the tensors fill the data section without gaps and that their sizes match their shapes.

    Raises:
        BrokenFiles: they do not.
    """
    position = 0
    for tensor in sorted(tensors, key=lambda tensor: (tensor.start, tensor.end)):
        bits = DTYPE_BITS.get(tensor.dtype)
        if tensor.start != position or tensor.end < tensor.start:
            raise _broken_error(file, f"tensor {tensor.name} starts at byte {tensor.start} instead of {position}")
        if bits is not None and (tensor.end - tensor.start) * 8 != tensor.elements * bits:
            num_bytes, needed_bytes = tensor.end - tensor.start, tensor.elements * bits // 8
            raise _broken_error(file, f"tensor {tensor.name} has {num_bytes} bytes, but its shape needs {needed_bytes}")
        position = tensor.end
    if position != data_bytes:
        raise _broken_error(file, f"its tensors take {position} bytes, but the file holds {data_bytes}")


def _broken_error(file: str, reason: str) -> BrokenFiles:
    return BrokenFiles(f"{file} is truncated or corrupt: {reason}", file=file)
