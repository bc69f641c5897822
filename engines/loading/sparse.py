"""Builds the encoders and tokenizers of the folders that sentence-transformers' SparseEncoder saves."""

from collections.abc import Sequence
from typing import Any

import structlog
import torch
from msgspec import structs
from torch import Tensor
from transformers import AutoModelForMaskedLM, PretrainedConfig

from engines.batching.outputs import OutputFacts
from engines.errors import BadModel, BrokenFiles, SelfCheckFailed, UnsupportedModel, is_device_error
from engines.form_cache import QUANTIZED
from engines.inputs.prompts import PromptTemplate
from engines.inputs.tokenizer import Ids, Tokenizer
from engines.loading.auto_encoder import build_auto_encoder, has_auto_encoder
from engines.loading.builders import Built, dtype_name, facts_of, read_config, read_model, vocab_size_of
from engines.loading.folder import Folder, read_json, require_json
from engines.loading.module_weights import read_module_weights
from engines.loading.routes import STATIC, kinds_of, read_routes
from engines.loading.tokenizer import ModelFacts, read_reference, read_tokenizer
from engines.models.adapters import Positions, drop_pooler
from engines.models.base import EncoderConfig
from engines.models.lexical import LexicalTable
from engines.models.multi_output import MultiOutputEncoder
from engines.models.observation import observe
from engines.models.output_heads import OutputHeads
from engines.models.score_head import TOLERANCE
from engines.models.splade import SpladeHead, SpladePooling
from engines.models.weight_forms import weight_form
from engines.spec import ModelSpec

log = structlog.get_logger(__name__)

_LOGS = {"relu": 1, "log1p_relu": 2}
"""How often `SpladePooling` applies `log1p`, by its `activation_function`."""

_PROBES = ("The yard keeps.", "Über den Dächern, 两个人.")


def build_sparse(folder: Folder, spec: ModelSpec, encoder_config: EncoderConfig) -> Built:
    """Builds the encoder and the tokenizers of a SparseEncoder's folder.

    Raises:
        BadModel: the folder is broken, or cannot be served exactly.
    """
    if spec.dtype in QUANTIZED or spec.pooling is not None:
        key = f"dtype: {spec.dtype}" if spec.dtype in QUANTIZED else "pooling"
        raise UnsupportedModel(f"the registry sets `{key}`, which is for models that give dense vectors: remove it")
    if has_auto_encoder(folder):
        return build_auto_encoder(folder, spec, encoder_config)
    routes = read_routes(folder)
    if routes.document == routes.query and kinds_of(routes.query) == [STATIC]:
        if folder.adapter is not None:
            raise UnsupportedModel(f"an adapter needs a transformer to be merged into, and this model is a {STATIC}")
        table, tokenizer = _read_static(routes.query, spec, encoder_config.device)
        return Built(table, tokenizer, "float32", facts=OutputFacts(outputs=("sparse",), vocab_size=table.vocab_size))
    if routes.document == routes.query:
        return _build_splade(routes.document, spec, encoder_config)
    table, tokenizer = _read_static(routes.query, spec, encoder_config.device)
    built = _build_splade(routes.document, spec, encoder_config, table)
    facts = structs.replace(built.facts, default_side=routes.default, query_tokenizer=tokenizer)
    return built._replace(facts=facts)


def _read_static(folder: Folder, spec: ModelSpec, device: torch.device) -> tuple[LexicalTable, Tokenizer]:
    """Reads a table of weights, and a tokenizer that adds no special tokens."""
    assert folder.modules is not None, "its kind is known"
    ref = folder.modules[0]
    if (read_json(folder.root, ref.file("config.json")) or {}).get("path") is not None:
        raise UnsupportedModel(
            f"{ref.file('config.json')} takes its weights from a JSON file; save the model again with "
            "sentence-transformers 5 or newer"
        )
    weights = read_module_weights(folder.root, ref)
    table = weights.take("weight", device)
    weights.check_all_taken()
    if table.ndim != 1 or not len(table):
        raise BrokenFiles(
            f"'weight' in {weights.file} is not a list of weights; fetch the model again", file=weights.file
        )
    facts = ModelFacts(PretrainedConfig(), len(table), position_limit=None, pooling=(), counts_prompt=False)
    found = read_reference(folder, spec, facts).tokenizer
    limits = structs.replace(found.limits, prefix=(), suffix=(), takes_empty=True)
    return LexicalTable(table, device, folder.max_active_dims), Tokenizer(found.backend, limits)


