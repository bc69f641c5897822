"""What a model folder says about itself, read from its JSON files. Loads no weights and runs no code of the folder.

The files are those of sentence-transformers: `modules.json`, `sentence_bert_config.json`,
`config_sentence_transformers.json`, and each module's `config.json`.
"""

import json
from pathlib import Path
from typing import Any, get_args

from msgspec import Struct

from engines.errors import BrokenFiles, UnsupportedModel
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


_OFFICIAL = "sentence_transformers."


PLACEHOLDER_PROMPTS = ("query", "document")
"""Prompt names that every model has, empty unless it says otherwise."""


_OWN = "config_sentence_transformers.json"


_TRANSFORMER_CONFIGS = tuple(
    f"sentence_{family}_config.json"
    for family in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)


_MAX_JSON_BYTES = 32 * 2**20
"""An index of the weights of a model of 100,000 tensors has 10 MB."""


class ModuleRef(Struct, frozen=True):
    """One line of `modules.json`: the class's last path component, and the subfolder of its files ('' is the root)."""

    kind: str
    path: str

    def file(self, name: str) -> str:
        """The name, inside the model folder, of a file of this module."""
        return f"{self.path}/{name}" if self.path else name


class Folder(Struct, frozen=True, kw_only=True):
    """A model folder's own word, before any weight is read.

    `modules` is None without a `modules.json`. `transformer` is the Transformer module's own config.
    `truncate_dim` is the width to which sentence-transformers cuts this model's vectors by default.
    """

    root: Path
    modules: tuple[ModuleRef, ...] | None
    transformer: Json
    prompts: dict[str, str]
    default_prompt: str | None
    matryoshka_widths: tuple[int, ...]
    truncate_dim: int | None = None

    @property
    def widths(self) -> tuple[int, ...]:
        """Widths that a vector may be cut to, as far as the folder says: its Matryoshka widths and its default one."""
        return (*self.matryoshka_widths, *(() if self.truncate_dim is None else (self.truncate_dim,)))

    @property
    def weights(self) -> Path:
        """Where the transformer's config, tokenizer and weights lie."""
        return self.root / (self.modules[0].path if self.modules else "")


def read_folder(root: Path) -> Folder:
    """Read what the folder says.

    Raises:
        BrokenFiles: a file that must be there is not, or is no JSON.
        UnsupportedModel: a module is not sentence-transformers' own, or asks for what we do not do.
    """
    modules = _read_modules(root)
    own = read_json(root, _OWN) or {}
    _check_kind(own)
    where = modules[0].path if modules else ""
    width = own.get("truncate_dim")
    return Folder(
        root=root,
        modules=modules,
        transformer=_read_transformer(root, where),
        prompts=_read_prompts(own),
        default_prompt=own.get("default_prompt_name"),
        matryoshka_widths=_read_widths(root, where, own),
        truncate_dim=width if isinstance(width, int) and width > 0 else None,
    )


def _read_prompts(own: Json) -> dict[str, str]:
    """Prompts by name. sentence-transformers writes an empty `query` and `document` for models that have neither; left
    in, they would hide prompts of the same family with other names (`search_query`, `passage`).

    Raises:
        BrokenFiles: they are no texts by name.
    """
    given = own.get("prompts") or {}
    if not isinstance(given, dict) or not all(isinstance(text, str | None) for text in given.values()):
        raise BrokenFiles(f"{_OWN} has `prompts` that are no texts by name; fetch the model again", file=_OWN)
    prompts = {name: text or "" for name, text in given.items()}
    return {name: text for name, text in prompts.items() if text or name not in PLACEHOLDER_PROMPTS}


def _check_kind(own: Json) -> None:
    """A SparseEncoder, CrossEncoder or MultiVectorEncoder saves alike, and its vectors are something else.

    Raises:
        UnsupportedModel
    """
    kind = own.get("model_type") or "SentenceTransformer"
    if kind != "SentenceTransformer":
        raise UnsupportedModel(
            f"{_OWN} says that this is a {kind}; only a SentenceTransformer gives the single dense vectors that "
            "are served here"
        )


def read_json(root: Path, name: str) -> Json | None:
    """A JSON object of the folder, or None where there is no such file.

    Raises:
        BrokenFiles: the file is no JSON object.
    """
    try:
        _check_size(root / name, name)
        content = json.loads((root / name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (ValueError, OSError, RecursionError) as error:
        raise BrokenFiles(
            f"{name} cannot be read: {error.__class__.__name__}; fetch the model again", file=name
        ) from error
    if not isinstance(content, dict):
        raise BrokenFiles(f"{name} holds no JSON object; fetch the model again", file=name)
    return content


def _check_size(path: Path, name: str) -> None:
    size_bytes = path.stat().st_size
    if size_bytes > _MAX_JSON_BYTES:
        raise BrokenFiles(
            f"{name} has {size_bytes} bytes, and a config may have {_MAX_JSON_BYTES}; fetch the model again", file=name
        )


def require_json(root: Path, name: str) -> Json:
    """A JSON object that must be there.

    Raises:
        BrokenFiles: it is missing, or no JSON object.
    """
    content = read_json(root, name)
    if content is None:
        raise BrokenFiles(f"{name} is missing from the model folder; fetch the model again", file=name)
    return content


def _read_modules(root: Path) -> tuple[ModuleRef, ...] | None:
    """In the order of the file, as sentence-transformers runs them; `idx` is for people."""
    name = "modules.json"
    try:
        _check_size(root / name, name)
        lines = json.loads((root / name).read_text(encoding="utf-8"))
        refs = tuple(_module_ref(line["type"], line["path"]) for line in lines)
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError) as error:
        raise BrokenFiles(
            f"{name} is no list of modules ({type(error).__name__}); fetch the model again", file=name
        ) from error
    if not refs:
        raise BrokenFiles(f"{name} lists no module; fetch the model again", file=name)
    return refs


def _module_ref(kind: str, path: str) -> ModuleRef:
    """Both vocabularies, `sentence_transformers.models.Pooling` and the longer one of ≥ 5.4, end in the class's name.

    A name outside the package is the repository's own code, even when it ends alike (`custom_st.Transformer`).
    """
    if not kind.startswith(_OFFICIAL):
        raise UnsupportedModel(
            f"modules.json names {kind!r}, which is the repository's own code and not a module of "
            "sentence-transformers; such models cannot be served exactly, so use one whose modules are all known"
        )
    if path.startswith(("/", "\\")) or ".." in Path(path).parts:
        raise UnsupportedModel(f"modules.json points to {path!r}, outside the model folder")
    return ModuleRef(kind.rsplit(".", 1)[-1], path)


def _read_transformer(root: Path, where: str) -> Json:
    for name in _TRANSFORMER_CONFIGS:
        config = read_json(root / where, name)
        if config:
            break
    else:
        return {}
    check_transformer(config, name)
    return config


def _read_widths(root: Path, where: str, own: Json) -> tuple[int, ...]:
    """Matryoshka widths, where a folder states them: `matryoshka_dims` or `matryoshka_dimensions` of its configs."""
    for config in (own, read_json(root / where, "config.json") or {}):
        for key in ("matryoshka_dims", "matryoshka_dimensions"):
            widths = config.get(key)
            if isinstance(widths, list) and all(isinstance(width, int) and width > 0 for width in widths):
                return tuple(widths)
    return ()
