"""Moves the weights of an encoder to main memory and back, so that it returns to its device by copies alone.

Modules stay built: only the memory behind their tensors is freed and allocated again (as FSDP does with shards), so
that views, tied weights and whatever else refers to a tensor stay valid. Addresses change, so that recorded passes are
dropped before and recorded again after the first answers (`engines/models/later_graphs.py`).

On a GPU the copies lie in pinned memory as far as that is left. On a CPU, where both places are main memory, weights
stay where they are, and there is nothing to check when the model returns; tests copy them there too, as on a GPU. Then
memory that torch cannot free stays: weights that are mapped from a file, those that ONNX Runtime reads in place, and
those that oneDNN has packed.
"""

import resource
import threading
from collections.abc import Callable, Sequence

import structlog
import torch
from torch import Tensor, UntypedStorage

from engines.device.memory import device_memory
from engines.device.torch_runtime import finisher
from engines.errors import EngineFailed
from engines.models.base import LoadedEncoder
from engines.models.later_graphs import LaterGraphs
from engines.models.transformer import TransformerEncoder

log = structlog.get_logger(__name__)

PINNED_SHARE = 0.5
"""The part of main memory that may be pinned: pinned pages cannot be swapped or given to others."""

_ALIGNMENT = 64

_REMEDY = "ulimit -l unlimited (Docker: --ulimit memlock=-1), or more main memory; parked models stay pageable"


class PinnedMemory:
    """Counts the pinned bytes of this process. Thread-safe.

    Args:
        limit_bytes: the most that may be pinned; None: `pinned_limit_bytes`.
    """

    def __init__(self, limit_bytes: int | None = None) -> None:
        self._limit_bytes = limit_bytes
        self._lock = threading.Lock()
        self.used_bytes = 0

    def pin(self, buffer: Tensor) -> bool:
        """Pins a buffer in place; returns False, and logs why, where it stays pageable."""
        size = buffer.nbytes
        limit = pinned_limit_bytes() if self._limit_bytes is None else self._limit_bytes
        with self._lock:
            if self.used_bytes + size > limit:
                log.info(
                    "parking.not_pinned", bytes=size, pinned_bytes=self.used_bytes, limit_bytes=limit, remedy=_REMEDY
                )
                return False
            self.used_bytes += size
        code = _register(buffer)
        if code:
            with self._lock:
                self.used_bytes -= size
            log.warning("parking.not_pinned", bytes=size, cuda_error=code)
        return not code

    def unpin(self, buffer: Tensor) -> None:
        """Makes a pinned buffer pageable again."""
        _unregister(buffer)
        with self._lock:
            self.used_bytes -= buffer.nbytes


def pinned_limit_bytes() -> int:
    """Returns the most that this process may pin: `PINNED_SHARE` of main memory, of the container's where that is less,
    and no more than `ulimit -l`. CUDA itself does not look at that, but whoever set it means all pinned memory."""
    limit = int(device_memory("cpu").read().total_bytes * PINNED_SHARE)
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return limit if locked == resource.RLIM_INFINITY else min(limit, locked)


def _register(buffer: Tensor) -> int:
    """Pins memory in place and returns CUDA's error code; `pin_memory()` would round its size up to a power of two."""
    return int(torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), buffer.nbytes, 0))  # type: ignore[no-untyped-call]  # untyped upstream


def _unregister(buffer: Tensor) -> None:
    torch.cuda.cudart().cudaHostUnregister(buffer.data_ptr())  # type: ignore[no-untyped-call]  # untyped upstream


PINNED = PinnedMemory()


