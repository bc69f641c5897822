"""Reading a model folder's weights into an encoder and a tokenizer, or refusing with the file and the cure."""

from pathlib import Path
from typing import Any

import structlog
import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModel, AutoModelForTextEncoding, PretrainedConfig

from engines.errors import BadModel, BrokenFiles, UnsupportedModel, is_out_of_memory
from engines.hub.local_folder import is_writable_in_place
from engines.inputs.tokenizer import Tokenizer
from engines.loading.folder import Folder, read_json
from engines.loading.modules import build_chain
from engines.loading.preflight import check_counts, check_proportions
from engines.loading.static import build_static
from engines.loading.tokenizer import Reader, read_tokenizer
from engines.models.adapters import Positions, drop_pooler, unused_weights
from engines.models.base import CheckableEncoder
from engines.models.cuda_graphs import capturer_for
from engines.models.observation import observe
from engines.models.transformer import TransformerEncoder
from engines.spec import ModelSpec

log = structlog.get_logger(__name__)

# Families whose activations overflow float16 (their cards, and NaN seen with Qwen3-Embedding-8B).
_NO_FLOAT16 = ("gemma", "qwen3", "t5", "mt5", "umt5")

# Encoder-decoders of which only the encoder embeds, as sentence-transformers takes them.
_ENCODER_HALF = ("t5", "mt5", "umt5")

_INDEX = "model.safetensors.index.json"

Built = tuple[CheckableEncoder, Tokenizer, str]
"""An encoder, its tokenizer, and the dtype of its weights."""


def build(folder: Folder, spec: ModelSpec, device: torch.device) -> Built:
    """The encoder and tokenizer of a folder.

    Raises:
        BadModel: the folder is broken, or cannot be served exactly.
    """
    if spec.trust_remote_code:
        log.warning("model.remote_code_trusted", model=spec.model_id, source=spec.source, revision=spec.revision)
    kind = "Transformer" if folder.modules is None else folder.modules[0].kind
    if kind == "StaticEmbedding":
        return build_static(folder, spec, device)
    if kind == "Transformer":
        return _build_transformer(folder, spec, device)
    raise UnsupportedModel(
        f"modules.json begins with a {kind!r} module; only Transformer and StaticEmbedding can come first"
    )


def _build_transformer(folder: Folder, spec: ModelSpec, device: torch.device) -> Built:
    if (folder.weights / "adapter_config.json").exists():
        raise UnsupportedModel(
            "adapter_config.json says that this is a PEFT adapter; merge it into its base model and serve the result"
        )
    config = _read_config(folder, spec)
    dtype = choose_dtype(spec, config, device)
    is_copied = device.type == "cpu" and is_writable_in_place(spec.source)
    model = _read_model(folder, spec, config, dtype, is_copied=is_copied).to(device).eval()
    drop_pooler(model)
    _check_pooling_is_known(folder, spec, model)
    vocab_size = _vocab_size(model)
    seen = observe(model, vocab_size, device)
    chain = build_chain(folder, seen.width or _stated_width(config), device, spec.pooling)
    reader = Reader(
        config,
        vocab_size=vocab_size,
        position_limit=min(filter(None, (seen.position_limit, Positions(model).limit)), default=None),
        pooling=chain.pooling,
        counts_prompt=chain.excludes_prompt,
    )
    tokenizer = read_tokenizer(folder, spec, reader)
    against_packing = seen.why_not_packed(tokenizer.max_tokens)
    encoder = TransformerEncoder(model, chain, device, capturer_for(device), notes=against_packing)
    return encoder, tokenizer, str(dtype).removeprefix("torch.")


def choose_dtype(spec: ModelSpec, config: PretrainedConfig, device: torch.device) -> torch.dtype:
    """float32 on CPU, bfloat16 on a GPU, unless the registry says otherwise.

    Raises:
        UnsupportedModel: float16 for a family that overflows in it.
    """
    if spec.dtype == "float16" and config.model_type.startswith(_NO_FLOAT16):
        raise UnsupportedModel(f"{config.model_type} overflows in float16; set `dtype: bfloat16` or leave it out")
    if spec.dtype == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    dtype: torch.dtype = getattr(torch, spec.dtype)
    return dtype


def _stated_width(config: PretrainedConfig) -> int:
    """Of the hidden states of a model whose forward pass fails: the self-check is to say how.

    Raises:
        UnsupportedModel: it is not stated either.
    """
    width = getattr(config.get_text_config(), "hidden_size", None)
    if not isinstance(width, int):
        raise UnsupportedModel(
            f"config.json describes a {config.model_type}, whose forward pass gives no hidden states for text; only "
            "text models can be served"
        )
    return width


def _vocab_size(model: Any) -> int:
    """Rows of the table that token ids choose from.

    Raises:
        UnsupportedModel: there is none.
    """
    try:
        table = model.get_input_embeddings()
        size = int(getattr(table, "num_embeddings", None) or table.weight.shape[0])
    except (AttributeError, NotImplementedError) as error:
        raise UnsupportedModel(
            f"config.json describes a {model.config.model_type}, which has no table of tokens; only text models that "
            "have one can be served"
        ) from error
    return size


