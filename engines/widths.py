"""How wide a model's vectors are, read from its JSON files: for lists of models that nobody has loaded."""

from collections.abc import Sequence
from pathlib import Path

from engines.errors import BadModel
from engines.folder import ModuleRef, read_folder, read_json, require_json
from engines.module_configs import Json, pooling_of
from engines.spec import ModelSpec
from engines.weights import read_header, read_range

_HIDDEN = ("hidden_size", "d_model", "dim", "n_embd", "emb_dim")
"""What architectures call the width of their hidden states."""

_POOLED = ("embedding_dimension", "word_embedding_dimension")
"""What sentence-transformers calls the width of what it pools, now and before."""

_PROJECTING = ("embedding_gemma2_text",)
"""Architectures whose hidden states leave through a projection, `embedding_dim` wide."""

_STATIC_TABLES = ("embedding.weight", "embeddings")


def native_width(root: Path, spec: ModelSpec) -> int | None:
    """The width that the engine will have; None where the files do not say, or are no model."""
    try:
        return _width(root, spec)
    except (BadModel, OSError, KeyError, TypeError, ValueError, StopIteration):
        return None


def _width(root: Path, spec: ModelSpec) -> int:
    folder = read_folder(root)
    first, *behind = folder.modules or (ModuleRef("Transformer", ""),)
    if first.kind == "StaticEmbedding":
        return _table_width(root, first)
    config = require_json(folder.weights, "config.json")
    width = _pooled_width(root, behind) or _hidden_width(config)
    if not behind:
        return width * len(spec.pooling or ("mean",))
    for module in behind:
        width = _after(module, width, root, spec)
    return width


def _after(module: ModuleRef, width: int, root: Path, spec: ModelSpec) -> int:
    name = module.file("config.json")
    if module.kind == "Pooling":
        return width * len(spec.pooling or pooling_of(require_json(root, name), name))
    if module.kind == "Dense":
        return int((read_json(root, name) or {})["out_features"])
    return width


def _hidden_width(config: Json) -> int:
    """Models that also see or hear keep the figures of their text half apart."""
    text = config.get("text_config") or config
    projected = text.get("embedding_dim") if text.get("model_type") in _PROJECTING else None
    return int(projected or next(text[key] for key in _HIDDEN if key in text))


def _pooled_width(root: Path, behind: Sequence[ModuleRef]) -> int | None:
    """What the Pooling module says that it gets, where it comes first: models may project what they give."""
    if not behind or behind[0].kind != "Pooling":
        return None
    config = require_json(root, behind[0].file("config.json"))
    width = next((config[key] for key in _POOLED if key in config), None)
    return width if isinstance(width, int) and width > 0 else None


def _table_width(root: Path, module: ModuleRef) -> int:
    file = root / module.file("model.safetensors")
    tensors = read_header(
        file.name, file.stat().st_size, lambda name, start, end: read_range(file.parent, name, start, end)
    )
    return next(tensor.shape[1] for tensor in tensors if tensor.name in _STATIC_TABLES)
