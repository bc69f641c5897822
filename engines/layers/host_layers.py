"""Keeps layers of a model in main memory, and copies the weights of each to its device for its turn.

Modules stay built: only the memory behind their tensors is allocated and freed, as `engines/models/parking.py` does, so
that fused layers and tied weights go on to refer to them. accelerate's hooks put other tensors into modules instead,
which a fused layer would not see (docs/decisions/032-split-models.md).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, UntypedStorage, nn

_ATTRIBUTE = "_embedyard_host_layer"
_ALIGNMENT = 64


class HostLayer:
    """The weights of one layer in main memory. On its device there is memory for them during its turn only.

    Args:
        layer: on any device; its weights are in main memory only from now on.
        device: where it runs.
        pin: makes a buffer's memory faster to copy from, where there is a GPU.
    """

    def __init__(self, layer: nn.Module, device: torch.device, pin: Callable[[Tensor], bool]) -> None:
        self._layer, self._device, self._pin = layer, device, pin
        self._places: list[tuple[UntypedStorage, int, Tensor]] = []
        self._buffer = torch.empty(0, dtype=torch.uint8)
        setattr(layer, _ATTRIBUTE, self)
        layer.to(device)
        if not all(tensor.untyped_storage().resizable() for tensor in self._tensors()):  # mapped from files
            cast("Any", layer)._apply(torch.clone)
        self.keep()
        layer.register_forward_pre_hook(self._before)
        layer.register_forward_hook(self._after, always_call=True)

    @property
    def size_bytes(self) -> int:
        """The bytes of the weights, in main memory always and on the device during the turn."""
        return sum(size for _, size, _ in self._places)

    def keep(self) -> None:
        """Copies the weights, which are on the device, to main memory and frees them on the device."""
        distinct = {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in self._tensors()}
        held = [storage for storage in distinct.values() if storage.nbytes()]
        offsets = [0]
        for storage in held:
            offsets.append(offsets[-1] + -(-storage.nbytes() // _ALIGNMENT) * _ALIGNMENT)
        self._buffer = torch.empty(offsets[-1], dtype=torch.uint8)
        self._places = []
        for storage, offset in zip(held, offsets, strict=False):
            size = storage.nbytes()
            place = self._buffer[offset : offset + size]
            place.copy_(_bytes_of(storage, self._device))
            self._places.append((storage, size, place))
        if self._device.type != "cpu":
            self._pin(self._buffer)
        self.free()

    def bring(self) -> None:
        """Allocates memory on the device and copies the weights there."""
        for storage, size, place in self._places:
            if not storage.nbytes():
                storage.resize_(size)
                _bytes_of(storage, self._device).copy_(place, non_blocking=True)

    def free(self) -> None:
        """Frees the memory on the device. On a GPU its allocator gives it to work that is queued after this turn."""
        for storage, _, _ in self._places:
            storage.resize_(0)

    def _tensors(self) -> list[Tensor]:
        return [*self._layer.parameters(), *self._layer.buffers()]

    def _before(self, *_: Any) -> None:
        self.bring()

    def _after(self, *_: Any) -> None:
        self.free()


@contextmanager
def resident(layer: nn.Module) -> Iterator[None]:
    """Has the weights of a layer on its device inside the block, which may replace them; nothing for other layers."""
    host_layer: HostLayer | None = getattr(layer, _ATTRIBUTE, None)
    if host_layer is None:
        yield
        return
    host_layer.bring()
    try:
        yield
    finally:
        host_layer.keep()


def _bytes_of(storage: UntypedStorage, device: torch.device) -> Tensor:
    """Returns the bytes of a storage as a tensor."""
    return torch.empty(0, dtype=torch.uint8, device=device).set_(storage)
