"""Reads a model folder's JSON files. Loads no weights and runs no code of the folder.

The files are those of sentence-transformers: `modules.json`, `sentence_bert_config.json`,
`config_sentence_transformers.json`, and each module's `config.json`.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from msgspec import Struct, structs

from engines.errors import BrokenFiles, UnsupportedModel
from engines.hub.file_selection import COLBERT_LINEAR, SPARSE_LINEAR
from engines.loading.late_interaction import (
    ARTIFACT,
    LENGTH_KEYS,
    MULTI_VECTOR_KINDS,
    LateInteraction,
    legacy_prompts,
    read_late_interaction,
)
from engines.loading.module_settings import Json, check_transformer
from engines.spec import Output
from engines.types import ModelFiles

_ST_PREFIX = "sentence_transformers."

_PYLATE_DENSE = "pylate.models.Dense.Dense"
"""PyLate's own name of sentence-transformers' module."""

PLACEHOLDER_PROMPTS = ("query", "document")
"""Prompt names that every model has; empty unless the folder defines them."""

_ST_CONFIG = "config_sentence_transformers.json"

CROSS_ENCODER = "CrossEncoder"
"""sentence-transformers' kind of model that scores pairs."""

SPARSE_ENCODER = "SparseEncoder"
"""sentence-transformers' kind of model that gives weights of vocabulary entries."""

_TRANSFORMER_CONFIGS = tuple(
    f"sentence_{family}_config.json"
    for family in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)

_MAX_JSON_BYTES = 32 * 2**20
"""Limit of a JSON file: the weight index of a model with 100,000 tensors has 10 MB."""


class ModuleRef(Struct, frozen=True):
    """One entry of `modules.json`: the last component of its class name, and its subfolder ('' is the root)."""

    kind: str
    path: str

    def file(self, name: str) -> str:
        """Returns the name of one of the module's files, relative to the model folder."""
        return f"{self.path}/{name}" if self.path else name


class Folder(Struct, frozen=True, kw_only=True):
    """The configuration of a model folder, without weights.

    `modules` is None without a `modules.json`. `transformer` is the Transformer module's own config.
    `truncate_dim` is the width to which sentence-transformers truncates this model's vectors by default.
    `base` is the folder of the transformer's config and weights, where these are not among the modules; `adapter` that
    of a PEFT adapter to merge into them.
    `is_cross_encoder`: whether its CrossEncoder saved the folder, whose `activation_fn` is `activation`.
    `late`: of a folder whose model gives a vector for each token instead of one for a text; else None.
    `is_sparse_encoder`: whether its SparseEncoder did, which keeps at most `max_active_dims` entries of a text.
    """

    root: Path
    modules: tuple[ModuleRef, ...] | None
    transformer: Json
    prompts: dict[str, str]
    default_prompt: str | None
    matryoshka_widths: tuple[int, ...]
    truncate_dim: int | None = None
    base: Path | None = None
    adapter: Path | None = None
    is_cross_encoder: bool = False
    activation: str | None = None
    late: LateInteraction | None = None
    is_sparse_encoder: bool = False
    max_active_dims: int | None = None

    @property
    def widths(self) -> tuple[int, ...]:
        """The widths that vectors may be truncated to, as stated: the Matryoshka widths and the default one."""
        return (*self.matryoshka_widths, *(() if self.truncate_dim is None else (self.truncate_dim,)))

    @property
    def weights(self) -> Path:
        """The folder of the transformer's config and weights."""
        return self.base or self._first

    @property
    def tokenizer(self) -> Path:
        """The folder of the tokenizer: the adapter's, if it has one, else the transformer's."""
        has_own = self.adapter is not None and (self.adapter / "tokenizer_config.json").exists()
        return self.adapter if self.adapter is not None and has_own else self.weights

    @property
    def _first(self) -> Path:
        return self.root / (self.modules[0].path if self.modules else "")


def outputs_of(folder: Folder) -> tuple[Output, ...]:
    """Returns what a folder of a model that embeds gives, as its files state it."""
    if folder.is_sparse_encoder:
        return ("sparse",)
    if folder.late is not None:
        return ("multi_vector",)
    files: dict[Output, str] = {"sparse": SPARSE_LINEAR, "multi_vector": COLBERT_LINEAR}
    return ("dense", *(output for output, file in files.items() if (folder.weights / file).exists()))


