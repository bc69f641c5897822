"""The weight file of one sentence-transformers module (Dense, LayerNorm, StaticEmbedding): read whole, used whole."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from engines.errors import BrokenFiles, UnsupportedModel, is_out_of_memory
from engines.loading.folder import ModuleRef


class ModuleWeights:
    """The tensors of a module, on the CPU and in the dtype of the file. Each is taken once; none may be left over.

    Args:
        ref: the module.
        file: the name of its weight file inside the model folder.
        tensors: what that file holds.
    """

    def __init__(self, ref: ModuleRef, file: str, tensors: dict[str, Tensor]) -> None:
        self.file = file
        self._ref = ref
        self._tensors = tensors

    def take(self, key: str, device: torch.device, shape: tuple[int, ...] | None = None) -> Tensor:
        """One tensor as float32 on the device.

        Raises:
            BrokenFiles: it is not there, or not of that shape.
        """
        tensor = self.take_raw(key)
        if shape is not None and tuple(tensor.shape) != shape:
            raise BrokenFiles(
                f"{key!r} in {self.file} is {_by(tensor.shape)}, but {_by(shape)} is needed: it does not fit "
                f"{self._ref.file('config.json')}; fetch the model again",
                file=self.file,
            )
        return tensor.to(device, torch.float32)

    def take_raw(self, key: str) -> Tensor:
        """One tensor as it lies in the file.

        Raises:
            BrokenFiles: it is not there.
        """
        if key not in self._tensors:
            held = ", ".join(sorted(self._tensors)) or "nothing"
            raise BrokenFiles(f"{self.file} lacks {key!r} (it holds {held}); fetch the model again", file=self.file)
        return self._tensors.pop(key)

    def take_any(self, key: str) -> Tensor | None:
        """One tensor as it lies in the file, or None."""
        return self._tensors.pop(key, None)

    def finish(self) -> None:
        """Nothing may be left: a tensor that is not used would change the vectors.

        Raises:
            UnsupportedModel: naming the first that is left.
        """
        if self._tensors:
            raise UnsupportedModel(
                f"{self.file} holds {min(self._tensors)!r}, which a {self._ref.kind} module of sentence-transformers "
                "does not have; fetch the model again, or use one whose modules are all known"
            )


def read_module_weights(root: Path, ref: ModuleRef) -> ModuleWeights:
    """Read `model.safetensors` of a module, else `pytorch_model.bin` (with `weights_only`, which runs no code).

    Raises:
        BrokenFiles: missing, truncated or corrupt.
    """
    for name in ("model.safetensors", "pytorch_model.bin"):
        path, file = root / ref.path / name, ref.file(name)
        if path.exists():
            try:
                return ModuleWeights(ref, file, _read(path))
            # A broken pickle raises whatever its bytes happen to mean.
            except Exception as error:
                if is_out_of_memory(error):
                    raise
                raise BrokenFiles(
                    f"{file} is truncated or corrupt ({type(error).__name__}); fetch the model again", file=file
                ) from error
    missing = ref.file("model.safetensors")
    raise BrokenFiles(
        f"{missing} is missing: the {ref.kind} module has no weights; fetch the model again", file=missing
    )


def _read(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".bin":
        tensors: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
        return dict(tensors)
    return load_file(path, backend="pread")  # a mapped file that somebody truncates ends the process (SIGBUS)


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
