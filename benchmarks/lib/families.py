"""Tries every model type that the installed transformers knows: a tiny model with random weights of each, if it can be.

A type is served with sentence-transformers' vectors, refused with a message, or out of reach for a reason that its own
class states. What can be made small enough without knowledge of the family is found out by shrinking its config.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from msgspec import Struct
from transformers import CONFIG_MAPPING, MODEL_MAPPING, AutoConfig, AutoModel, AutoModelForTextEncoding

from benchmarks.lib import vocabularies
from benchmarks.lib.engine_kit import Kit, component_error, cosines, embed, encode
from benchmarks.lib.models import quiet, randomise, reference
from benchmarks.lib.workloads import mixed
from engines.errors import BadModel

Verdict = Literal["served", "refused", "wrong", "out", "untried"]

_ENCODERS_OF = ("t5", "mt5", "umt5")
_MAX_PARAMETERS = 5_000_000
_TEXTS = mixed(6, seed=4)

_SENSES = ("vision", "audio", "image", "video", "speech", "sound", "codec", "qformer", "vq", "vit", "clip", "tts")
"""Parts of the names of configs that describe what is not text."""
_TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id")
_DERIVED = ("num_key_value_heads", "head_dim", "n_routed_experts", "num_experts_per_tok", "vocab_size")
_DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")

_KEYS: dict[int, str] = {
    32: "hidden_size d_model n_embd dim emb_dim embed_dim embedding_size hidden_dim moe_intermediate_size "
    "shared_expert_intermediate_size ffn_hidden_size expert_ffn_hidden_size",
    2: "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_experts_per_tok moe_topk top_k "
    "num_experts_per_token type_vocab_size",
    4: "rotary_dim num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads "
    "num_key_value_heads num_kv_heads num_local_experts num_experts n_routed_experts",
    64: "pronunciation_vocab_size shape_vocab_size entity_vocab_size "
    "intermediate_size ffn_dim d_ff n_inner encoder_ffn_dim decoder_ffn_dim",
    8: "head_dim d_kv attention_head_dim qk_rope_head_dim qk_nope_head_dim v_head_dim kv_lora_rank q_lora_rank "
    "state_size mamba_d_state mamba_n_heads",
    512: "max_position_embeddings n_positions max_seq_len context_length n_ctx",
    1: "n_group topk_group n_shared_experts first_k_dense_replace num_dense_layers",
}
"""Keys of configs by the value that makes a model small; keys that a config does not have are left out."""


DEFAULT = object()
"""In place of a value: the class's own."""

