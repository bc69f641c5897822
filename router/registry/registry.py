"""Reads `registry.yaml` into a frozen `Registry`: the models to serve, and their names.

All mistakes in the file are reported at once, with key path and line. Reading has four steps:
`router/config/yaml_document.py` (YAML with lines), `router/config/yaml_schema.py` (keys and types, against the Structs
of `router/registry/file.py`), `router/registry/rules.py` (rules between keys), `to_spec` (entries to `ModelSpec`).
"""

from collections.abc import Callable
from difflib import get_close_matches
from heapq import nlargest
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import msgspec
from msgspec import UNSET, Struct, UnsetType, structs

from engines.errors import InvalidValue, ModelNotFound
from engines.spec import Calibration, Eviction, Matryoshka, ModelSpec, is_same_engine
from engines.types import Budget
from router.config.quantities import parse_budget, parse_cache_bytes, parse_host_budget, parse_keep_alive_s
from router.config.yaml_document import FileError, Mistake, read_document, read_text
from router.config.yaml_schema import check_shape
from router.registry.file import (
    MAX_NAME_CHARS,
    Bounds,
    CalibrationRule,
    Defaults,
    MatryoshkaRule,
    ModelEntry,
    RegistryFile,
)
from router.registry.rules import check_rules

_POOLING_MODES = {"mean_sqrt_len": "mean_sqrt_len_tokens", "last_token": "lasttoken"}
"""Names in the registry for pooling modes that sentence-transformers calls differently."""


_DURATIONS = ("keep_alive", "host_keep_alive")


def to_spec(entry: ModelEntry, defaults: Defaults | UnsetType) -> ModelSpec:
    """Build the spec of an entry; missing values come from the defaults, else from `ModelSpec`."""
    given = (_given(defaults) if defaults else {}) | _given(entry)
    given.pop("aliases", None)
    given["model_id"] = given.pop("name")
    given |= {f"{name}_s": parse_keep_alive_s(given.pop(name)) for name in _DURATIONS if name in given}
    if "min_cosine" in given:
        given["min_cosine"] = float(given["min_cosine"])
    if isinstance(given.get("dtype"), list):
        given["dtype"], *smaller = given["dtype"]
        given["smaller_dtypes"] = tuple(smaller)
    if "cache" in given:
        given["cache_bytes"] = parse_cache_bytes(given.pop("cache"))
    if "pooling" in given:
        modes = [given["pooling"]] if isinstance(given["pooling"], str) else given["pooling"]
        given["pooling"] = tuple(_POOLING_MODES.get(mode, mode) for mode in modes)
    if "matryoshka" in given:
        given["matryoshka"] = _to_matryoshka(given["matryoshka"])
    if "calibration" in given:
        given["calibration"] = _to_calibration(given["calibration"])
    return ModelSpec(**given)


def _to_matryoshka(rule: list[int] | MatryoshkaRule) -> Matryoshka:
    if isinstance(rule, list):
        return Matryoshka(widths=tuple(rule))
    return Matryoshka(widths=tuple(rule.widths or ()), minimum=rule.min or None, layer_norm=rule.layer_norm or False)


def _to_calibration(rule: CalibrationRule) -> Calibration:
    return Calibration(lowest=_numbers(rule.lowest), highest=_numbers(rule.highest))


def _numbers(bounds: Bounds) -> tuple[float, ...]:
    return tuple(map(float, bounds)) if isinstance(bounds, list) else (float(bounds),)


def _given(struct: Struct) -> dict[str, Any]:
    return {name: value for name, value in structs.asdict(struct).items() if value is not UNSET}


class Changes(Struct, frozen=True, kw_only=True):
    """The differences between two registries: model ids by kind of change, in the order of their registry."""

    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    updated: tuple[str, ...] = ()
    """Changed in place: aliases, or fields of `engines.spec.IN_PLACE`."""
    replaced: tuple[str, ...] = ()
    """Need a new generation: the engine must be reloaded."""
    is_default_changed: bool = False
    is_budget_changed: bool = False

    @property
    def is_empty(self) -> bool:
        """Whether the registries are equivalent."""
        return self == Changes()


DEFAULT_BUDGET = Budget(fraction=0.8)

_MAX_LIKELY, _MAX_COMPARED = 64, 16
"""Of the names that share most character pairs with an unknown one: how many are considered, and how many difflib
compares. It takes 0.1 ms per name, so a client that sends unknown names to 1,000 models would block the server."""


class RegistryError(FileError):
    """The registry is invalid."""

    file = "the registry"


