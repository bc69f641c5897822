"""Builds an encoder and a tokenizer from a model folder, or raises an error that names the file and the remedy."""

from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import structlog
import torch
from msgspec import structs
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModel, AutoModelForTextEncoding, PretrainedConfig

from engines.batching.outputs import OutputFacts
from engines.batching.scores import Scoring
from engines.device.torch_runtime import compute_capability
from engines.errors import BadModel, BrokenFiles, UnsupportedModel, is_device_error
from engines.form_cache import QUANTIZED
from engines.hub.file_selection import ADAPTER_CONFIG
from engines.inputs.prompts import PromptTemplate
from engines.inputs.tokenizer import Tokenizer
from engines.loading.adapter import merge_adapter
from engines.loading.calibration_texts import CALIBRATION_TEXTS
from engines.loading.dtype import automatic_dtype, overflows_float16
from engines.loading.flag_heads import lexical_head
from engines.loading.folder import Folder, read_json
from engines.loading.form_files import FormSource
from engines.loading.modules import build_head
from engines.loading.multi_vector import TokenFacts, build_token_head
from engines.loading.preflight import check_counts, check_proportions
from engines.loading.pretrained import Earlier, KnownTensors, ModelSource, listed_shards, load_weights, weight_file_name
from engines.loading.recorded_tokenizer import RecordedTokenizer, TokenizerRecords
from engines.loading.static import build_static
from engines.loading.tokenizer import ModelFacts
from engines.models.adapters import Positions, unused_weights
from engines.models.base import EncoderConfig, LoadedEncoder
from engines.models.cuda_graphs import capturer_for
from engines.models.load_records import LoadRecords, Observation
from engines.models.multi_output import MultiOutputEncoder
from engines.models.output_heads import OutputHeads
from engines.models.parking import PINNED
from engines.models.placement import PlacedModel
from engines.models.weight_forms import fix_steps, weight_form
from engines.spec import Dtype, ModelSpec, Output
from engines.types import fingerprint

log = structlog.get_logger(__name__)

# Encoder-decoders of which only the encoder is used, as sentence-transformers does.
_ENCODER_ONLY_OF = ("t5", "mt5", "umt5")

_OWN_CODE = (
    "config.json names code from the model's own repository, which is disabled; review it, then set "
    "`trust_remote_code: true` and a 40-hex `revision` in the registry"
)


class Built(NamedTuple):
    """An encoder, its tokenizer, the dtype of its weights, and what is known of its scores or of its outputs."""

    encoder: LoadedEncoder
    tokenizer: Tokenizer
    dtype: str
    scoring: Scoring | None = None
    facts: OutputFacts = OutputFacts(outputs=())


class Knowledge(NamedTuple):
    """What earlier loads have kept, so that a load need not find it out again."""

    loads: LoadRecords
    tokenizers: TokenizerRecords


def build(
    folder: Folder,
    spec: ModelSpec,
    encoder_config: EncoderConfig,
    source: FormSource | None = None,
    knowledge: Knowledge | None = None,
) -> Built:
    """Builds the encoder and tokenizer of a folder.

    Args:
        source: where the form of its weights comes from; None for the folder.
        knowledge: of earlier loads; None for none.

    Raises:
        BadModel: the folder is broken, or cannot be served exactly.
    """
    if spec.trust_remote_code:
        log.warning("model.remote_code_trusted", model=spec.model_id, source=spec.source, revision=spec.revision)
    kind = "Transformer" if folder.modules is None else folder.modules[0].kind
    if folder.adapter is not None and kind != "Transformer":
        raise UnsupportedModel(f"an adapter needs a transformer to be merged into, and this model is a {kind}")
    if kind == "StaticEmbedding":
        static = build_static(folder, spec, encoder_config.device)
        return Built(*static, facts=OutputFacts(dimensions=static[0].dimensions))
    if kind == "Transformer":
        known = Knowledge(LoadRecords(None), TokenizerRecords(None)) if knowledge is None else knowledge
        return _build_transformer(folder, spec, encoder_config, source or FormSource(), known)
    raise UnsupportedModel(
        f"modules.json starts with the module {kind!r}; only Transformer and StaticEmbedding are supported there"
    )


