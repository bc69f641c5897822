"""Reads the weight file of one sentence-transformers module (Dense, LayerNorm, StaticEmbedding)."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from engines.errors import BrokenFiles, UnsupportedModel, is_device_error
from engines.loading.folder import ModuleRef


class ModuleWeights:
    """The tensors of a module, on the CPU and in the file's dtype. Each is taken once; none may remain.

    Args:
        ref: the module.
        file: the name of its weight file inside the model folder.
        tensors: the contents of that file.
    """

    def __init__(self, ref: ModuleRef, file: str, tensors: dict[str, Tensor]) -> None:
        self.file = file
        self._ref = ref
        self._tensors = tensors

    def take(self, key: str, device: torch.device, shape: tuple[int, ...] | None = None) -> Tensor:
        """Removes and returns a tensor as float32 on the device.

        Raises:
            BrokenFiles: it is missing, or has another shape.
        """
        tensor = self.take_raw(key)
        if shape is not None and tuple(tensor.shape) != shape:
            raise BrokenFiles(
                f"{key!r} in {self.file} is {_format_shape(tensor.shape)}, but {self._ref.file('config.json')} needs "
                f"{_format_shape(shape)}; fetch the model again",
                file=self.file,
            )
        return tensor.to(device, torch.float32)

    def take_raw(self, key: str) -> Tensor:
        """Removes and returns a tensor as stored in the file.

        Raises:
            BrokenFiles: it is missing.
        """
        if key not in self._tensors:
            held = ", ".join(sorted(self._tensors)) or "nothing"
            raise BrokenFiles(f"{self.file} lacks {key!r} (it holds {held}); fetch the model again", file=self.file)
        return self._tensors.pop(key)

    def take_optional(self, key: str) -> Tensor | None:
        """Removes and returns a tensor as stored in the file; None if it is missing."""
        return self._tensors.pop(key, None)

    def check_all_taken(self) -> None:
        """Checks that no tensor remains: an unused tensor would have changed the vectors.

        Raises:
            UnsupportedModel: naming the first that remains.
        """
        if self._tensors:
            raise UnsupportedModel(
                f"{self.file} holds {min(self._tensors)!r}, which a {self._ref.kind} module of sentence-transformers "
                "does not have; fetch the model again, or use a model without custom modules"
            )


def read_module_weights(root: Path, ref: ModuleRef) -> ModuleWeights:
    """Reads `model.safetensors` of a module, else `pytorch_model.bin` (with `weights_only`, which runs no code).

    Raises:
        BrokenFiles: missing, truncated or corrupt.
    """
    for name in ("model.safetensors", "pytorch_model.bin"):
        path, file = root / ref.path / name, ref.file(name)
        if path.exists():
            try:
                return ModuleWeights(ref, file, _read(path))
            # A broken pickle may raise any exception.
            except Exception as error:
                if is_device_error(error):
                    raise
                raise BrokenFiles(
                    f"{file} is truncated or corrupt ({type(error).__name__}); fetch the model again", file=file
                ) from error
    missing = ref.file("model.safetensors")
    raise BrokenFiles(f"{missing} is missing: the {ref.kind} module needs weights; fetch the model again", file=missing)


def _read(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".bin":
        tensors: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
        return dict(tensors)
    return load_file(path, backend="pread")  # truncating a memory-mapped file kills the process (SIGBUS)


def _format_shape(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
