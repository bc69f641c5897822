"""Puts the layers of a model on several devices, the last ones in main memory, and moves activations between them.

All other modules (embeddings, norms, heads) are on the first device, the model's home. A layer gets its inputs on its
own device, and the last one gives its output at home; so the model's own forward, and the packed and fused paths that
replace parts of it, run as on one device.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate.utils import check_device_map, send_to_device
from torch import Tensor, nn

from engines.errors import UnsupportedModel
from engines.layers.host_layers import HostLayer
from engines.layers.packing import PackedLayout
from engines.models.adapters import layers_of, storage_bytes
from engines.protocols import Placement


class PlacedModel:
    """A model whose layers are on several devices.

    Args:
        model: in main memory.
        placement: where its parts go; the first part is everything but the layers.
        pin: makes a buffer in main memory faster to copy from.

    Raises:
        UnsupportedModel: the placement is not one of this model's layers.
    """

    def __init__(self, model: Any, placement: Placement, pin: Callable[[Tensor], bool]) -> None:
        self._model = model
        devices = [torch.device(name) for name in placement.devices]
        self._home = devices[0]
        layers = layers_of(model)
        if 1 + len(layers) != sum(placement.num_parts) + placement.num_host_parts:
            raise UnsupportedModel("the model has other layers than its config.json states; set `offload: never`")
        counts = [placement.num_parts[0] - 1, *placement.num_parts[1:]]
        counts[-1] += placement.num_host_parts
        self._by_device: list[list[nn.Module]] = []
        first = 0
        for count in counts:
            self._by_device.append(layers[first : first + count])
            first += count
        self._check(layers)
        in_host = layers[len(layers) - placement.num_host_parts :]
        self.host_layers = self._place(devices, in_host, pin)

    def _check(self, layers: Sequence[nn.Module]) -> None:
        """Checks that every weight has a place: a layer's device, or home."""
        names = {module: name for name, module in self._model.named_modules()}
        device_map = {names[layer]: at for at, group in enumerate(self._by_device) for layer in group}
        inside = {id(module) for layer in layers for module in layer.modules()}
        above = {part for name in device_map for part in _prefixes(name)}
        for name, module in self._model.named_modules():
            if name and id(module) not in inside and name not in above:
                device_map[name] = 0
        for name, _ in self._model.named_parameters():
            device_map.setdefault(name, 0) if name.rpartition(".")[0] in {"", *above} else None
        try:
            check_device_map(self._model, device_map)
        except ValueError as error:
            raise UnsupportedModel("the model has weights outside of its modules; set `offload: never`") from error

    def _place(
        self, devices: Sequence[torch.device], in_host: Sequence[nn.Module], pin: Callable[[Tensor], bool]
    ) -> list[HostLayer]:
        host_layers = []
        inside = {module for group in self._by_device for layer in group for module in layer.modules()}
        for module in self._model.modules():
            if module not in inside:
                module._apply(lambda tensor: tensor.to(self._home), recurse=False)
        for device, group in zip(devices, self._by_device, strict=True):
            for layer in group:
                layer.register_forward_pre_hook(_Mover(device), with_kwargs=True)
                if any(layer is other for other in in_host):
                    host_layers.append(HostLayer(layer, device, pin))
                else:
                    layer.to(device)
        last = next(group[-1] for group in reversed(self._by_device) if group)
        last.register_forward_hook(self._bring_home)
        return host_layers

    def share_bytes(self, tensors: Sequence[Tensor]) -> tuple[int, ...]:
        """Returns the bytes of weights on each device, and then of those in main memory.

        Args:
            tensors: of the model and of its heads, which are at home.
        """
        groups = [[tensor for layer in group for tensor in _tensors(layer)] for group in self._by_device]
        elsewhere = {id(tensor) for group in groups[1:] for tensor in group}
        groups[0] = [tensor for tensor in tensors if id(tensor) not in elsewhere]
        sizes = [storage_bytes([tensor for tensor in group if tensor.untyped_storage().nbytes()]) for group in groups]
        sizes[-1] += max((layer.size_bytes for layer in self.host_layers), default=0)
        return (*sizes, sum(layer.size_bytes for layer in self.host_layers))

    def _bring_home(self, _module: nn.Module, _inputs: Any, output: Any) -> Any:
        if self._home.type == "cuda":
            torch.cuda.set_device(self._home)
        return send_to_device(output, self._home, non_blocking=True)


class _Mover:
    """Moves the inputs of a layer to its device before it runs."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def __call__(self, _module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
        layout = kwargs.get("packed_layout")
        args, kwargs = send_to_device((args, kwargs), self._device, non_blocking=True)
        if isinstance(layout, PackedLayout):
            kwargs["packed_layout"] = layout.on(self._device)
        return args, kwargs


def _tensors(module: Any) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _prefixes(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:length]) for length in range(1, len(parts))]