def _build_splade(
    folder: Folder, spec: ModelSpec, encoder_config: EncoderConfig, queries: LexicalTable | None = None
) -> Built:
    """Builds a masked language model with `SpladePooling`."""
    if spec.trust_remote_code:
        log.warning("model.remote_code_trusted", model=spec.model_id, source=spec.source, revision=spec.revision)
    device, pooling = encoder_config.device, _read_pooling(folder)
    config = read_config(folder, spec)
    model = read_model(folder, spec, config, device, AutoModelForMaskedLM).to(device).eval()
    prefix: str = model.base_model_prefix
    backbone = getattr(model, prefix, None)
    if backbone is None:
        raise UnsupportedModel(f"{type(model).__name__} has no part without the head; it is not supported")
    drop_pooler(backbone)
    vocab_size = vocab_size_of(backbone)
    observed = observe(backbone, vocab_size, device)
    limits = (observed.position_limit, Positions(backbone).limit)
    facts = ModelFacts(config, vocab_size, min(filter(None, limits), default=None), pooling=(), counts_prompt=False)
    tokenizer = read_tokenizer(folder, spec, facts)
    probes = tokenizer.encode(_PROBES, PromptTemplate(), "end").ids
    expected = _plain_weights(model, probes, pooling)
    head = SpladeHead(model, prefix, pooling, encoder_config.preemption_point)
    if queries is not None and queries.vocab_size != head.vocab_size:
        raise UnsupportedModel(
            f"queries have {queries.vocab_size} entries and documents {head.vocab_size}, which are not the same: fetch "
            "the model again"
        )
    dtype = dtype_name(backbone)
    encoder_config = structs.replace(encoder_config, weight_form=weight_form(dtype, device))
    heads = OutputHeads(sparse=head, queries=queries)
    notes = observed.why_not_packed(tokenizer.max_tokens)
    encoder = MultiOutputEncoder(backbone, heads, encoder_config, notes=notes)
    _check(encoder, probes, expected, type(model).__name__)
    return Built(encoder, tokenizer, dtype, facts=facts_of(heads, OutputFacts(outputs=())))


def _read_pooling(folder: Folder) -> SpladePooling:
    """Reads the pooling of a chain of two modules.

    Raises:
        BrokenFiles, UnsupportedModel: naming the file.
    """
    assert folder.modules is not None, "`read_routes` has read it"
    file = folder.modules[1].file("config.json")
    config = require_json(folder.root, file)
    strategy, activation = config.get("pooling_strategy", "max"), config.get("activation_function", "relu")
    if strategy not in ("max", "sum") or activation not in _LOGS:
        raise UnsupportedModel(
            f"{file} pools by {strategy!r} of {activation!r}; `max` or `sum` of {' or '.join(_LOGS)} are supported"
        )
    return SpladePooling(strategy, _LOGS[activation], folder.max_active_dims)


@torch.inference_mode()
def _plain_weights(model: Any, texts: Sequence[Ids], pooling: SpladePooling) -> list[Tensor]:
    """Returns the weights of all entries by the model's own forward pass over each text alone, float32 `[vocabulary]`.

    Written beside `SpladeHead`, in the order of the definition: the functions of each logit, then the tokens.
    """
    found = []
    for ids in texts:
        row = torch.from_numpy(ids)[None].to(model.device)
        weights = model(input_ids=row, attention_mask=torch.ones_like(row)).logits[0].float().clamp(min=0)
        for _ in range(pooling.logs):
            weights = torch.log(1 + weights)
        found.append(weights.amax(0) if pooling.strategy == "max" else weights.sum(0))
    return found


@torch.inference_mode()
def _check(encoder: MultiOutputEncoder, texts: Sequence[Ids], expected: Sequence[Tensor], name: str) -> None:
    """Compares the head with the model's own forward pass, before the check at load compares every path with it.

    Raises:
        SelfCheckFailed: it computes something else.
        UnsupportedModel: it cannot run on its own.
    """
    allowed = TOLERANCE[encoder.model_dtype]
    for ids, wanted in zip(texts, expected, strict=True):
        try:
            found = encoder.sparse_weights([ids])[0]
        except Exception as error:
            if is_device_error(error) or isinstance(error, BadModel):
                raise
            raise UnsupportedModel(
                f"the head of {name} cannot be run on its own ({type(error).__name__}); use another model"
            ) from error
        far = float(((found - wanted).abs() / wanted.clamp(min=1)).max()) if found.shape == wanted.shape else torch.inf
        if not far <= allowed:
            raise SelfCheckFailed(
                f"the model's weights are {far:.1e} from those of its own class, {name}, more than the {allowed:.0e} "
                "that rounding explains; use another model"
            )