def read_files(files: ModelFiles) -> Folder:
    """Reads the configuration of a model's files; see `read_folder`."""
    return read_folder(Path(files.path), files.adapter_folder)


def read_folder(root: Path, adapter: Path | None = None) -> Folder:
    """Reads the configuration of a folder, and of an adapter of its model.

    An adapter that sentence-transformers saved has modules and prompts, which replace the model's own, as they do in
    sentence-transformers; any other adapter has weights only, and perhaps a tokenizer.

    Raises:
        BrokenFiles: a required file is missing, or a file is not valid JSON.
        UnsupportedModel: a module does not belong to sentence-transformers, or needs an unsupported feature.
    """
    folder = _read_folder(root)
    if adapter is None:
        return folder
    if not (adapter / "modules.json").exists():
        return structs.replace(folder, adapter=adapter)
    own = _read_folder(adapter)
    return structs.replace(own, base=folder.weights, adapter=own.weights)


def _read_folder(root: Path) -> Folder:
    """Reads a folder's configuration.

    Raises:
        BrokenFiles: a required file is missing, or a file is not valid JSON.
        UnsupportedModel: a module does not belong to sentence-transformers, or needs an unsupported feature.
    """
    modules = _read_modules(root)
    st_config = read_json(root, _ST_CONFIG) or {}
    kind = _check_kind(st_config)
    is_cross_encoder = kind == CROSS_ENCODER
    activation = st_config.get("activation_fn") if is_cross_encoder else None
    where = modules[0].path if modules else ""
    width = st_config.get("truncate_dim")
    late, prompts = _read_late(root, modules, st_config)
    is_checked = kind not in (CROSS_ENCODER, SPARSE_ENCODER)
    return Folder(
        root=root,
        modules=modules,
        transformer=read_transformer(root, where, is_checked=is_checked, has_lengths=late is not None),
        prompts={**_read_prompts(st_config), **prompts},
        default_prompt=st_config.get("default_prompt_name"),
        matryoshka_widths=_read_widths(root, where, st_config),
        truncate_dim=width if isinstance(width, int) and width > 0 else None,
        is_cross_encoder=is_cross_encoder,
        activation=activation if isinstance(activation, str) else None,
        late=late,
        is_sparse_encoder=kind == SPARSE_ENCODER,
        max_active_dims=_read_max_active(st_config, is_sparse=kind == SPARSE_ENCODER),
    )


def _read_max_active(st_config: Json, *, is_sparse: bool) -> int | None:
    """Returns how many entries of a text are kept at most; None where the folder states none.

    Raises:
        BrokenFiles: it is no positive integer in the folder of a SparseEncoder; sentence-transformers refuses it, too.
    """
    most = st_config.get("max_active_dims")
    if type(most) is int and most > 0:
        return most
    if most is None or not is_sparse:
        return None
    raise BrokenFiles(
        f"{_ST_CONFIG} has max_active_dims {most!r}, not a positive integer; fetch the model again", file=_ST_CONFIG
    )


def _read_late(
    root: Path, modules: tuple[ModuleRef, ...] | None, st_config: Json
) -> tuple[LateInteraction | None, Mapping[str, str]]:
    """Returns what the folder says of late interaction, and the prompts of such a folder that stand elsewhere."""
    where = modules[0].path if modules else ""
    stated = (read_json(root / where, "config.json") or {}).get("architectures")
    architectures = stated if isinstance(stated, list) else []
    artifact = (read_json(root, ARTIFACT) or {}) if modules is None else {}
    transformer = read_transformer(root, where, is_checked=False)
    kinds = None if modules is None else [ref.kind for ref in modules]
    late = read_late_interaction(st_config, transformer, kinds, architectures, artifact)
    prompts = {} if late is None else legacy_prompts(st_config, architectures if modules is None else (), artifact)
    return late, {side: text for side, text in prompts.items() if text}


def _read_prompts(st_config: Json) -> dict[str, str]:
    """Returns the prompts by name, without empty placeholders.

    sentence-transformers writes an empty `query` and `document` for models that have neither; left in, they would hide
    prompts of the same family with other names (`search_query`, `passage`).

    Raises:
        BrokenFiles: the prompts are not a map of names to texts.
    """
    given = st_config.get("prompts") or {}
    if not isinstance(given, dict) or not all(isinstance(text, str | None) for text in given.values()):
        raise BrokenFiles(
            f"`prompts` in {_ST_CONFIG} is not a map of names to texts; fetch the model again", file=_ST_CONFIG
        )
    prompts = {name: text or "" for name, text in given.items()}
    return {name: text for name, text in prompts.items() if text or name not in PLACEHOLDER_PROMPTS}


