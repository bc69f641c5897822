"""Builds rerankers and classifiers: finds out what a folder says of its scores, and checks the head that gives them.

Folders come in four forms: the plain folder of a sequence classifier; the folder that sentence-transformers'
CrossEncoder saves, with a `modules.json` of a classifier, of a language model and a `LogitScore`, or of pooling and a
dense layer; and the original folder of a causal reranker, which states no template.
"""

import inspect
from collections.abc import Mapping
from functools import partial
from typing import Any

import structlog
import torch
from msgspec import structs
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PretrainedConfig

from engines.batching.scores import Scoring, activation_named
from engines.errors import BadModel, SelfCheckFailed, UnsupportedModel, is_device_error
from engines.form_cache import QUANTIZED
from engines.inputs.pairs import PairTokenizer
from engines.loading.builders import Built, dtype_name, read_config, read_model, stated_width, vocab_size_of
from engines.loading.folder import Folder, read_json, require_json
from engines.loading.module_settings import Json, check_options
from engines.loading.modules import build_head
from engines.loading.pairs import by_chat_template, by_template, paired
from engines.loading.rerank_templates import TemplateText, template_of
from engines.loading.score_forms import Form
from engines.loading.tokenizer import ModelFacts, Reference, read_reference
from engines.models.adapters import Positions, drop_pooler
from engines.models.base import EncoderConfig
from engines.models.cuda_graphs import capturer_for
from engines.models.head import EmbeddingHead
from engines.models.observation import Observed, observe
from engines.models.score_head import (
    TOLERANCE,
    LogitTokens,
    Probe,
    ScoreHead,
    plain_logits,
    relative_error,
    select_rows,
)
from engines.models.transformer import TransformerEncoder
from engines.models.weight_forms import weight_form
from engines.spec import ModelSpec, Task

log = structlog.get_logger(__name__)

_SCORES = "scores"

_STRUCTURED = ("content[0]", ".type", "'type'", '"type"', "item.type", "message.content[")
"""What a chat template contains that reads contents as lists of parts (sentence-transformers' `InputFormatter`)."""

_FLAT_TYPES = ("apertus", "deepseek_v3", "gpt_oss", "seed_oss")


def build_scorer(folder: Folder, spec: ModelSpec, encoder_config: EncoderConfig, form: Form) -> Built:
    """Builds the encoder, the tokenizer and the description of a model that scores.

    Raises:
        BadModel: the folder is broken, or cannot be served exactly.
    """
    if spec.dtype in QUANTIZED:
        raise UnsupportedModel(
            f"`dtype: {spec.dtype}` is for models that embed, whose vectors have a bound; set `dtype: bfloat16` or "
            "leave it out"
        )
    if spec.trust_remote_code:
        log.warning("model.remote_code_trusted", model=spec.model_id, source=spec.source, revision=spec.revision)
    _check_modules(folder, form)
    config = read_config(folder, spec)
    if config.is_encoder_decoder:
        raise UnsupportedModel(f"the head of a {config.model_type} reads a decoder, which is not supported")
    template = template_of(spec, config.model_type) if form == "original" else None
    if template is not None and spec.max_tokens is None:
        limit = getattr(config, "max_position_embeddings", None) or template.max_tokens
        spec = structs.replace(spec, max_tokens=min(template.max_tokens, limit))
    parts = _Parts(folder, spec, config, encoder_config.device, form)
    pairs = parts.pairs(template)
    head = parts.head(pairs, template)
    drop_pooler(parts.backbone)
    dtype = dtype_name(parts.backbone)
    encoder_config = structs.replace(encoder_config, weight_form=weight_form(dtype, encoder_config.device))
    encoder = TransformerEncoder(
        parts.backbone, head, encoder_config, capturer_for(encoder_config.device),
        notes=parts.observed.why_not_packed(pairs.max_tokens), has_types=pairs.pair.has_types,
    )  # fmt: skip
    parts.check(encoder)
    scoring = _scoring(folder, spec, config, pairs, head.dimensions)
    return Built(encoder, pairs.tokenizer, dtype, scoring)


