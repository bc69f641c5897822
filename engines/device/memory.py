"""Reads how much memory a device has, and how much of it this process could use now. Knows no models.

On the CPU a container's limit (cgroup v1 or v2) counts like the machine's own size.
"""

from pathlib import Path
from typing import Protocol

import psutil
from msgspec import Struct

_UNLIMITED = 1 << 60


class MemoryReading(Struct, frozen=True):
    """The memory of a device at one moment.

    Args:
        total_bytes: of the device, or of the container where that is less.
        ceiling_bytes: free memory plus what models of this process hold already.
    """

    total_bytes: int
    ceiling_bytes: int | None = None


class DeviceMemory(Protocol):
    """Reads the memory of one device. Called on a thread: the first call may open a CUDA context."""

    def read(self) -> MemoryReading:
        """Reads the present figures; other processes use the device too."""


def device_memory(device: str) -> DeviceMemory:
    """Returns the reader for `cpu`, `cuda` or `cuda:N`."""
    kind, _, index = device.partition(":")
    return CudaMemory(int(index or 0)) if kind == "cuda" else CpuMemory()


class CudaMemory:
    """Reads the memory of a GPU. What torch's allocator has reserved is this process's own: it counts as available."""

    def __init__(self, index: int) -> None:
        self._index = index

    def read(self) -> MemoryReading:
        import torch  # late: the router imports this module through `engines.host`, and must not wait for torch

        free, total = torch.cuda.mem_get_info(self._index)
        return MemoryReading(total, free + torch.cuda.memory_reserved(self._index))


class CpuMemory:
    """Reads main memory.

    The kernel counts models that are mapped from files as available; those that were copied are this process's
    anonymous memory. So the ceiling is what is available, plus what this process has grown by since it began.

    Args:
        root: where `/proc` and `/sys` are mounted.
    """

    def __init__(self, root: Path = Path("/")) -> None:
        self._root = root
        self._own_at_start = anonymous_bytes()

    def read(self) -> MemoryReading:
        machine = psutil.virtual_memory()
        total, available = machine.total, machine.available
        limit = cgroup_limit(self._root)
        if limit is not None:
            total, available = min(total, limit.limit_bytes), min(available, limit.available_bytes)
        return MemoryReading(total, available + max(0, anonymous_bytes() - self._own_at_start))


def anonymous_bytes() -> int:
    """Returns the resident memory of this process that no file backs."""
    info = psutil.Process().memory_info()
    return int(info.rss - getattr(info, "shared", 0))


SPARE_SHARE = 0.5
"""The part of free main memory that parked models may take by default; the rest is for others' growth, for loads, whose
files are in the page cache, and for tokenizers and requests."""

RESERVED_BYTES = 4 * 2**30
"""Free main memory that is left alone before anything is shared out: a small machine parks nothing by default."""


def spare_bytes(reading: MemoryReading) -> int:
    """Returns the main memory that parked models may take where nobody has set a budget."""
    free_bytes = reading.total_bytes if reading.ceiling_bytes is None else reading.ceiling_bytes
    return int(max(0, free_bytes - RESERVED_BYTES) * SPARE_SHARE)


class CgroupLimit(Struct, frozen=True):
    """A memory limit of this process. Page cache counts as free: the kernel drops it before it kills a process."""

    limit_bytes: int
    used_bytes: int

    @property
    def available_bytes(self) -> int:
        return max(0, self.limit_bytes - self.used_bytes)


def cgroup_limit(root: Path) -> CgroupLimit | None:
    """Returns the tightest limit of the container, None without one. Limits nest: every level up to the top is read."""
    found = [limit for folder, version in _cgroup_folders(root) if (limit := _limit_of(folder, version)) is not None]
    return min(found, key=lambda limit: limit.limit_bytes, default=None)


def _cgroup_folders(root: Path) -> list[tuple[Path, int]]:
    """Returns the folders of this process's control groups and of all above them, with the cgroup version of each.

    Inside a container the named path often does not exist, while the mount itself is the container's own group.
    """
    folders: list[tuple[Path, int]] = []
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        version = 2 if not controllers else 1
        if version == 1 and "memory" not in controllers.split(","):
            continue
        mount = root / "sys/fs/cgroup" if version == 2 else root / "sys/fs/cgroup/memory"
        parts = [part for part in path.split("/") if part not in ("", "..")]
        folders += [(mount.joinpath(*parts[:depth]), version) for depth in range(len(parts) + 1)]
    return folders


def _limit_of(folder: Path, version: int) -> CgroupLimit | None:
    limit_name, used_name = ("memory.max", "memory.current") if version == 2 else (
        "memory.limit_in_bytes", "memory.usage_in_bytes"
    )  # fmt: skip
    limit, used = _number(folder / limit_name), _number(folder / used_name)
    if limit is None or limit >= _UNLIMITED:
        return None
    stat = dict(line.split(maxsplit=1) for line in _lines(folder / "memory.stat") if " " in line)
    prefix = "" if version == 2 else "total_"
    cache = sum(int(stat.get(f"{prefix}{name}", 0)) for name in ("inactive_file", "active_file"))
    return CgroupLimit(limit, max(0, (used or 0) - cache))


def _number(path: Path) -> int | None:
    """Returns the number in a file; None for a missing file, and for `max`."""
    text = "".join(_lines(path)[:1])
    return int(text) if text.isdigit() else None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
