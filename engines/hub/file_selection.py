"""Selects the files of a repository or folder that make up the model. Pure: uses neither disk nor network.

Selects one format of weights: safetensors if there are any, else pytorch_model*.bin; never ONNX, OpenVINO, TensorFlow
or Flax. Selects Python files only if the registry trusts the model's code.
"""

from collections.abc import Callable, Collection
from fnmatch import fnmatchcase
from pathlib import PurePosixPath
from typing import Any

import msgspec
from msgspec import Struct

from engines.errors import BrokenFiles, UnsupportedModel

ReadFile = Callable[[str], bytes]
"""Maps a file name to the whole content; called only for small JSON files that exist."""

MODULES = "modules.json"
CONFIG = "config.json"
README = "README.md"
ARTIFACT = "artifact.metadata"
ADAPTER_CONFIG = "adapter_config.json"
"""Marks a PEFT adapter, which has no config.json."""

_METADATA = (
    "*config*.json", MODULES, "tokenizer*.json", "vocab*", "merges.txt", "*.model", "*.tiktoken", "bpe.codes",
    "special_tokens_map.json", "added_tokens.json", "chat_template*", ARTIFACT,
)  # fmt: skip
"""Files beside the weights; the last one is of Stanford's ColBERT."""

WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
"""In transformers' order of preference."""
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
"""In PEFT's order of preference."""

TRANSFORMERS = ("Transformer", "MLMTransformer")
AUTO_ENCODER = "SparseAutoEncoder"
_WITH_CONFIG = (*TRANSFORMERS, "Pooling", "Dense", "LayerNorm", "SpladePooling", AUTO_ENCODER)
_WITH_WEIGHTS = (*TRANSFORMERS, "Dense", "LayerNorm", "SparseStaticEmbedding", AUTO_ENCODER)
"""sentence-transformers modules that require a config, or weights."""

ROUTER_CONFIGS = ("router_config.json", CONFIG)
"""Where a Router lists the modules of its routes, in sentence-transformers' order."""

SPARSE_LINEAR, COLBERT_LINEAR = HEAD_FILES = ("sparse_linear.pt", "colbert_linear.pt")
"""Heads beside the transformer of FlagEmbedding's bge-m3, without which it gives dense vectors only."""


class Selection(Struct, frozen=True, kw_only=True):
    """The names of the selected files; `weights` are those that hold tensors."""

    files: tuple[str, ...]
    weights: tuple[str, ...]


class Module(Struct, frozen=True):
    """One entry of modules.json: the folder ("" is the root) and the last component of the module's type."""

    path: str
    kind: str


def select(names: Collection[str], read: ReadFile, *, source: str, with_code: bool) -> Selection:
    """Selects from `names` the files that are needed to run the model.

    Raises:
        BrokenFiles: a file that modules.json or a weight index names is missing.
        UnsupportedModel: there are no weights in a supported format.
    """
    modules = read_modules(names, read)
    metadata = _metadata(names, {"", *(module.path for module in modules)}, with_code=with_code)
    weights: list[str] = []
    indexes: list[str] = []
    for module in modules:
        entry = _weights_entry(names, module, source)
        if entry is not None and entry.endswith(".index.json"):
            indexes.append(entry)
            weights += _shards(names, read, entry)
        elif entry is not None:
            weights.append(entry)
    weights += [name for module in modules for name in _head_files(names, module)]
    files = sorted({*metadata, *indexes, *weights})
    return Selection(files=tuple(files), weights=tuple(sorted(set(weights))))


def read_modules(names: Collection[str], read: ReadFile) -> tuple[Module, ...]:
    """Returns the modules of modules.json, those of a Router's routes in its place; a plain transformers folder has one
    module at its root."""
    if MODULES not in names:
        return (Module("", "Transformer"),)
    entries = _read_json(MODULES, read)
    if not isinstance(entries, list) or not entries:
        raise BrokenFiles(f"{MODULES} is not a list of modules", file=MODULES)
    try:
        modules = [_module(entry["path"], entry["type"]) for entry in entries]
    except (TypeError, KeyError):
        raise BrokenFiles(f"{MODULES} has a module without path or type", file=MODULES) from None
    return tuple(each for module in modules for each in _routed_modules(names, module, read))


def _module(path: object, kind: object) -> Module:
    return Module(_normalize_folder(path), str(kind).rsplit(".", 1)[-1])


