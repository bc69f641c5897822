"""Writes the quantised weights of a transformer into a file while it is loaded, and builds later ones from the file.

A file holds all tensors of the model: those of its reduced products in the order in which they are made
(`engines/models/weight_forms.py`), every other parameter, and the buffers. A model is then built without memory for its
float weights: on torch's meta device, where the places of weights that a product replaces stay, and all else is filled
in. The parts are written one by one, as they are made, so that a load that writes needs no more memory than another.
"""

import ctypes
import os
import shutil
import zlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Self

import msgspec
import structlog
import torch
from safetensors.torch import _TYPES
from torch import Tensor, nn
from torch.nn.functional import embedding, linear
from torch.overrides import TorchFunctionMode

from engines.form_cache import FREE_BYTES, HEADER_BYTES, LENGTH_BYTES, read_metadata
from engines.hub.weight_files import read_header, read_range
from engines.loading.preflight import empty_model
from engines.loading.weight_reader import WeightReader
from engines.models.adapters import drop_pooler
from engines.storage import temporary_path

log = structlog.get_logger(__name__)

_CPU = torch.device("cpu")
_NAMES = {dtype: name for name, dtype in _TYPES.items()}
_PRODUCT, _OTHER = "product", "other"
"""Begin the names of tensors: `product.NUMBER.PART` and `other.NAME`."""

Make = Callable[[], tuple[Tensor, ...]]
"""Makes the tensors of one product from its float weights."""


class FormUnusable(Exception):
    """A file does not fit the model, or is damaged. The message says why."""


class FormSource:
    """Where a load takes the form of its weights from: here, from the model's own files, and nothing is kept."""

    def model(self, read: Callable[[], Any], _model_class: Any, _config: Any) -> Any:
        """Returns the transformer on the CPU, in eval mode, without pooler. `read` reads it from its own files."""
        model = read().eval()
        drop_pooler(model)
        return model

    def take(self, _weight: Tensor, make: Make) -> tuple[Tensor, ...]:
        """Returns the tensors of the product that replaces a weight."""
        return make()

    def observing(self) -> AbstractContextManager[object]:
        """Returns a context in which the model runs before its products are replaced: shapes are right there."""
        return nullcontext()


