"""Reads the tensors of safetensors files straight into the memory where they stay, in one pass over the bytes.

transformers asks for each tensor when it puts it in place, with the dtype that the parameter has. Only then memory is
allocated for it, on its device, and filled: by several threads where it is main memory and the dtype is the stored one;
else through staging buffers, pinned on a GPU, so that the dtype changes block by block (on a GPU, there). Beside the
weights a load holds these buffers only (`STAGING_BYTES`). Tensors that the model does not have are not read. Queries,
keys and values, which fused layers have as one tensor, are read one behind the other, so that these need no copy.

Files are read and not mapped: truncating a mapped file kills the process (SIGBUS), and overwriting it changes vectors.
"""

import ctypes
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from functools import cached_property, partial
from pathlib import Path
from threading import Lock
from typing import NamedTuple, Self

import torch
from torch import Tensor

from engines.affinity import num_usable_cores
from engines.device.huge_pages import use_huge_pages
from engines.device.load_throttle import is_serving, throttle_point
from engines.device.torch_runtime import finisher
from engines.hub.weight_files import read_header
from engines.models.parking import PINNED

_DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
"""Dtypes of safetensors that are read here."""

MAX_THREADS = 4
"""The most threads that read: two fill half of a memory's bandwidth already."""

STAGING_BYTES = 32 * 2**20
"""The most bytes of staging buffers beside the weights."""

_BLOCK_BYTES = 64 * 2**20
"""A load pauses for short tasks between blocks of this size, which take some 10 ms from the page cache."""

_CALL_BYTES, _CALL_TENSORS = 2**30, 1000
"""The most bytes and tensors of one call that reads ahead; Linux reads 2 GiB and 1,024 pieces of memory at once."""

_PART_BYTES = 2**20
"""Smaller parts of a block are not worth a thread."""