_MROPE: dict[str, object] = {
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
}
_SPECIAL: dict[str, dict[str, object]] = {
    "funnel": {"num_hidden_layers": DEFAULT, "block_sizes": [1, 1, 1], "num_decoder_layers": 1},
    "mamba2": {"num_heads": 8},
    "qwen2_5_vl_text": _MROPE,
    "qwen2_vl_text": _MROPE,
    "xlnet": {"max_position_embeddings": DEFAULT},
    "xmod": {"default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
}
"""What single families need besides."""


class TriedType(Struct, frozen=True):
    """One model type, and what became of it. `why`: of all but those that are served."""

    model_type: str
    verdict: Verdict
    why: str = ""


def model_types() -> tuple[str, ...]:
    """Returns all model types of the installed transformers, sorted."""
    return tuple(sorted(CONFIG_MAPPING.keys()))


def small_config(config_class: Any, vocab_size: int) -> Any:
    """Builds a config of a class with small sizes, also of its parts.

    Raises:
        Exception: of any kind, as configs check their values.
    """
    default = config_class()
    known = {key: size for size, keys in _KEYS.items() for key in keys.split() if _is_size(default, key)}
    known |= {key: vocab_size for key in ("vocab_size", "vocab_size_per_layer_input") if _is_size(default, key)}
    known |= {key: 0 for key in _TOKENS if _is_size(default, key)}
    parts = {
        name: small_config(kind, vocab_size)
        for name, kind in (getattr(config_class, "sub_configs", None) or {}).items()
        if isinstance(kind, type) and kind is not AutoConfig
    }
    depth = next((_value(default, key) for key in _DEPTHS if _is_size(default, key)), 0)
    lists = {
        name: [entry[0], entry[-1]]  # hybrids attend in their last layer
        for name, entry in vars(default).items()
        if isinstance(entry, list) and len(entry) == depth > 2
    }
    special = _SPECIAL.get(config_class.model_type, {})
    values = {**known, **lists, **parts, **special}
    return config_class(**{key: entry for key, entry in values.items() if entry is not DEFAULT})


def _value(config: Any, key: str) -> Any:
    """Returns an entry of a config; None where it has none, or one for each layer."""
    try:
        return getattr(config, key, None)
    except Exception:  # noqa: BLE001  # configs with an entry for each layer raise an error of their own
        return None


def _is_size(config: Any, key: str) -> bool:
    """Tells whether a config has a number under a key, or derives one."""
    stated = getattr(type(config), key, None)
    if isinstance(stated, property) and stated.fset is None:
        return False
    found = _value(config, key)
    return isinstance(found, int) or (found is None and key in _DERIVED and key in vars(config))


def try_family(model_type: str, kit: Kit, folder: Path) -> TriedType:
    """Builds a small model of a type in `folder`, serves it and compares its vectors with sentence-transformers'."""
    found = _out_of_reach(model_type)
    if found:
        return TriedType(model_type, "out", found)
    try:
        with quiet():
            _build(model_type, folder)
    except Exception as error:  # noqa: BLE001  # a family that needs a config of its own raises anything
        tried = TriedType(model_type, "untried", f"no small config ({type(error).__name__})")
    else:
        tried = _compare(model_type, kit, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if tried.verdict in ("refused", "untried") and _is_multimodal(CONFIG_MAPPING[model_type]):
        return TriedType(model_type, "out", "reads images, sound or other things beside text")
    return tried


def _is_multimodal(config_class: Any) -> bool:
    parts = getattr(config_class, "sub_configs", None) or {}
    return any(word in name for name in parts for word in _SENSES) or any(
        word in config_class.model_type for word in _SENSES
    )


def _out_of_reach(model_type: str) -> str:
    """Returns why a type is not text's, as its classes say; empty if they do not."""
    config_class = CONFIG_MAPPING[model_type]
    if config_class not in MODEL_MAPPING:
        return "no model without a head"
    try:
        kind: Any = MODEL_MAPPING[config_class]
        reads = (kind[0] if isinstance(kind, tuple) else kind).main_input_name
    except ImportError:
        return "needs a Python package that is not installed"
    except ValueError:
        return "its class is missing from transformers"
    if reads != "input_ids":
        return f"reads {reads}"
    try:
        with quiet():
            config = config_class()
    except Exception:  # noqa: BLE001  # tried, and reported, by `_build`
        return ""
    if getattr(config, "is_encoder_decoder", False) and model_type not in _ENCODERS_OF:
        return "encoder-decoder"
    return ""


def _build(model_type: str, folder: Path) -> None:
    tokenizer = vocabularies.bert()
    config = small_config(CONFIG_MAPPING[model_type], len(tokenizer))
    config.use_cache = False
    kind: Any = AutoModelForTextEncoding if model_type in _ENCODERS_OF else AutoModel
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in kind.from_config(config).parameters())
    if size > _MAX_PARAMETERS:
        raise ValueError(f"{size} parameters")
    torch.manual_seed(7)
    model = kind.from_config(config).eval()
    randomise(model)
    with torch.inference_mode():
        model(input_ids=torch.arange(1, 6)[None])  # raises where the sizes do not fit each other
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _compare(model_type: str, kit: Kit, folder: Path) -> TriedType:
    try:
        with quiet():
            engine = kit.load(folder, pooling=("mean",))
    except BadModel as error:
        return TriedType(model_type, "refused", str(error))
    try:
        try:
            wanted = encode(reference(folder), _TEXTS, batch_size=1)  # of some families padding changes the vectors
        except Exception as error:  # noqa: BLE001  # theirs, of any kind
            return TriedType(model_type, "untried", f"sentence-transformers cannot run it ({type(error).__name__})")
        got = embed(engine, _TEXTS)
    finally:
        engine.close()
    if cosines(got, wanted).min() < 0.999999 or component_error(got, wanted) > 1e-5:
        return TriedType(model_type, "wrong", f"cosine {cosines(got, wanted).min():.6f}")
    return TriedType(model_type, "served", engine.info.attention)


def try_all(types: tuple[str, ...], kit: Kit) -> Iterator[TriedType]:
    """Yields what becomes of each type."""
    for model_type in types:
        yield try_family(model_type, kit, kit.folder / f"family-{model_type}")