def _build_transformer(
    folder: Folder, spec: ModelSpec, encoder_config: EncoderConfig, source: FormSource, knowledge: Knowledge
) -> Built:
    device = encoder_config.device
    recorded_tokenizer = RecordedTokenizer(folder, spec, knowledge.tokenizers)
    config = read_config(folder, spec)
    earlier = Earlier(knowledge.loads, begun=recorded_tokenizer.proceed)
    read = partial(read_model, folder, spec, config, device, earlier=earlier)
    model, encoder_config = _placed(source.model(read, model_class_of(config), config), encoder_config)
    _check_pooling_is_known(folder, spec, model)
    vocab_size = vocab_size_of(model)
    key = _observed_key(folder, spec, model)
    with source.observing():
        observation = Observation(model, vocab_size, device, knowledge.loads, key)
    observed = observation.observed
    width = observed.width or stated_width(config)
    head = None if folder.late is not None else build_head(folder, width, device, spec.pooling)
    facts = ModelFacts(
        config,
        vocab_size=vocab_size,
        position_limit=min(filter(None, (observed.position_limit, Positions(model).limit)), default=None),
        pooling=() if head is None else head.pooling,
        counts_prompt=head is not None and head.excludes_prompt,
    )
    reference = recorded_tokenizer.reference(facts)
    tokenizer = reference.tokenizer
    tokens, sides = build_token_head(folder, spec, reference, TokenFacts(width, facts.position_limit, observed), device)
    sparse = lexical_head(folder, width, vocab_size, reference.theirs, device)
    with source.observing():
        against_packing = observation.why_not_packed(sides.longest(tokenizer.max_tokens))
    name = spec.dtype if spec.dtype in QUANTIZED else dtype_name(model)
    form = weight_form(name, device, source.take) if encoder_config.placed is None else None
    encoder_config = structs.replace(encoder_config, weight_form=form)
    heads = OutputHeads(head, sparse, tokens=tokens)
    recorder = capturer_for(device) if encoder_config.placed is None else None
    encoder = MultiOutputEncoder(model, heads, encoder_config, recorder, notes=against_packing)
    fix_steps(model, partial(_run_calibration, encoder, tokenizer))
    return Built(encoder, tokenizer, name, facts=facts_of(heads, sides))


def _observed_key(folder: Folder, spec: ModelSpec, model: Any) -> str:
    """Returns what an observation depends on beside the environment; empty where that is more than the config.

    Config and class decide shapes, masks and positions; the values of the weights do not.
    """
    if spec.trust_remote_code or folder.adapter is not None:
        return ""
    return fingerprint([type(model).__qualname__, model.dtype, model.config.to_json_string(use_diff=False)])


def _run_calibration(encoder: MultiOutputEncoder, tokenizer: Tokenizer) -> None:
    """Runs the calibration texts through the fused layers, one by one and joined to two long ones: tokens at later
    positions, and among others, reach further. Without the long ones six times as many tokens of passages are out of
    range."""
    joined = (" ".join(CALIBRATION_TEXTS[first::2]) for first in range(2))
    read = (tokenizer.encode((text,), PromptTemplate(), "end").ids[0] for text in (*CALIBRATION_TEXTS, *joined))
    used = encoder.path
    encoder.switch_to("fused")
    with suppress(NotImplementedError):  # of attention: the check at load finds a path without it
        encoder.encode_batched(sorted(read, key=len))
    encoder.switch_to(used)


def _placed(model: Any, encoder_config: EncoderConfig) -> tuple[Any, EncoderConfig]:
    """Moves a model, which is in main memory, to the device or to the devices that it is split over."""
    placement = encoder_config.placement
    if placement is None:
        is_there = encoder_config.device.type == "cpu"  # also where weights have no memory yet
        return model if is_there else model.to(encoder_config.device), encoder_config
    placed = PlacedModel(model, placement, PINNED.pin)
    return model, structs.replace(encoder_config, placed=placed, max_prepacked_bytes=0)


def facts_of(heads: OutputHeads, sides: OutputFacts) -> OutputFacts:
    """Returns what heads give, and how queries and documents are told apart."""
    given: dict[Output, Any] = {"dense": heads.dense, "sparse": heads.sparse, "multi_vector": heads.tokens}
    return structs.replace(
        sides,
        outputs=tuple(name for name, head in given.items() if head is not None),
        dimensions=0 if heads.dense is None else heads.dense.dimensions,
        vocab_size=0 if heads.sparse is None else heads.sparse.vocab_size,
        vector_width=0 if heads.tokens is None else heads.tokens.width,
        states_width=heads.states_width,
        pooling_modes=() if heads.dense is None else heads.dense.pooling,
    )


