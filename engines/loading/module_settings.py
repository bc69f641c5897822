"""Checks settings of modules: those that change vectors and are not supported are refused, never ignored."""

from typing import Any, get_args

from engines.errors import UnsupportedModel
from engines.loading.late_interaction import LENGTH_KEYS
from engines.spec import PoolingMode

Json = dict[str, Any]

# Keys of the Transformer module that change its output and that are not implemented here; of late interaction, the
# lengths are (`engines/loading/late_interaction.py`).
_UNSUPPORTED_KEYS = (
    *LENGTH_KEYS,
    "processing_kwargs",
    "tokenizer_name_or_path",
)

# Arguments of `from_pretrained` that change how a model is loaded, not what it computes.
_IGNORED_MODEL_KWARGS = frozenset({
    "add_pooling_layer", "attn_implementation", "device_map", "dtype", "low_cpu_mem_usage", "torch_dtype",
    "trust_remote_code", "use_safetensors",
})  # fmt: skip

_PLAIN_TEXT = {"method": "forward", "method_output_name": "last_hidden_state"}

# The booleans of legacy pooling configs, in the order in which sentence-transformers concatenates them.
_LEGACY_POOLING: dict[str, PoolingMode] = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}


def pooling_of(config: Json, file: str, *, is_overridden: bool = False) -> tuple[PoolingMode, ...]:
    """Returns the modes of a `Pooling` config in the current or legacy keys; without any, sentence-transformers' mean.

    Args:
        file: the config's name, for messages.
        is_overridden: the registry sets the pooling, so that a contradiction does not matter.

    Raises:
        UnsupportedModel: an unknown mode, or current and legacy keys that contradict each other.
    """
    legacy = tuple(mode for key, mode in _LEGACY_POOLING.items() if config.get(key))
    named = config.get("pooling_mode")
    if named is None:
        return legacy or ("mean",)
    modes = (named,) if isinstance(named, str) else tuple(named)
    unknown = [mode for mode in modes if mode not in get_args(PoolingMode)]
    if unknown:
        raise UnsupportedModel(
            f"{file} names the unsupported pooling {unknown[0]!r}; supported: {', '.join(get_args(PoolingMode))}"
        )
    if legacy and set(legacy) != set(modes) and not is_overridden:
        raise UnsupportedModel(
            f"{file} states two poolings, {' + '.join(modes)} (pooling_mode) and {' + '.join(legacy)} (legacy keys); "
            "set `pooling` in the registry"
        )
    return modes


def check_transformer(config: Json, name: str) -> None:
    """Rejects settings that change the vectors and are not supported.

    Args:
        config: the Transformer module's own config.
        name: its file name, for messages.

    Raises:
        UnsupportedModel: naming the key.
    """
    check_options(config, name)
    task = config.get("transformer_task", "feature-extraction")
    if task != "feature-extraction":
        raise UnsupportedModel(f"{name} sets the task {task!r}; only 'feature-extraction' is supported")
    modalities = config.get("modality_config") or {"text": _PLAIN_TEXT}
    if "message" in modalities:
        raise UnsupportedModel(f"{name} applies a chat template ('message'), which is not supported")
    output = config.get("module_output_name") or "token_embeddings"
    if not _gives_last_hidden_state(modalities.get("text")) or output != "token_embeddings":
        raise UnsupportedModel(
            f"{name} takes vectors from {modalities.get('text')} as {output!r}; only the last hidden state of a "
            "forward pass is supported"
        )


def check_options(config: Json, name: str) -> None:
    """Rejects options that change what a transformer computes and that are not supported.

    Raises:
        UnsupportedModel: naming the key.
    """
    unsupported = [key for key in _UNSUPPORTED_KEYS if config.get(key)]
    options = {**(config.get("model_kwargs") or {}), **(config.get("model_args") or {})}
    unsupported += [f"model_kwargs.{key}" for key in options if key not in _IGNORED_MODEL_KWARGS]
    if unsupported:
        raise UnsupportedModel(f"{name} sets {unsupported[0]!r}, which may change the vectors and is not supported")


def _gives_last_hidden_state(text: object) -> bool:
    """Returns whether texts yield the last hidden state; the output's name may be in a list of one."""
    if not isinstance(text, dict):
        return False
    output = text.get("method_output_name")
    return text.get("method") == "forward" and output in ("last_hidden_state", ["last_hidden_state"])