def _check_kind(st_config: Json) -> str:
    """Returns the kind of model.

    Raises:
        UnsupportedModel
    """
    kind = st_config.get("model_type") or "SentenceTransformer"
    if kind not in ("SentenceTransformer", CROSS_ENCODER, SPARSE_ENCODER, *MULTI_VECTOR_KINDS):
        raise UnsupportedModel(
            f"{_ST_CONFIG} declares a {kind}; only a SentenceTransformer, which gives one dense vector a text, a "
            f"{SPARSE_ENCODER}, which gives weights of vocabulary entries, a MultiVectorEncoder, which gives a vector "
            f"for each token, and a {CROSS_ENCODER}, which scores pairs, are supported"
        )
    return str(kind)


def read_json(root: Path, name: str) -> Json | None:
    """Reads a JSON object of the folder; returns None if the file does not exist.

    Raises:
        BrokenFiles: the file is not a JSON object.
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
        raise BrokenFiles(f"{name} is not a JSON object; fetch the model again", file=name)
    return content


def _check_size(path: Path, name: str) -> None:
    size_bytes = path.stat().st_size
    if size_bytes > _MAX_JSON_BYTES:
        raise BrokenFiles(
            f"{name} has {size_bytes} bytes, but the limit is {_MAX_JSON_BYTES}; fetch the model again", file=name
        )


def require_json(root: Path, name: str) -> Json:
    """Reads a required JSON object of the folder.

    Raises:
        BrokenFiles: the file is missing or not a JSON object.
    """
    content = read_json(root, name)
    if content is None:
        raise BrokenFiles(f"{name} is missing from the model folder; fetch the model again", file=name)
    return content


def _read_modules(root: Path) -> tuple[ModuleRef, ...] | None:
    """Reads `modules.json` in file order, as sentence-transformers runs the modules; it ignores `idx` too."""
    name = "modules.json"
    try:
        _check_size(root / name, name)
        lines = json.loads((root / name).read_text(encoding="utf-8"))
        refs = tuple(module_ref(line["type"], line["path"]) for line in lines)
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError) as error:
        raise BrokenFiles(
            f"{name} is not a list of modules ({type(error).__name__}); fetch the model again", file=name
        ) from error
    if not refs:
        raise BrokenFiles(f"{name} lists no module; fetch the model again", file=name)
    return refs


def module_ref(kind: str, path: str) -> ModuleRef:
    """Parses a module's class name: both `sentence_transformers.models.Pooling` and the longer names of ≥ 5.4.

    A name outside the package is the repository's own code, even with the same class name (`custom_st.Transformer`).
    """
    if not kind.startswith(_ST_PREFIX) and kind != _PYLATE_DENSE:
        raise UnsupportedModel(
            f"modules.json names {kind!r}, which is the repository's own code and not a module of "
            "sentence-transformers; use a model without custom modules"
        )
    if path.startswith(("/", "\\")) or ".." in Path(path).parts:
        raise UnsupportedModel(f"modules.json points to {path!r}, outside the model folder")
    return ModuleRef(kind.rsplit(".", 1)[-1], path)


def read_transformer(root: Path, where: str, *, is_checked: bool, has_lengths: bool = False) -> Json:
    """Reads the Transformer module's own config in the folder `where`; empty without one."""
    for name in _TRANSFORMER_CONFIGS:
        config = read_json(root / where, name)
        if config:
            break
    else:
        return {}
    if is_checked:
        check_transformer({k: v for k, v in config.items() if not (has_lengths and k in LENGTH_KEYS)}, name)
    return config


def _read_widths(root: Path, where: str, st_config: Json) -> tuple[int, ...]:
    """Reads the Matryoshka widths from `matryoshka_dims` or `matryoshka_dimensions` of the folder's configs."""
    for config in (st_config, read_json(root / where, "config.json") or {}):
        for key in ("matryoshka_dims", "matryoshka_dimensions"):
            widths = config.get(key)
            if isinstance(widths, list) and all(isinstance(width, int) and width > 0 for width in widths):
                return tuple(widths)
    return ()