def dtype_name(model: Any) -> str:
    """Returns the name of the dtype of a model's weights."""
    return str(model.dtype).removeprefix("torch.")


def choose_dtype(spec: ModelSpec, config: PretrainedConfig, device: torch.device) -> torch.dtype:
    """Returns the dtype of the weights: the registry's, else the one for the device (`engines/loading/dtype.py`).

    Raises:
        UnsupportedModel: float16 for a family that overflows in it.
    """
    if spec.dtype == "float16" and overflows_float16(config.model_type):
        raise UnsupportedModel(f"{config.model_type} overflows in float16; set `dtype: bfloat16` or leave it out")
    if spec.dtype in QUANTIZED and device.type == "cpu":
        return torch.float32  # rounded after the layers are fused
    name: Dtype = spec.dtype
    if name == "auto" or name in QUANTIZED:
        name = automatic_dtype(config.model_type, device.type, compute_capability(device))
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def stated_width(config: PretrainedConfig) -> int:
    """Returns the configured width of the hidden states, for a model whose forward pass fails.

    The model is built anyway, so that the self-check reports the failure.

    Raises:
        UnsupportedModel: the config states no width.
    """
    width = getattr(config.get_text_config(), "hidden_size", None)
    if not isinstance(width, int):
        raise UnsupportedModel(
            f"config.json describes a {config.model_type}, whose forward pass gives no hidden states for text; only "
            "text models are supported"
        )
    return width


def vocab_size_of(model: Any) -> int:
    """Returns the number of rows of the token embedding table.

    Raises:
        UnsupportedModel: the model has none.
    """
    try:
        table = model.get_input_embeddings()
        size = int(getattr(table, "num_embeddings", None) or table.weight.shape[0])
    except (AttributeError, NotImplementedError) as error:
        raise UnsupportedModel(
            f"config.json describes a {model.config.model_type}, which has no token embedding table; only text models "
            "with one are supported"
        ) from error
    return size


def _check_pooling_is_known(folder: Folder, spec: ModelSpec, model: Any) -> None:
    """Rejects a causal model without a stated pooling; logs that other models are mean-pooled.

    Without a modules.json, sentence-transformers mean-pools every model; for decoders that is a guess.

    Raises:
        UnsupportedModel: a causal model without stated pooling: families differ between last token and mean.
    """
    if folder.modules is not None or spec.pooling is not None or folder.late is not None:
        return
    is_causal = any(getattr(module, "is_causal", False) for module in model.modules())
    if is_causal and getattr(model.config, "is_causal", True) is not False:
        raise UnsupportedModel(
            "there is no modules.json, and causal models use either last-token or mean pooling; set it in the "
            "registry: `pooling: last_token` or `pooling: mean`"
        )
    log.warning("model.pooling_assumed", model=spec.model_id, pooling="mean", why="no modules.json")


def read_config(folder: Folder, spec: ModelSpec) -> PretrainedConfig:
    """Reads `config.json`.

    Raises:
        BrokenFiles, UnsupportedModel.
    """
    if (folder.weights / ADAPTER_CONFIG).exists():
        raise UnsupportedModel(
            f"{ADAPTER_CONFIG} marks a PEFT adapter: in the registry, name its base model as `source` and the adapter "
            "as `adapter` (`embedyard add` writes both)"
        )
    check_counts(read_json(folder.weights, "config.json") or {})
    options = dict(folder.transformer.get("config_kwargs") or folder.transformer.get("config_args") or {})
    options.pop("trust_remote_code", None)
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(
            folder.weights, trust_remote_code=spec.trust_remote_code, local_files_only=True, **options
        )
    # Validation of configs may raise any exception.
    except Exception as error:
        raise _translate_error(error, "config.json") from error
    if config.is_encoder_decoder and config.model_type not in _ENCODER_ONLY_OF:
        raise UnsupportedModel(
            f"{config.model_type} is an encoder-decoder; of these only {', '.join(_ENCODER_ONLY_OF)} are supported (by "
            "their encoder)"
        )
    config.use_cache = False
    return config