class _Parts:
    """The model of a folder with its tokenizer, before its head is taken off."""

    def __init__(
        self, folder: Folder, spec: ModelSpec, config: PretrainedConfig, device: torch.device, form: Form
    ) -> None:
        classes = {"classifier": AutoModelForSequenceClassification, "pooled": None}
        self._folder, self._spec, self._config, self._form = folder, spec, config, form
        self._device = device
        model_class = classes.get(form, AutoModelForCausalLM)
        self._model = read_model(folder, spec, config, device, model_class).to(device).eval()
        self.backbone: Any = (
            self._model if form == "pooled" else getattr(self._model, self._model.base_model_prefix, None)
        )
        if self.backbone is None:
            raise UnsupportedModel(f"{type(self._model).__name__} has no part without the head; it is not supported")
        both = (self._model.forward, self.backbone.forward)
        reads_types = all("token_type_ids" in inspect.signature(forward).parameters for forward in both)
        self._num_types = (getattr(config, "type_vocab_size", 0) or 0) if reads_types else 0
        vocab_size = vocab_size_of(self.backbone)
        self.observed: Observed = observe(self.backbone, vocab_size, device)
        limits = (self.observed.position_limit, Positions(self.backbone).limit)
        facts = ModelFacts(
            config,
            vocab_size=vocab_size,
            position_limit=min(filter(None, limits), default=None),
            pooling=(),
            counts_prompt=False,
        )
        self._reference: Reference = read_reference(folder, spec, facts)
        self._probes: list[Probe] = []

    def pairs(self, template: TemplateText | None) -> PairTokenizer:
        """Returns the tokenizer of pairs, by template, by chat template or as the tokenizer pairs them."""
        folder, spec, reference = self._folder, self._spec, self._reference
        prompts: Mapping[str, str] = {**folder.prompts, **spec.prompts}
        name = spec.default_prompt or folder.default_prompt
        prompt = prompts.get(name) if name is not None else None
        if template is None and not _uses_chat(folder, reference):
            return paired(reference, prompt or "", self._num_types)
        if reference.tokenizer.limits.truncate == "start" and spec.truncate is None:
            raise UnsupportedModel(
                "the tokenizer truncates at the start, which would cut the template: set `truncate: end` in the "
                "registry"
            )
        if template is not None:
            return by_template(reference, template, prompt)
        return by_chat_template(reference, partial(_render, folder, reference), prompt or None)

    def head(self, pairs: PairTokenizer, template: TemplateText | None) -> ScoreHead | EmbeddingHead:
        """Returns the head, compared with the model's own forward pass."""
        if self._form == "pooled":
            return self._pooled_head()
        tokens = self._tokens(template)
        has_types = pairs.pair.has_types
        try:
            texts = pairs.encode(["The yard keeps."] * 2, ["Über den Dächern, 两个人.", "It does."]).ids
            self._probes = plain_logits(self._model, texts, tokens, has_types=has_types)
            head = ScoreHead(self._model, self._model.base_model_prefix, tokens)
            drop_pooler(self.backbone)  # it is the head's now, in float32
            dropped = None if tokens is not None else getattr(self._config.get_text_config(), "pad_token_id", None)
            rows = select_rows(head, self.backbone, self._probes, dropped, has_types=has_types)
        except Exception as error:
            if is_device_error(error) or isinstance(error, BadModel):
                raise
            raise UnsupportedModel(
                f"the head of {type(self._model).__name__} cannot be run on its own ({type(error).__name__}); "
                "use another model"
            ) from error
        pairs.dropped_id = dropped if rows == "lasttoken" else None
        return head

    def check(self, encoder: TransformerEncoder) -> None:
        """Compares the encoder's reference, with which the check at load compares every path, with the scores of the
        model's own class.

        Raises:
            SelfCheckFailed: it computes something else.
        """
        for probe in self._probes:
            found = encoder.reference([probe.ids])[0].to(probe.logits.device)
            far = relative_error(found, probe.logits)
            if not far <= TOLERANCE[self.backbone.dtype]:
                raise SelfCheckFailed(
                    f"the model's scores are {far:.1e} from those of its own class, {type(self._model).__name__}, more "
                    f"than the {TOLERANCE[self.backbone.dtype]:.0e} that rounding explains; use another model"
                )

    def _pooled_head(self) -> EmbeddingHead:
        width = self.observed.width or stated_width(self._config)
        head = build_head(self._folder, width, self._device, None)
        if _SCORES not in head.widths:
            raise UnsupportedModel("modules.json has no Dense module that gives `scores`; fetch the model again")
        head.target = _SCORES
        return head

    def _tokens(self, template: TemplateText | None) -> LogitTokens | None:
        """Returns the tokens that a language model answers with; None for a classifier.

        Raises:
            UnsupportedModel: the tokenizer lacks them, or they are the same.
        """
        if self._form == "classifier":
            return None
        if template is not None:
            words = [word for word in (template.true, template.false) if word is not None]
            rows = self._reference.tokenizer.encode_bare(words)
            if any(len(row) != 1 for row in rows):
                raise UnsupportedModel(
                    f"the template is answered by {' or '.join(words)}, which this tokenizer does not know as one "
                    "token each: it belongs to another model; correct `template` in the registry"
                )
            return LogitTokens(*(row[0] for row in rows))
        assert self._folder.modules is not None, "`score_form` has seen its modules.json"
        file = self._folder.modules[1].file("config.json")
        config = require_json(self._folder.root, file)
        true, false = config.get("true_token_id"), config.get("false_token_id")
        if type(true) is not int or type(false) not in (int, type(None)) or true == false:
            raise UnsupportedModel(f"{file} reads the tokens {true!r} and {false!r}; fetch the model again")
        return LogitTokens(true, false)


