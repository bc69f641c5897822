"""Reads the tensors of safetensors files straight into the memory where they stay, in one pass over the bytes.

transformers asks for each tensor when it puts it in place, with the dtype that the parameter has. Only then memory is
allocated for it, on its device, and filled: by several threads where it is main memory and the dtype is the stored one;
else through staging buffers, pinned on a GPU, so that the dtype changes block by block (on a GPU, there). Beside the
weights a load holds these buffers only (`STAGING_BYTES`). Tensors that the model does not have are not read.

Files are read and not mapped: truncating a mapped file kills the process (SIGBUS), and overwriting it changes vectors.
"""

import ctypes
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple, Self

import torch
from torch import Tensor

from engines.affinity import num_usable_cores
from engines.device.huge_pages import use_huge_pages
from engines.device.load_throttle import throttle_point
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
        with ExitStack() as opened:
            self._helpers = opened.enter_context(ThreadPoolExecutor(MAX_THREADS, thread_name_prefix="weights"))
            for file in files:
                descriptor = os.open(folder / file, os.O_RDONLY)
                opened.callback(os.close, descriptor)
                self._places |= _places(file, descriptor)
            largest = max((place.size for place in self._places.values()), default=0)
            self._staging = opened.enter_context(_Staging(min(STAGING_BYTES // 2, -(-largest // 8) * 8), device))
            self._opened = opened.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    @property
    def can_read_all(self) -> bool:
        """Tells whether the files have only tensors of dtypes that are read here."""
        return all(place.stored is not None for place in self._places.values())

    def tensors(self) -> "dict[str, StoredTensor]":
        """Returns the tensors of all files by name, none of which is read yet."""
        return {name: StoredTensor(self, name) for name in self._places}

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """Reads a tensor, in a dtype or as it is stored, into new memory on the device; blocks.

        Raises:
            EOFError: the file has been truncated since it was opened.
            OSError: it cannot be read.
        """
        place = self._places[name]
        assert place.stored is not None, "can_read_all"
        made = torch.empty(place.shape, dtype=dtype or place.stored, device=self._device)
        if made.dtype == place.stored and self._device.type == "cpu":
            use_huge_pages(made)
            self._fill(place.descriptor, place.start, _bytes_at(made))
        else:
            self._fill_by_staging(place, made.view(-1), place.stored)
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
    """Reads until the memory is full.

    Raises:
        EOFError: the file ends before.
        OSError: it cannot be read.
    """
    while memory:
        count = os.preadv(descriptor, [memory], start)
        if not count:
            raise EOFError("the file was truncated while it was read")
        start, memory = start + count, memory[count:]


def _bytes_at(tensor: Tensor) -> memoryview:
    """Returns the memory of a contiguous tensor. Not by `numpy()`, after which torch cannot free it alone."""
    size = tensor.nbytes
    return memoryview((ctypes.c_ubyte * size).from_address(tensor.data_ptr())).cast("B") if size else memoryview(b"")