class FormWriter(FormSource):
    """Writes a file beside a load. A disk that cannot be written is logged, and nothing is kept.

    Args:
        path: of the file, which appears with `commit`.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._draft = path, temporary_path(path)
        self._entries: dict[str, dict[str, Any]] = {}
        self._checksums: dict[str, int] = {}
        self._num_products = 0
        self.size_bytes = HEADER_BYTES
        self._file: Any = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._draft.open("xb")
            self._file.seek(HEADER_BYTES)
        except OSError as error:
            self._give_up(str(error))

    def model(self, read: Callable[[], Any], model_class: Any, config: Any) -> Any:
        """See `FormSource`; writes everything but the weights of products."""
        model = super().model(read, model_class, config)
        places = _replaced(model)
        tensors = _named_tensors(model)
        if places is None or not _is_library_model(model):
            self._give_up("its weights are used in ways of their own")
        for name, tensor in tensors.items():
            if places is not None and name not in places:
                self._add(f"{_OTHER}.{name}", tensor)
        return model

    def take(self, _weight: Tensor, make: Make) -> tuple[Tensor, ...]:
        """See `FormSource`; writes what was made."""
        made = make()
        for part, tensor in enumerate(made):
            self._add(f"{_PRODUCT}.{self._num_products}.{part}", tensor)
        self._num_products += 1
        return made

    def commit(self, identity: str, content: str) -> bool:
        """Makes the file complete and visible; blocks until the disk has it. Returns whether it is kept."""
        if self._file is None:
            return False
        data = HEADER_BYTES - LENGTH_BYTES
        metadata = {
            "identity": identity, "content": content,
            "checksums": msgspec.json.encode(self._checksums).decode(),
        }  # fmt: skip
        header = msgspec.json.encode({"__metadata__": metadata, **self._entries})
        if len(header) > data:
            self._give_up("it has too many tensors")
            return False
        try:
            self._file.seek(0)
            self._file.write(data.to_bytes(LENGTH_BYTES, "little") + header.ljust(data))
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._draft.replace(self._path)
        except OSError as error:
            self._give_up(str(error))
            return False
        self._file = None
        return True

    def close(self) -> None:
        """Removes what is not committed."""
        if self._file is not None:
            self._file.close()
            self._file = None
            self._draft.unlink(missing_ok=True)

    def __del__(self) -> None:
        self.close()

    def _add(self, name: str, tensor: Tensor) -> None:
        if self._file is None:
            return
        tensor = tensor.detach().contiguous()
        dtype = _NAMES.get(tensor.dtype)
        if dtype is None or tensor.device != _CPU:
            self._give_up(f"{name} is {tensor.dtype} on {tensor.device}")
            return
        start, content = self.size_bytes - HEADER_BYTES, _bytes_at(tensor)
        try:
            if shutil.disk_usage(self._path.parent).free < FREE_BYTES + len(content):
                self._give_up("the disk is nearly full")
                return
            self._file.write(content)
        except OSError as error:
            self._give_up(str(error))
            return
        self._checksums[name] = zlib.crc32(content)
        self._entries[name] = {
            "dtype": dtype, "shape": list(tensor.shape), "data_offsets": [start, start + len(content)],
        }  # fmt: skip
        self.size_bytes += len(content)

    def _give_up(self, reason: str) -> None:
        log.warning("form.not_kept", file=self._path.name, reason=reason)
        self.close()


class FormReader(FormSource):
    """Reads a file into a model. Use it as a context manager around the load.

    Args:
        path: of the file.
        identity, content: what it must have been made from.

    Raises:
        FormUnusable: it was made from something else, or is damaged.
    """

    def __init__(self, path: Path, identity: str, content: Callable[[], str]) -> None:
        metadata = read_metadata(path)
        if metadata.get("identity") != identity:
            raise FormUnusable("it is of other files, another release or another form")
        if metadata.get("content") != content():
            raise FormUnusable("the model's files have other content")
        try:
            self._checksums = msgspec.json.decode(metadata["checksums"], type=dict[str, int])
            entries = read_header(path.name, path.stat().st_size, partial(read_range, path.parent))
            self._reader = WeightReader(path.parent, [path.name], _CPU)
        except Exception as error:
            raise FormUnusable(f"it is damaged ({type(error).__name__})") from error
        self._names = {entry.name for entry in entries}
        self._num_taken = 0
        self._model: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._reader.__exit__(*error)

    def model(self, _read: Callable[[], Any], model_class: Any, config: Any) -> Any:
        """See `FormSource`: the weights of products have a shape only.

        Raises:
            FormUnusable: the file is of another model.
        """
        self._model = model = empty_model(model_class, config, trust_remote_code=False).eval()
        drop_pooler(model)
        places = _replaced(model)
        tensors = _named_tensors(model)
        others = set(tensors) - (places or set())
        if places is None or others != {name.partition(".")[2] for name in self._names if name.startswith(_OTHER)}:
            raise FormUnusable("it has the tensors of another model")
        for name, tensor in tensors.items():
            if name in places:
                _put(model, name, torch.empty(tensor.shape, dtype=torch.float32, device="meta"))
            else:
                _put(model, name, self._read(f"{_OTHER}.{name}", tensor.shape))
        return model

    def take(self, weight: Tensor, _make: Make) -> tuple[Tensor, ...]:
        """See `FormSource`."""
        number, self._num_taken = self._num_taken, self._num_taken + 1
        first = self._read(f"{_PRODUCT}.{number}.0")
        halves = 2 if first.dtype is torch.uint8 else 1  # int4: two in a byte
        if (first.shape[0], halves * first.shape[1]) != weight.shape:
            raise FormUnusable(f"product {number} has another shape")
        rest: list[Tensor] = []
        while (name := f"{_PRODUCT}.{number}.{1 + len(rest)}") in self._names:
            rest.append(self._read(name))
        return (first, *rest)

    def observing(self) -> AbstractContextManager[object]:
        """See `FormSource`."""
        return _ShapesOnly()

    def check_all_taken(self) -> None:
        """Checks, once the products are replaced, that nothing is left in the file and no tensor has no memory.

        Raises:
            FormUnusable: something is.
        """
        if f"{_PRODUCT}.{self._num_taken}.0" in self._names:
            raise FormUnusable("it has more products than the model")
        for module in self._model.modules():
            own = (*module._parameters.values(), *module._buffers.values(), *vars(module).values())
            if any(isinstance(value, Tensor) and value.is_meta for value in own):
                raise FormUnusable(f"{type(module).__name__} has a tensor that is not in it")

    def _read(self, name: str, shape: torch.Size | None = None) -> Tensor:
        if name not in self._names:
            raise FormUnusable(f"{name} is not in it")
        found = self._reader.read(name)
        if shape is not None and found.shape != shape:
            raise FormUnusable(f"{name} has another shape")
        if zlib.crc32(_bytes_at(found)) != self._checksums.get(name):
            raise FormUnusable(f"{name} is damaged")
        return found


class _ShapesOnly(TorchFunctionMode):
    """Lets products and tables whose weights have no memory give zeros of the right shape."""

    def __torch_function__(
        self, func: Any, _types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is linear and args[1].is_meta:
            return args[0].new_zeros(*args[0].shape[:-1], args[1].shape[0])
        if func is embedding and args[1].is_meta:
            return torch.zeros(*args[0].shape, args[1].shape[1], dtype=args[1].dtype)
        return func(*args, **(kwargs or {}))


def _replaced(model: Any) -> set[str] | None:
    """Returns the names of the parameters that products in a quantised form replace; None where tensors are shared."""
    if len(list(model.named_parameters(remove_duplicate=False))) != len(list(model.named_parameters())):
        return None
    table = model.get_input_embeddings()
    replaced: set[nn.Module] = {table} if type(table) is nn.Embedding else set()
    replaced |= {part for part in model.modules() if type(part) is nn.Linear}
    return {f"{name}.weight" for name, part in model.named_modules() if part in replaced}


def _named_tensors(model: Any) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _is_library_model(model: Any) -> bool:
    return type(model).__module__.startswith("transformers.")


def _put(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Replaces a parameter or a buffer."""
    owner, _, own = name.rpartition(".")
    module = model.get_submodule(owner)
    if own in module._parameters:
        module._parameters[own] = nn.Parameter(tensor, requires_grad=tensor.is_floating_point())
    else:
        module._buffers[own] = tensor


def _bytes_at(tensor: Tensor) -> memoryview:
    """Returns the memory of a contiguous tensor. Not by `numpy()`, after which torch cannot free it alone."""
    size = tensor.nbytes
    return memoryview((ctypes.c_ubyte * size).from_address(tensor.data_ptr())).cast("B") if size else memoryview(b"")
