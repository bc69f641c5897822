"""What the configs of sentence-transformers modules mean, old spelling and new; pure, on parsed JSON."""

from typing import Any, get_args

from engines.errors import UnsupportedModel
from engines.spec import PoolingMode

Json = dict[str, Any]

# Keys of the Transformer module that change what it computes and that we do not do.
_UNDONE = ("query_expansion", "query_length", "document_length", "processing_kwargs", "tokenizer_name_or_path")
# Arguments of `from_pretrained` that change how a model is loaded, and not what it computes.
_HARMLESS_MODEL_KWARGS = frozenset({
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


def pooling_of(config: Json, file: str, *, is_settled: bool = False) -> tuple[PoolingMode, ...]:
    """The modes of a `Pooling` config in either vocabulary; neither given means sentence-transformers' default, mean.

    Args:
        file: the config's name, for messages.
        is_settled: the registry names the pooling, so that a contradiction does not matter.

    Raises:
        UnsupportedModel: a mode that is not known, or two vocabularies that contradict each other.
    """
    legacy = tuple(mode for key, mode in _LEGACY_POOLING.items() if config.get(key))
    named = config.get("pooling_mode")
    if named is None:
        return legacy or ("mean",)
    modes = (named,) if isinstance(named, str) else tuple(named)
    unknown = [mode for mode in modes if mode not in get_args(PoolingMode)]
    if unknown:
        raise UnsupportedModel(f"{file} names the pooling {unknown[0]!r}; known are {', '.join(get_args(PoolingMode))}")
    if legacy and set(legacy) != set(modes) and not is_settled:
        raise UnsupportedModel(
            f"{file} says {' + '.join(modes)} (pooling_mode) and also {' + '.join(legacy)} (the older keys); say which "
            "in the registry with `pooling`"
        )
    return modes


def check_transformer(config: Json, name: str) -> None:
    """Refuse what would change the vectors and is not done here.

    Args:
        config: the Transformer module's own config, of the file `name`.

    Raises:
        UnsupportedModel: naming the key.
    """
    undone = [key for key in _UNDONE if config.get(key)]
    options = {**(config.get("model_kwargs") or {}), **(config.get("model_args") or {})}
    undone += [f"model_kwargs.{key}" for key in options if key not in _HARMLESS_MODEL_KWARGS]
    if undone:
        raise UnsupportedModel(f"{name} sets {undone[0]!r}, which may change the vectors and is not supported")
    task = config.get("transformer_task", "feature-extraction")
    if task != "feature-extraction":
        raise UnsupportedModel(f"{name} asks for the task {task!r}; only 'feature-extraction' gives embeddings here")
    modalities = config.get("modality_config") or {"text": _PLAIN_TEXT}
    if "message" in modalities:
        raise UnsupportedModel(f"{name} puts texts into a chat template ('message'), which is not supported")
    output = config.get("module_output_name") or "token_embeddings"
    if not _is_plain(modalities.get("text")) or output != "token_embeddings":
        raise UnsupportedModel(
            f"{name} takes its vectors from {modalities.get('text')} as {output!r}; only the last hidden state of a "
            "forward pass is supported"
        )


def _is_plain(text: object) -> bool:
    """Whether texts give their last hidden state; the output's name may stand in a list of one."""
    if not isinstance(text, dict):
        return False
    output = text.get("method_output_name")
    return text.get("method") == "forward" and output in ("last_hidden_state", ["last_hidden_state"])