def _routed_modules(names: Collection[str], module: Module, read: ReadFile) -> list[Module]:
    """Returns a module, or those of a Router's routes."""
    if module.kind != "Router":
        return [module]
    places = [_join_path(module.path, name) for name in ROUTER_CONFIGS]
    name = next((place for place in places if place in names), None)
    if name is None:
        raise _missing_error(places[0], "a Router module")
    content = _read_json(name, read)
    types = content.get("types") if isinstance(content, dict) else None
    if not isinstance(types, dict) or not types:
        raise BrokenFiles(f"{name} lists no modules", file=name)
    return [_module(_join_path(module.path, path) if path else module.path, kind) for path, kind in types.items()]


def _head_files(names: Collection[str], module: Module) -> list[str]:
    return [
        name for file in HEAD_FILES if (name := _join_path(module.path, file)) in names and module.kind == "Transformer"
    ]


def description_files(names: Collection[str], read: ReadFile) -> tuple[str, ...]:
    """Returns the files that describe a model without its weights and tokenizer: its configurations and its README."""
    folders = {"", *(module.path for module in read_modules(names, read))}

    def is_wanted(name: str) -> bool:
        folder, _, base = name.rpartition("/")
        return name == README or (
            folder in folders and (base in (MODULES, ARTIFACT) or fnmatchcase(base, "*config*.json"))
        )

    return tuple(name for name in names if is_wanted(name))


def is_safe(name: str) -> bool:
    """Returns whether a name from a hub's listing stays inside the folder that it is joined to."""
    path = PurePosixPath(name)
    return bool(name) and not path.is_absolute() and ".." not in path.parts and "\\" not in name


def _metadata(names: Collection[str], folders: Collection[str], *, with_code: bool) -> list[str]:
    patterns = (*_METADATA, "*.py") if with_code else _METADATA

    def is_wanted(name: str) -> bool:
        folder, _, base = name.rpartition("/")
        return folder in folders and any(fnmatchcase(base, pattern) for pattern in patterns)

    return [name for name in names if is_wanted(name)]


def _weights_entry(names: Collection[str], module: Module, source: str) -> str | None:
    """Returns the file that holds or indexes a module's weights; None for a module without weights."""
    is_adapter = module.kind == "Transformer" and _join_path(module.path, ADAPTER_CONFIG) in names
    entry = _first(names, module.path, ADAPTER_WEIGHTS) if is_adapter else None
    if entry is not None:
        return entry
    entry = _first(names, module.path, WEIGHTS)
    if entry is None and module.kind in TRANSFORMERS:
        raise UnsupportedModel(
            f"'source' {source} has no supported weights: neither model.safetensors nor pytorch_model.bin"
        )
    if entry is None and module.kind in _WITH_WEIGHTS:
        raise _missing_error(_join_path(module.path, WEIGHTS[0]), MODULES)
    if module.kind in _WITH_CONFIG and _join_path(module.path, CONFIG) not in names:
        raise _missing_error(_join_path(module.path, CONFIG), f"a {module.kind} module")
    return entry


def _first(names: Collection[str], folder: str, wanted: Collection[str]) -> str | None:
    return next((name for name in (_join_path(folder, file) for file in wanted) if name in names), None)


def _shards(names: Collection[str], read: ReadFile, index: str) -> list[str]:
    content = _read_json(index, read)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise BrokenFiles(f"{index} has no weight_map", file=index)
    folder = index.rpartition("/")[0]
    shards = sorted({_join_path(folder, str(shard)) for shard in weight_map.values()})
    for shard in shards:
        if shard not in names:
            raise _missing_error(shard, index)
    return shards


def _missing_error(name: str, required_by: str) -> BrokenFiles:
    return BrokenFiles(f"{name} is missing: {required_by} requires it", file=name)


def _read_json(name: str, read: ReadFile) -> Any:
    try:
        return msgspec.json.decode(read(name))
    except msgspec.DecodeError as error:
        raise BrokenFiles(f"{name} is not valid JSON: {error}", file=name) from None


def _normalize_folder(path: object) -> str:
    """Normalizes a module's folder for joining: no dot, no leading or trailing slash."""
    posix = PurePosixPath(str(path)).as_posix().strip("/")
    return "" if posix == "." else posix


def _join_path(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name