class HostCopy:
    """The bytes of tensors in main memory, whose own memory is freed until `restore`.

    Args:
        tensors: of one device; several may share memory.
        device: where they are.
        pinned: counts pinned memory; used on a GPU only.

    Raises:
        EngineFailed: on a GPU: some of the memory cannot be freed.
    """

    def __init__(self, tensors: Sequence[Tensor], device: torch.device, pinned: PinnedMemory = PINNED) -> None:
        self._finish, self._device, self._pinned = finisher(device), device, pinned
        distinct = {storage._cdata: storage for storage in (tensor.untyped_storage() for tensor in tensors)}
        held = [storage for storage in distinct.values() if storage.nbytes()]
        self._storages = [storage for storage in held if storage.resizable()]
        if device.type != "cpu" and len(self._storages) < len(held):
            raise EngineFailed("some of the model's weights are in memory that cannot be freed alone; it is unloaded")
        self._sizes = [storage.nbytes() for storage in self._storages]
        self._offsets = [0]
        for size in self._sizes:
            self._offsets.append(self._offsets[-1] + -(-size // _ALIGNMENT) * _ALIGNMENT)
        self._buffer = torch.empty(self._offsets[-1], dtype=torch.uint8)
        self._is_pinned = device.type != "cpu" and pinned.pin(self._buffer)
        for storage, place in zip(self._storages, self._places(), strict=True):
            place.copy_(_bytes_of(storage, device), non_blocking=True)
        self._finish()
        for storage in self._storages:
            storage.resize_(0)

    @property
    def moved_bytes(self) -> int:
        """The bytes that were freed on the device."""
        return sum(self._sizes)

    def restore(self) -> None:
        """Allocates the tensors' memory again and copies their bytes back; then the copy is gone."""
        for storage, size, place in zip(self._storages, self._sizes, self._places(), strict=True):
            storage.resize_(size)
            _bytes_of(storage, self._device).copy_(place, non_blocking=True)
        self._finish()
        self.close()

    def close(self) -> None:
        """Frees the copy."""
        if self._is_pinned:
            self._pinned.unpin(self._buffer)
            self._is_pinned = False
        self._storages, self._sizes, self._buffer = [], [], torch.empty(0, dtype=torch.uint8)

    def _places(self) -> list[Tensor]:
        """Returns the part of the buffer for each storage."""
        return [self._buffer[offset : offset + size] for offset, size in zip(self._offsets, self._sizes, strict=False)]


def _bytes_of(storage: UntypedStorage, device: torch.device) -> Tensor:
    """Returns the bytes of a storage as a tensor."""
    return torch.empty(0, dtype=torch.uint8, device=device).set_(storage)


class ParkableEncoder:
    """Parks one encoder. No pass may run between `park` and the end of `check`.

    Args:
        encoder: what is parked.
        device: where it runs.
        check: raises `SelfCheckFailed` where the encoder's vectors are not those of its check at load.
        copies: whether weights are copied on a CPU too, where both memories are the same.

    Attributes:
        is_on_cpu: whether its device is main memory itself, where a part may stay in place.
        graphs: records its passes again; None where it has none.
    """

    def __init__(
        self, encoder: LoadedEncoder, device: torch.device, check: Callable[[], None], *, copies: bool = False
    ) -> None:
        self._encoder = encoder
        self._device = device
        self._check = check
        self._copy: HostCopy | None = None
        self.graphs = LaterGraphs(encoder, check) if isinstance(encoder, TransformerEncoder) else None
        self.is_on_cpu = device.type == "cpu"
        self._copies = copies or not self.is_on_cpu
        self._was_moved = False

    def park(self) -> int:
        """Moves the weights to main memory; blocks. Returns the bytes that the device holds no more.

        Raises:
            EngineFailed: the encoder is on its fallback path, whose vectors the check cannot compare exactly, or its
                memory cannot be freed.
        """
        if self._encoder.fallback:
            raise EngineFailed("the model is on its fallback path; it is loaded again instead of being parked")
        if self.graphs is not None:
            self.graphs.drop()
        self._copy = HostCopy(self._encoder.tensors() if self._copies else [], self._device)
        return self.moved_bytes

    @property
    def moved_bytes(self) -> int:
        """The bytes that the device holds no more; 0 while the encoder is not parked."""
        return 0 if self._copy is None else self._copy.moved_bytes

    def wake(self) -> None:
        """Moves the weights back; blocks."""
        assert self._copy is not None, "it was parked"
        self._was_moved = self.moved_bytes > 0
        self._copy.restore()
        self._copy = None

    def check(self) -> None:
        """Compares vectors with those of the check at load. Recorded passes come later (`graphs`).

        Where nothing was moved, nothing has changed, and there is nothing to compare.

        Raises:
            SelfCheckFailed: they differ.
        """
        if self._was_moved:
            self._check()

    def close(self) -> None:
        """Frees the copy, if there is one."""
        if self._copy is not None:
            self._copy.close()
            self._copy = None