def _check_pooling_is_known(folder: Folder, spec: ModelSpec, model: Any) -> None:
    """Without a modules.json, encoders are mean-pooled as sentence-transformers does; for decoders that is a guess.

    Raises:
        UnsupportedModel: a causal model without stated pooling: families differ between last token and mean.
    """
    if folder.modules is not None or spec.pooling is not None:
        return
    looks_back = any(getattr(module, "is_causal", False) for module in model.modules())
    if looks_back and getattr(model.config, "is_causal", True) is not False:
        raise UnsupportedModel(
            "there is no modules.json, and a causal model may be pooled by its last token or by the mean; say which in "
            "the registry: `pooling: last_token` or `pooling: mean`"
        )
    log.warning("model.pooling_assumed", model=spec.model_id, pooling="mean", why="no modules.json")


def _read_config(folder: Folder, spec: ModelSpec) -> PretrainedConfig:
    check_counts(read_json(folder.weights, "config.json") or {})
    options = dict(folder.transformer.get("config_kwargs") or folder.transformer.get("config_args") or {})
    options.pop("trust_remote_code", None)
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(
            folder.weights, trust_remote_code=spec.trust_remote_code, local_files_only=True, **options
        )
    # Validation of configs raises whatever their classes like.
    except Exception as error:
        raise _refusal(error, "config.json") from error
    if config.is_encoder_decoder and config.model_type not in _ENCODER_HALF:
        raise UnsupportedModel(
            f"{config.model_type} is an encoder with a decoder; of such models only {', '.join(_ENCODER_HALF)} can be "
            "served, by their encoder"
        )
    config.use_cache = False
    return config


def _read_model(
    folder: Folder, spec: ModelSpec, config: PretrainedConfig, dtype: torch.dtype, *, is_copied: bool
) -> Any:
    """The transformer with all of its weights from the files: one that is made up would be a wrong vector.

    Args:
        is_copied: its weights are read into memory. Else, on a CPU, they may be a map of the file for as long as the
            model lives: who truncates that file ends the process (SIGBUS), who writes over it bends vectors.
    """
    family = AutoModelForTextEncoding if config.model_type in _ENCODER_HALF else AutoModel
    shards = _listed_shards(folder.weights)
    check_proportions(family, config, folder.weights, shards, trust_remote_code=spec.trust_remote_code)
    try:
        model, report = family.from_pretrained(
            folder.weights, config=config, dtype=dtype, trust_remote_code=spec.trust_remote_code,
            local_files_only=True, output_loading_info=True, disable_mmap=is_copied or None,
        )  # fmt: skip
        if is_copied and ".bin" in _weight_file(folder.weights):  # transformers maps pickled files in any case
            for tensor in (*model.parameters(), *model.buffers()):
                tensor.data = tensor.data.clone()
    # A corrupt pickle raises whatever its bytes happen to mean.
    except Exception as error:
        if is_out_of_memory(error):  # a file that is whole must not be fetched again for it
            raise
        raise _refusal(error, _broken_file(folder.weights)) from error
    missing = set(report["missing_keys"])
    lost = sorted(missing - unused_weights(missing))
    if lost:
        file = _weight_file(folder.weights)
        raise BrokenFiles(
            f"{file} lacks {len(lost)} tensors that the model needs, {lost[0]!r} first: they would be random. Fetch "
            f"the model again; or, if this kind of {config.model_type!r} needs code of its own, set "
            "`trust_remote_code: true` and a 40-hex `revision` in the registry",
            file=file,
        )
    return model


def _refusal(error: Exception, file: str) -> BadModel:
    """What an error of `from_pretrained` means; its own text may hold paths."""
    text = str(error)
    if "trust_remote_code" in text:
        return UnsupportedModel(
            "config.json names code of the model's own repository, which stays off; read it, then set "
            "`trust_remote_code: true` and a 40-hex `revision` in the registry"
        )
    if isinstance(error, ImportError):
        return UnsupportedModel(f"the model's code needs Python packages that are not installed: {error.name or text}")
    if "model type" in text and isinstance(error, ValueError | KeyError):
        return UnsupportedModel(
            "config.json names a model type that the installed transformers does not know; update transformers, or "
            "use another model"
        )
    if "size mismatch" in text or "mismatched" in text:
        return BrokenFiles(
            f"{file} does not fit config.json: tensors have other shapes than it says; fetch the model again", file=file
        )
    return BrokenFiles(f"{file} cannot be read ({type(error).__name__}); fetch the model again", file=file)


def _weight_file(weights: Path) -> str:
    """What the weights are called here, for messages."""
    names = ("model.safetensors", _INDEX, "pytorch_model.bin", "pytorch_model.bin.index.json")
    return next((name for name in names if (weights / name).exists()), names[0])


def _broken_file(weights: Path) -> str:
    """The weight file that is missing or cannot be opened."""
    for shard in [*_listed_shards(weights), *sorted(path.name for path in weights.glob("*.safetensors"))]:
        try:
            with safe_open(weights / shard, framework="pt"):
                pass
        except (SafetensorError, OSError):
            return shard
    return _weight_file(weights)


def _listed_shards(weights: Path) -> list[str]:
    listed = read_json(weights, _INDEX) or {}
    return sorted(set(listed.get("weight_map", {}).values()))
