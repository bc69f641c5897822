"""Reads the heads that FlagEmbedding's bge-m3 keeps beside its transformer, as pickles of tensors that run no code."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engines.errors import BrokenFiles, is_device_error
from engines.hub.file_selection import SPARSE_LINEAR
from engines.loading.folder import Folder
from engines.models.lexical import LexicalHead

_MAX_BYTES = 256 * 2**20
"""Limit of a head's file: bge-m3's larger one has 2 MiB."""

_DROPPED = ("cls_token", "eos_token", "pad_token", "unk_token")
"""Tokens that have no lexical weight (`M3Embedder`)."""


def lexical_head(
    folder: Folder, width: int, vocab_size: int, tokenizer: Any, device: torch.device
) -> LexicalHead | None:
    """Reads `sparse_linear.pt`; returns None where the folder has none.

    Args:
        width: of the hidden states.
        vocab_size: the number of tokens.
        tokenizer: transformers', which knows the special tokens.

    Raises:
        BrokenFiles: the file holds something else.
    """
    weights = read_linear(folder, SPARSE_LINEAR, lambda shape: shape == (1, width))
    if weights is None:
        return None
    special = (getattr(tokenizer, f"{name}_id", None) for name in _DROPPED)
    dropped = sorted({token for token in special if isinstance(token, int) and 0 <= token < vocab_size})
    weight, bias = (weight.to(device) for weight in weights)
    return LexicalHead(weight, bias, vocab_size, dropped)


def read_linear(folder: Folder, name: str, fits: Callable[[tuple[int, ...]], bool]) -> tuple[Tensor, Tensor] | None:
    """Reads the float32 weight `[out, in]` and bias `[out]` of one linear layer beside the transformer; None without
    the file.

    Args:
        fits: whether a weight of a shape belongs to the model.

    Raises:
        BrokenFiles: the file is corrupt, holds other tensors or code.
    """
    path = folder.weights / name
    if not path.exists():
        return None
    found = _load(path, name)
    weight, bias = found.get("weight"), found.get("bias")
    if not (isinstance(weight, Tensor) and isinstance(bias, Tensor) and {*found} == {"weight", "bias"}):
        raise _broken(name, f"it holds {', '.join(sorted(map(str, found))) or 'nothing'} in place of weight and bias")
    if not fits(tuple(weight.shape)) or tuple(bias.shape) != (weight.shape[0],):
        raise _broken(
            name, f"its tensors are {tuple(weight.shape)} and {tuple(bias.shape)}, which do not fit the model"
        )
    return weight.float(), bias.float()


def _load(path: Path, name: str) -> dict[Any, Any]:
    if path.stat().st_size > _MAX_BYTES:
        raise _broken(name, f"it has {path.stat().st_size} bytes, and the limit is {_MAX_BYTES}")
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    # A broken pickle may raise any exception, and so does one that would run code.
    except Exception as error:
        if is_device_error(error):
            raise
        raise _broken(name, type(error).__name__) from error
    if not isinstance(found, dict):
        raise _broken(name, "it holds no tensors by name")
    return found


def _broken(name: str, reason: str) -> BrokenFiles:
    return BrokenFiles(f"{name} cannot be read ({reason}); fetch the model again", file=name)
