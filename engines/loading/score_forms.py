"""Finds out from a folder's JSON files whether it gives scores, and in which form. Loads no weights."""

from typing import Literal

from engines.errors import UnsupportedModel
from engines.loading.folder import Folder, read_json
from engines.loading.rerank_templates import is_known_reranker
from engines.spec import ModelSpec

Form = Literal["classifier", "logits", "pooled", "original"]
"""A sequence classifier; a language model with a `LogitScore`; pooling and dense layers; a causal reranker, as its
authors publish it."""

_TASKS: dict[str, Form] = {
    "sequence-classification": "classifier",
    "text-generation": "logits",
    "feature-extraction": "pooled",
}
"""What sentence-transformers calls the transformer's task."""


def score_form(folder: Folder, spec: ModelSpec) -> Form | None:
    """Returns how a folder gives scores; None where it gives vectors.

    Raises:
        UnsupportedModel: the registry's `task` contradicts it.
    """
    form = _form(folder, spec)
    if form is None and spec.task not in (None, "embed"):
        raise UnsupportedModel(
            f"the registry says `task: {spec.task}`, but these are the files of an embedding model: remove `task`, or "
            "set `template` if this is a causal reranker"
        )
    if form is not None and spec.task == "embed":
        raise UnsupportedModel(
            "the registry says `task: embed`, but these are the files of a model that scores: remove `task`"
        )
    return form


def _form(folder: Folder, spec: ModelSpec) -> Form | None:
    architecture = _architecture(folder)
    if folder.is_cross_encoder and folder.modules is not None:
        return _TASKS.get(folder.transformer.get("transformer_task", "feature-extraction"))
    if folder.modules is not None or (spec.pooling is not None and not folder.is_cross_encoder):
        return None
    if architecture.endswith("ForCausalLM"):
        asks = spec.template is not None or spec.task == "rerank" or folder.is_cross_encoder
        return "original" if asks or is_known_reranker(spec.source) else None
    return "classifier" if folder.is_cross_encoder or architecture.endswith("ForSequenceClassification") else None


def _architecture(folder: Folder) -> str:
    stated = (read_json(folder.weights, "config.json") or {}).get("architectures")
    return stated[0] if isinstance(stated, list) and stated and isinstance(stated[0], str) else ""