def read_model(  # a folder's four parts, its class, and what is known of it
    folder: Folder,
    spec: ModelSpec,
    config: PretrainedConfig,
    device: torch.device,
    model_class: Any = None,
    earlier: Earlier | None = None,
) -> Any:
    """Reads the transformer and checks that all weights come from the files: a random one would give wrong vectors.

    On a CPU the weights may be a memory map of the file for the life of the model: truncating that file kills the
    process (SIGBUS), overwriting it changes vectors. Files that are written in place are therefore read into memory.

    Args:
        device: where it will run; the model is returned on the CPU.
        model_class: transformers' class of a model with a head; None is the model without one.
        earlier: loads, one of which makes a check of proportions needless.
    """
    dtype = choose_dtype(spec, config, device)
    stored = dtype if folder.adapter is None else torch.float32
    has_head = model_class is not None
    model_class = model_class or model_class_of(config)
    shards = listed_shards(folder.weights)
    source = ModelSource(folder, spec, config, device, shards)
    known = KnownTensors(source, model_class, stored, earlier or Earlier(LoadRecords(None)))
    if not known.names:
        check_proportions(model_class, config, folder.weights, shards, trust_remote_code=spec.trust_remote_code)
    try:
        model, report = load_weights(source, model_class, stored, known)
    # A corrupt pickle may raise any exception.
    except Exception as error:
        if is_device_error(error):  # not a reason to download intact files again
            raise
        raise _translate_error(error, _broken_file(folder.weights)) from error
    missing = set(report["missing_keys"])
    if folder.adapter is not None:
        model, replaced = merge_adapter(model, folder.adapter, vocab_size_of(model))
        model, missing = model.to(dtype), missing - replaced
    _check_complete(sorted(missing if has_head else missing - unused_weights(missing)), folder, spec, config)
    return model


def model_class_of(config: PretrainedConfig) -> Any:
    """Returns transformers' class of the model without a head."""
    return AutoModelForTextEncoding if config.model_type in _ENCODER_ONLY_OF else AutoModel


def _check_complete(absent: Sequence[str], folder: Folder, spec: ModelSpec, config: PretrainedConfig) -> None:
    """Checks that no weights are absent.

    Raises:
        UnsupportedModel: the repository has its own code for a model type of the library's (jina-reranker-v2: an
            `xlm-roberta` with other tensors). Its files are whole, so that fetching them again would not help.
        BrokenFiles: some are.
    """
    if not absent:
        return
    file = weight_file_name(folder.weights)
    lacks = f"{file} lacks {len(absent)} tensors that the model needs (first: {absent[0]!r})"
    if getattr(config, "auto_map", None) and not spec.trust_remote_code:
        raise UnsupportedModel(f"{lacks}; {_OWN_CODE}")
    raise BrokenFiles(
        f"{lacks}; fetch the model again, or set `trust_remote_code: true` and a 40-hex `revision` in the registry if "
        f"this {config.model_type!r} model needs its own code",
        file=file,
    )


def _translate_error(error: Exception, file: str) -> BadModel:
    """Translates an error of `from_pretrained`, whose own text may contain paths."""
    text = str(error)
    if "trust_remote_code" in text:
        return UnsupportedModel(_OWN_CODE)
    if isinstance(error, ImportError):
        return UnsupportedModel(f"the model's code needs Python packages that are not installed: {error.name or text}")
    if "model type" in text and isinstance(error, ValueError | KeyError):
        return UnsupportedModel(
            "config.json names a model type that the installed transformers does not support; update transformers, or "
            "use another model"
        )
    if "size mismatch" in text or "mismatched" in text:
        return BrokenFiles(
            f"{file} does not match config.json: tensors have other shapes; fetch the model again", file=file
        )
    return BrokenFiles(f"{file} cannot be read ({type(error).__name__}); fetch the model again", file=file)


def _broken_file(weights: Path) -> str:
    """Returns the name of the weight file that is missing or cannot be opened."""
    for shard in [*listed_shards(weights), *sorted(path.name for path in weights.glob("*.safetensors"))]:
        try:
            with safe_open(weights / shard, framework="pt"):
                pass
        except (SafetensorError, OSError):
            return shard
    return weight_file_name(weights)
