"""Merges a PEFT adapter into the transformer that it was trained on, before anything else is done with the weights.

The arithmetic is PEFT's own (`merge_and_unload`), in float32. Whether it is exact is not taken on trust: one pass of
the model with the adapter beside its weights and one of the merged model must agree.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engines.errors import BadModel, BrokenFiles, UnsupportedModel, is_device_error
from engines.hub.file_selection import ADAPTER_CONFIG
from engines.loading.folder import require_json

_PREFIX = "base_model.model."
"""Names of the model's own weights begin so in an adapter's file."""

_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initialisations that replace the base's weights before training, so that the published base is another model."""

_NUM_PROBE_TOKENS = 8
_TOLERANCE = 1e-4
"""Of a merged model's outputs to those of the unmerged one, relative to the largest. Merging changes the order of
float32 sums only: 1e-6 on models of 2 to 24 layers."""


def merge_adapter(model: Any, folder: Path, vocab_size: int) -> tuple[Any, set[str]]:
    """Merges the adapter of a folder into a model in float32 on the CPU.

    Args:
        model: transformers' model; it is changed.
        vocab_size: ids below it may be run.

    Returns:
        The merged model, and the names of those of its weights that the adapter's file replaces whole.

    Raises:
        UnsupportedModel: the adapter cannot be merged, not exactly, or belongs to another model.
        BrokenFiles: its files cannot be read.
    """
    # Late: it takes a second, which models without adapters need not wait.
    from peft import PeftModel, get_peft_model_state_dict
    from peft.utils.save_and_load import load_peft_weights

    config = _read_config(folder)
    shapes = _shapes(model)
    with _translated(folder):
        stored: Mapping[str, Tensor] = load_peft_weights(str(folder), device="cpu")
        adapted = PeftModel(model, config).eval()
        adapted.load_adapter(str(folder), "default", torch_device="cpu")
        known = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    own = {name.removeprefix(_PREFIX) for name in stored if name.removeprefix(_PREFIX) in shapes}
    _check_names(set(stored) - {_PREFIX + name for name in own}, set(known), own)
    if not hasattr(adapted.base_model, "merge_and_unload"):
        raise UnsupportedModel(
            f"adapters of the kind {config.peft_type.value} cannot be merged into the model's weights"
        )
    wanted = _run(adapted, vocab_size)
    with _translated(folder):
        merged = adapted.merge_and_unload(safe_merge=True)
    if _shapes(merged) != shapes:
        raise UnsupportedModel("the adapter adds weights to the model: only adapters that keep its shape are supported")
    _check_same(_run(merged, vocab_size), wanted)
    return merged, own


def _read_config(folder: Path) -> Any:
    """Reads `adapter_config.json`.

    Raises:
        BrokenFiles: it cannot be read.
        UnsupportedModel: the adapter was trained on weights that its base does not have.
    """
    from peft import PeftConfig

    require_json(folder, ADAPTER_CONFIG)
    with _translated(folder):
        config: Any = PeftConfig.from_pretrained(str(folder))
    begun = getattr(config, "init_lora_weights", True)
    if isinstance(begun, str) and begun.startswith(_CHANGES_BASE):
        raise UnsupportedModel(
            f"{ADAPTER_CONFIG} sets init_lora_weights to {begun!r}, which changes the base model's weights before the "
            "training: convert it to a plain LoRA adapter (`path_initial_model_for_weight_conversion` of PEFT)"
        )
    if hasattr(config, "init_lora_weights"):
        config.init_lora_weights = True  # every weight is read from the file
    config.task_type = None  # PEFT's classes for a task expect the model's head
    config.inference_mode = True
    return config


def _shapes(model: Any) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def _check_names(stored: set[str], known: set[str], own: set[str]) -> None:
    """Checks that the file has exactly the weights that the adapter needs, beside whole weights of the model.

    Raises:
        UnsupportedModel: PEFT would leave the others as they were initialised, or ignore them.
    """
    foreign, missing = sorted(stored - known), sorted(known - stored - {_PREFIX + name for name in own})
    if foreign or missing:
        what = f"holds {foreign[0]!r}, which the model does not have" if foreign else f"lacks {missing[0]!r}"
        raise UnsupportedModel(
            f"the adapter's file {what} ({len(foreign) + len(missing)} such weights): it belongs to another model, or "
            "to another class of it"
        )


@torch.inference_mode()
def _run(model: Any, vocab_size: int) -> Tensor:
    """Returns the outputs of a fixed text."""
    ids = torch.arange(1, 1 + _NUM_PROBE_TOKENS).remainder(vocab_size)[None]
    try:
        outputs: Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids))[0]
    except Exception as error:
        if is_device_error(error):
            raise
        raise UnsupportedModel(f"the model with its adapter cannot be run ({type(error).__name__})") from error
    return outputs.float()


def _check_same(merged: Tensor, unmerged: Tensor) -> None:
    far = float((merged - unmerged).abs().max() / unmerged.abs().max().clamp(min=1e-9))
    if not far <= _TOLERANCE:  # also where it is not a number
        raise UnsupportedModel(
            f"the merged model's outputs are {far:.1e} from those of the adapter beside the model, more than the "
            f"{_TOLERANCE:.0e} that float32 explains: this kind of adapter cannot be merged exactly"
        )


@contextmanager
def _translated(folder: Path) -> Iterator[None]:
    """Raises our errors for PEFT's, whose texts may contain paths; reading a corrupt file may raise any exception."""
    try:
        yield
    except BadModel:
        raise
    except Exception as error:
        if is_device_error(error):
            raise
        names = ("adapter_model.safetensors", "adapter_model.bin")
        if not any((folder / name).exists() for name in names):
            raise BrokenFiles(f"{names[0]} is missing; fetch the model again", file=names[0]) from error
        raise UnsupportedModel(
            f"the adapter cannot be put on this model ({type(error).__name__}): it belongs to another model, or is of "
            "a kind that is not supported"
        ) from error