class Registry(Struct, frozen=True, kw_only=True):
    """The models to serve.

    Attributes:
        models: by `model_id`.
        aliases: alias to `model_id`.
        host_memory_budget: main memory for parked models; None if the file does not set it.
        backend: where the models run; None if the file does not set it.
        is_from_file: whether `REGISTRY` was read, rather than done without.
    """

    version: int = 1
    default_model: str | None = None
    memory_budget: Budget = DEFAULT_BUDGET
    host_memory_budget: Budget | None = None
    eviction: Eviction = "lru"
    backend: str | None = None
    models: dict[str, ModelSpec] = {}
    aliases: dict[str, str] = {}
    is_from_file: bool = False

    def resolve(self, name: str | None, may_suggest: Callable[[str], bool] = lambda _: True) -> ModelSpec:
        """Return the model of a name or alias; for None, the default model.

        Raises:
            ModelNotFound: no model has this name. The message suggests the nearest names of models for which
                `may_suggest` is true.
            InvalidValue: `name` is None, and there is no default model.
        """
        if name is None:
            if self.default_model is None:
                raise InvalidValue(
                    "model is required, because this server has no default model: GET /v1/models lists all models",
                    param="model",
                )
            return self.models[self.default_model]
        spec = self.models.get(name) or self.models.get(self.aliases.get(name, ""))
        if spec is None:
            raise ModelNotFound(
                f"Model {_shorten(name)!r} not found: {self._nearest(name, may_suggest)}GET /v1/models lists all models"
            )
        return spec

    def aliases_of(self, model_id: str) -> tuple[str, ...]:
        """Return the aliases of a model, in the order of the file."""
        return tuple(alias for alias, target in self.aliases.items() if target == model_id)

    def _nearest(self, name: str, may_suggest: Callable[[str], bool]) -> str:
        word = name[:MAX_NAME_CHARS].lower()
        pairs = set(pairwise(word))
        targets = {model_id: model_id for model_id in self.models} | self.aliases
        likely = nlargest(_MAX_LIKELY, targets, key=lambda known: len(pairs.intersection(pairwise(known.lower()))))
        folded = {known.lower(): known for known in likely if may_suggest(targets[known])}
        close = get_close_matches(word, islice(folded, _MAX_COMPARED), n=3)
        by_model = {targets[folded[known]]: folded[known] for known in reversed(close)}  # one name a model: the nearest
        return f"did you mean {' or '.join(reversed(by_model.values()))}? " if close else ""


def diff(old: Registry, new: Registry) -> Changes:
    """Return the changes from `old` to `new`."""
    kept = [model_id for model_id in new.models if model_id in old.models]
    replaced = {model_id for model_id in kept if not is_same_engine(old.models[model_id], new.models[model_id])}
    return Changes(
        added=tuple(model_id for model_id in new.models if model_id not in old.models),
        removed=tuple(model_id for model_id in old.models if model_id not in new.models),
        updated=tuple(model_id for model_id in kept if model_id not in replaced and _differs(model_id, old, new)),
        replaced=tuple(model_id for model_id in kept if model_id in replaced),
        is_default_changed=old.default_model != new.default_model,
        is_budget_changed=old.memory_budget != new.memory_budget,
    )


def _differs(model_id: str, old: Registry, new: Registry) -> bool:
    is_same_spec = old.models[model_id] == new.models[model_id]
    return not is_same_spec or set(old.aliases_of(model_id)) != set(new.aliases_of(model_id))


def read_registry(path: Path) -> Registry:
    """Read the registry in a file.

    Raises:
        RegistryError: with every mistake.
    """
    try:
        text = read_text(path, "set REGISTRY to its path, or create one with `embedyard init`")
    except ValueError as error:
        raise RegistryError((Mistake((), str(error)),)) from None
    return parse_registry(text)


def parse_registry(text: str) -> Registry:
    """Parse the registry in a YAML text.

    Raises:
        RegistryError: with every mistake.
    """
    document = read_document(text)
    if not document.mistakes or document.value is not None:
        check_shape(document, RegistryFile)
        check_rules(document)
    if document.mistakes:
        raise RegistryError(document.mistakes)
    return _to_registry(msgspec.convert(document.value, RegistryFile))


def _to_registry(file: RegistryFile) -> Registry:
    models = {entry.name: to_spec(entry, file.defaults) for entry in file.models}
    aliases = {alias: entry.name for entry in file.models for alias in entry.aliases or ()}
    default = file.default_model or None
    return Registry(
        version=file.version,
        default_model=aliases.get(default, default) if default else None,
        memory_budget=parse_budget(file.memory.budget) if file.memory else DEFAULT_BUDGET,
        host_memory_budget=_host_budget(file),
        eviction=(file.memory.eviction if file.memory else UNSET) or "lru",
        backend=file.backend or None,
        models=models,
        aliases=aliases,
    )


def _host_budget(file: RegistryFile) -> Budget | None:
    given = file.memory.host_budget if file.memory else UNSET
    return None if given is UNSET else parse_host_budget(given)


def _shorten(name: str) -> str:
    return name if len(name) <= 80 else f"{name[:77]}..."