def _check_modules(folder: Folder, form: Form) -> None:
    """Rejects modules that no CrossEncoder of this form has, and options that change scores.

    Raises:
        UnsupportedModel
    """
    if folder.modules is None:
        return
    kinds = [module.kind for module in folder.modules]
    wanted: dict[Form, list[str]] = {"classifier": ["Transformer"], "logits": ["Transformer", "LogitScore"]}
    if kinds != wanted.get(form, kinds) or kinds[0] != "Transformer":
        raise UnsupportedModel(
            f"modules.json lists {', '.join(kinds)}; a CrossEncoder of a Transformer alone, with a LogitScore, or with "
            "Pooling and Dense is supported"
        )
    transformer = {key: value for key, value in folder.transformer.items() if key != "processing_kwargs"}
    check_options(transformer, "sentence_bert_config.json")
    processing = {key: value for key, value in _processing(folder).items() if value and key != "chat_template"}
    if processing:
        raise UnsupportedModel(
            f"sentence_bert_config.json sets processing_kwargs.{next(iter(processing))}, which may change scores and "
            "is not supported"
        )


def _processing(folder: Folder) -> Json:
    return dict(folder.transformer.get("processing_kwargs") or {})


def _uses_chat(folder: Folder, reference: Reference) -> bool:
    """Whether pairs are rendered by a chat template, by sentence-transformers' rule."""
    if folder.modules is None:
        return getattr(reference.theirs, "chat_template", None) is not None
    return "message" in (folder.transformer.get("modality_config") or {})


def _render(folder: Folder, reference: Reference, query: str, text: str, instruction: str | None) -> str:
    """Renders a pair as sentence-transformers does: a message of each role, behind one of the system."""
    theirs = reference.theirs
    roles = {"system": instruction, "query": query, "document": text}
    given = {role: content for role, content in roles.items() if content is not None}
    is_flat = _has_flat_messages(folder, getattr(theirs, "chat_template", None))
    messages = [
        {"role": role, "content": content if is_flat else [{"type": "text", "text": content}]}
        for role, content in given.items()
    ]
    options: Json = dict(_processing(folder).get("chat_template") or {})
    options.pop("restore_suffix", None)
    rendered: str = theirs.apply_chat_template(messages, tokenize=False, **options)
    return rendered


def _has_flat_messages(folder: Folder, template: Any) -> bool:
    stated = (folder.transformer.get("modality_config") or {}).get("message") or {}
    if stated.get("format") in ("flat", "structured"):
        return bool(stated["format"] == "flat")
    if (read_json(folder.weights, "config.json") or {}).get("model_type") in _FLAT_TYPES:
        return True
    return isinstance(template, str) and bool(template) and not any(mark in template for mark in _STRUCTURED)


def _scoring(
    folder: Folder, spec: ModelSpec, config: PretrainedConfig, pairs: PairTokenizer, num_labels: int
) -> Scoring:
    task: Task = spec.task or ("rerank" if num_labels == 1 else "classify")
    if task == "rerank" and num_labels > 1:
        raise UnsupportedModel(
            f"the registry says `task: rerank`, but the model has {num_labels} labels: set `task: classify`"
        )
    names = getattr(config, "id2label", None) or {}
    labels = tuple(str(names.get(number, f"LABEL_{number}")) for number in range(num_labels))
    activation = _activation(folder, num_labels)
    activation_named(activation)
    return Scoring(
        pairs=pairs,
        task=task,
        labels=labels,
        is_multi_label=getattr(config, "problem_type", None) == "multi_label_classification",
        activation=activation,
    )


def _activation(folder: Folder, num_labels: int) -> str:
    """Returns the activation's name in torch.nn, by sentence-transformers' rule: the folder's, else the default.

    The folder's stands in `config_sentence_transformers.json`, or in the `config.json` of folders from before
    version 4 and 5. One that is not torch's is code that sentence-transformers does not run either without trust.
    """
    config = read_json(folder.weights, "config.json") or {}
    newer = config.get("sentence_transformers")
    stated = (
        (folder.activation if folder.modules is not None else None)
        or (newer.get("activation_fn") if isinstance(newer, dict) else None)
        or config.get("sbert_ce_default_activation_function")
    )
    if isinstance(stated, str) and stated.startswith("torch."):
        return stated.rsplit(".", 1)[-1]
    if stated is not None:
        log.warning("model.activation_ignored", activation=str(stated)[:200], why="it is not one of torch's")
    return "Sigmoid" if num_labels == 1 else "Identity"