class WeightReader:
    """Reads one model's weight files, on the thread that loads it and a few helpers. Use it as a context manager.

    Args:
        folder: where the files are.
        files: their names in it.
        device: where tensors are put.
        num_threads: that read; None for one a core, and at most `MAX_THREADS`.

    Raises:
        BrokenFiles: a header is broken.
        OSError: a file cannot be opened.
    """

    def __init__(
        self, folder: Path, files: Sequence[str], device: torch.device, num_threads: int | None = None
    ) -> None:
        self._device, self._finish = device, finisher(device)
        self._num_threads = num_threads or min(MAX_THREADS, num_usable_cores())
        self._places: dict[str, _Place] = {}
        self._read_names: set[str] = set()
        self._ahead: dict[str, _Ahead] = {}
        with ExitStack() as opened:
            self._helpers = opened.enter_context(ThreadPoolExecutor(MAX_THREADS, thread_name_prefix="weights"))
            for file in files:
                descriptor = os.open(folder / file, os.O_RDONLY)
                opened.callback(os.close, descriptor)
                self._places |= _places(file, descriptor)
            largest = max((place.size for place in self._places.values()), default=0)
            self._staging = opened.enter_context(_Staging(min(STAGING_BYTES // 2, -(-largest // 8) * 8), device))
            self._readers = ThreadPoolExecutor(self._num_threads, thread_name_prefix="weights")
            opened.callback(
                self._readers.shutdown, cancel_futures=True
            )  # first, as the readers use what is closed then
            self._opened = opened.pop_all()
        self._groups, self._lock = _joined_groups(self._places), Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    @property
    def can_read_all(self) -> bool:
        """Tells whether the files have only tensors of dtypes that are read here."""
        return all(place.stored is not None for place in self._places.values())

    @property
    def names_read(self) -> frozenset[str]:
        """Returns the names of the tensors that were read so far."""
        return frozenset(self._read_names)

    def read_ahead(self, names: Iterable[str], dtype: torch.dtype) -> None:
        """Begins to read these tensors into main memory, as far as they are stored in this dtype, if nothing is served.

        Few calls read a whole file, and need no interpreter lock meanwhile: a tokenizer and modules are built beside
        them, in Python. They cannot pause for short tasks, so that beside those tensors are read one by one.
        """
        places = [self._places[name] for name in names if name in self._places]
        if self._device.type != "cpu" or is_serving() or any(place.stored != dtype for place in places):
            return
        ordered = sorted(
            (name for name in names if name in self._places),
            key=lambda name: (self._places[name].descriptor, self._places[name].start),
        )
        self._ahead = {name: _Ahead(self._memory(name, dtype)) for name in ordered}
        self._read_names.clear()
        total = sum(place.size for place in places)
        for part in _parts([(self._places[name], self._ahead[name]) for name in ordered], total, self._num_threads):
            future = self._readers.submit(part.read)
            for ahead in part.tensors:
                ahead.read_by.append(future)

    def tensors(self) -> "dict[str, StoredTensor]":
        """Returns the tensors of all files by name, none of which is read yet."""
        return {name: StoredTensor(self, name) for name in self._places}

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """Reads a tensor, in a dtype or as it is stored, into new memory on the device; blocks.

        One at a time: transformers asks on several threads where its environment lets it, and buffers are shared.

        Raises:
            EOFError: the file has been truncated since it was opened.
            OSError: it cannot be read.
        """
        with self._lock:
            return self._read(name, dtype)

    def _read(self, name: str, dtype: torch.dtype | None) -> Tensor:
        place, ahead = self._places[name], self._ahead.pop(name, None)
        assert place.stored is not None, "can_read_all"
        if ahead is not None and dtype in (None, place.stored):
            self._read_names.add(name)
            return ahead.result()
        made = self._memory(name, dtype or place.stored)
        if made.dtype == place.stored and self._device.type == "cpu":
            self._fill(place.descriptor, place.start, _bytes_at(made))
        else:
            self._fill_by_staging(place, made.view(-1), place.stored)
        return made

    def _memory(self, name: str, dtype: torch.dtype) -> Tensor:
        """Returns new memory for a tensor: its part of that of its group, when it is read first."""
        place, group = self._places[name], self._groups.get(name)
        is_first = name not in self._read_names
        self._read_names.add(name)
        if group is None or not is_first or group.dtype not in (None, dtype):
            return self._allocated(place.shape, dtype)
        if group.memory is None:
            rows = sum(self._places[part].shape[0] for part in group.names)
            group.dtype, group.memory = dtype, self._allocated((rows, *place.shape[1:]), dtype)
        first = sum(self._places[part].shape[0] for part in group.names[: group.names.index(name)])
        return group.memory[first : first + place.shape[0]]

    def _allocated(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        made = torch.empty(shape, dtype=dtype, device=self._device)
        use_huge_pages(made)
        return made

    def _fill(self, descriptor: int, start: int, memory: memoryview) -> None:
        """Reads into main memory, with all threads."""
        for begin in range(0, len(memory), _BLOCK_BYTES):
            block = memory[begin : begin + _BLOCK_BYTES]
            size = max(_PART_BYTES, -(-len(block) // self._num_threads))
            own, *others = (
                partial(_read, descriptor, start + begin + at, block[at : at + size])
                for at in range(0, len(block), size)
            )
            reading = [self._helpers.submit(other) for other in others]
            try:
                own()
            finally:  # no thread may write into memory that is given up
                errors = [future.exception() for future in reading]
            for error in filter(None, errors):
                raise error
            throttle_point()

    def _fill_by_staging(self, place: "_Place", made: Tensor, stored: torch.dtype) -> None:
        """Reads into staging buffers and copies from these; on a GPU one is filled while the other is copied."""
        step = self._staging.size // stored.itemsize
        for number, begin in enumerate(range(0, len(made), step)):
            part = made[begin : begin + step]
            buffers = self._staging.buffers
            staged = buffers[number % len(buffers)][: len(part) * stored.itemsize]
            self._fill(place.descriptor, place.start + begin * stored.itemsize, _bytes_at(staged))
            self._finish()  # of the copy before, whose buffer is the next to be filled
            part.copy_(staged.view(stored).to(self._device, non_blocking=True))
        self._finish()


class _Ahead:
    """A tensor that is being read. `read_by`: the calls that read parts of it."""

    def __init__(self, memory: Tensor) -> None:
        self.memory = memory
        self.read_by: list[Future[None]] = []

    def result(self) -> Tensor:
        """Waits until all of it is there.

        Raises:
            EOFError, OSError: it cannot be read.
        """
        for future in self.read_by:
            future.result()
        return self.memory


class _Part:
    """A range of a file that one call reads, into the memory of the tensors that lie there."""

    def __init__(self, descriptor: int, start: int) -> None:
        self.descriptor, self.start, self.size = descriptor, start, 0
        self.memory: list[memoryview] = []
        self.tensors: list[_Ahead] = []

    def add(self, ahead: _Ahead, memory: memoryview) -> None:
        """Appends a part of a tensor, which follows the last one in the file."""
        self.size += len(memory)
        self.memory.append(memory)
        self.tensors.append(ahead)

    def read(self) -> None:
        """Reads all of it.

        Raises:
            EOFError: the file ends before.
            OSError: it cannot be read.
        """
        _read_into(self.descriptor, self.start, self.memory)


def _parts(tensors: Sequence[tuple["_Place", _Ahead]], total: int, num_threads: int) -> list[_Part]:
    """Divides tensors, ordered as they lie in the files, into parts of about equal size, at least one a thread."""
    largest = min(_CALL_BYTES, -(-total // num_threads))
    parts: list[_Part] = []
    for place, ahead in tensors:
        memory, at = _bytes_at(ahead.memory), 0
        while at < len(memory):
            last = parts[-1] if parts else None
            follows = last is not None and (last.descriptor, last.start + last.size) == (
                place.descriptor,
                place.start + at,
            )
            if last is None or not follows or last.size >= largest or len(last.memory) >= _CALL_TENSORS:
                last = _Part(place.descriptor, place.start + at)
                parts.append(last)
            piece = memory[at : at + largest - last.size]
            last.add(ahead, piece)
            at += len(piece)
    return parts


class StoredTensor:
    """A tensor of a weight file, which is read when it is moved: as transformers handles a slice of safetensors."""

    def __init__(self, reader: WeightReader, name: str) -> None:
        self._reader = reader
        self._name = name

    def __getitem__(self, key: object) -> Self:
        """Returns the tensor itself, for `...` only.

        Raises:
            IndexError: a part of it is asked for.
        """
        if key is not Ellipsis:
            raise IndexError("a stored tensor is read as a whole")
        return self

    def to(self, device: object = None, dtype: torch.dtype | None = None) -> Tensor:
        """Reads the tensor in this dtype, onto the reader's device, whatever the one that is asked for."""
        return self._reader.read(self._name, dtype)


class _Place(NamedTuple):
    """Where a tensor stands in a file. `start` and `size`: bytes; `stored`: None for a dtype that is not read here."""

    descriptor: int
    start: int
    size: int
    shape: tuple[int, ...]
    stored: torch.dtype | None


class _Group:
    """Tensors that are read one behind the other, by their names in order; memory and dtype are set by the first."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self.memory: Tensor | None = None
        self.dtype: torch.dtype | None = None


_JOINED = (("query", "key", "value"), ("q", "k", "v"), ("q_lin", "k_lin", "v_lin"), ("q_proj", "k_proj", "v_proj"))
"""Names, in a tensor's name, of the parts that fused layers join (`engines/layers/fused.py`, `decoder.py`)."""


def _joined_groups(places: Mapping[str, _Place]) -> dict[str, _Group]:
    """Returns the group of each tensor that has one. Being in one means that memory is shared, and nothing else."""
    groups: dict[str, _Group] = {}
    for name in places:
        parts = name.split(".")
        for joined in _JOINED:
            if joined[0] not in parts:
                continue
            at = len(parts) - 1 - parts[::-1].index(joined[0])
            names = [".".join((*parts[:at], part, *parts[at + 1 :])) for part in joined]
            found = [places[each] for each in names if each in places]
            is_alike = len({(place.stored, place.shape[1:], bool(place.shape)) for place in found}) == 1
            if len(found) == len(joined) and is_alike and found[0].shape:
                groups |= dict.fromkeys(names, _Group(names))
    return groups


def _places(file: str, descriptor: int) -> dict[str, _Place]:
    def read(_: str, start: int, end: int) -> bytes:
        return os.pread(descriptor, end - start, start)

    size = os.fstat(descriptor).st_size
    entries = read_header(file, size, read)
    first = size - max((entry.end for entry in entries), default=0)  # the tensors fill the file to its end
    return {
        entry.name: _Place(
            descriptor, first + entry.start, entry.end - entry.start, entry.shape, _DTYPES.get(entry.dtype)
        )
        for entry in entries
    }


class _Staging:
    """Buffers in main memory, made when they are needed first.

    One on a CPU; two on a GPU, where a copy goes on while the next block is read, pinned as far as that is left.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self.size = size
        self._num = 1 if device.type == "cpu" else 2
        self._is_pinned = device.type != "cpu" and torch.cuda.is_available()
        self._pinned: list[Tensor] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for buffer in self._pinned:
            PINNED.unpin(buffer)
        self._pinned = []

    @cached_property
    def buffers(self) -> list[Tensor]:
        """The buffers, uint8 `[size]` each."""
        made = [torch.empty(self.size, dtype=torch.uint8) for _ in range(self._num)]
        self._pinned = [buffer for buffer in made if self._is_pinned and PINNED.pin(buffer)]
        return made


def _read(descriptor: int, start: int, memory: memoryview) -> None:
    _read_into(descriptor, start, [memory])


def _read_into(descriptor: int, start: int, memory: Sequence[memoryview]) -> None:
    """Reads until all of the memory is full.

    Raises:
        EOFError: the file ends before.
        OSError: it cannot be read.
    """
    left = [piece for piece in memory if piece]
    while left:
        count = os.preadv(descriptor, left, start)
        if not count:
            raise EOFError("the file was truncated while it was read")
        start += count
        while left and count >= len(left[0]):
            count -= len(left.pop(0))
        if left:
            left[0] = left[0][count:]


def _bytes_at(tensor: Tensor) -> memoryview:
    """Returns the memory of a contiguous tensor. Not by `numpy()`, after which torch cannot free it alone."""
    size = tensor.nbytes
    return memoryview((ctypes.c_ubyte * size).from_address(tensor.data_ptr())).cast("B") if size else memoryview(b"")
