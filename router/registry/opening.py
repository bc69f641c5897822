"""Opens the registry that a process serves: the file, with `MODELS` or `MODEL_PATH`, or the embedded model without one.

Commands, the server and its reloader open it here, so that all of them see the same models. Imports no model code.
"""

from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

from msgspec import structs

from engines.spec import ModelSpec, parts_of
from router.config.settings import DEFAULT_REGISTRY, Settings
from router.config.yaml_document import Mistake
from router.config.yaml_schema import nearest
from router.registry.catalogue import known_model
from router.registry.file import is_hub_id
from router.registry.file import read_name as check_name
from router.registry.file import read_source as check_source
from router.registry.registry import Registry, RegistryError, read_registry
from router.registry.starter import DEMO_PACKAGE, INSTALL_DEMO, starter_registry

NAMES = "embedyard models lists those of the registry, and a hub id such as BAAI/bge-m3 need not be among them"
"""The models that a command may name, for its messages."""

_NAMES_AND_IDS = "a hub id is ORG/NAME. embedyard models lists the registry, embedyard add ORG/NAME adds to it"
_PACKAGE = "package:"
_FOLDER_STARTS = ("/", "./", "../", "~")


class ModelChoiceError(RegistryError):
    """A model that `MODELS`, `MODEL_PATH` or the command line names does not exist."""

    file = "the models to serve"


def open_registry(settings: Settings, *, needs_file: bool = False) -> Registry:
    """Read the registry that the settings name, and choose the models that they name.

    The file is optional where `MODEL_PATH` is set, and where `REGISTRY` is not: without it the embedded model is known,
    and served unless other models are named. `needs_file`: the file was read before, so that its absence is a mistake
    rather than a registry without its models.

    Raises:
        RegistryError: with every mistake.
    """
    if needs_file or settings.registry.exists() or not _is_optional(settings):
        registry = structs.replace(read_registry(settings.registry), is_from_file=True)
    elif settings.model_path and not settings.models:
        registry = Registry()
    else:
        registry = starter_registry()
    if settings.models:
        return choose_models(registry, settings.models)
    return with_model_path(registry, settings)


def _is_optional(settings: Settings) -> bool:
    return bool(settings.model_path) or settings.registry == DEFAULT_REGISTRY


def is_embedded_only(registry: Registry) -> bool:
    """Whether the embedded model is served for lack of a file and of named models."""
    return registry is starter_registry()


def choose_models(registry: Registry, names: Sequence[str]) -> Registry:
    """Return a registry of the named models only; the first is the default, and loaded at start.

    A name is a name, alias or source of the registry, else a folder or a hub id as in `MODEL_PATH`. A hub id whose base
    name is taken is registered under the whole id.

    Raises:
        RegistryError: a name is none of these, or two folders have the same name.
    """
    chosen: dict[str, ModelSpec] = {}
    for name in names:
        registry = _with_named(registry, name)
        spec = registry.resolve(None)
        if chosen.setdefault(spec.model_id, spec) != spec:
            _refuse(
                f"{name}: another model is named {spec.model_id!r}: add it under a name of its own "
                f"(embedyard add {name} --name NAME)"
            )
    first = next(iter(chosen.values()))
    models = chosen | {first.model_id: structs.replace(first, preload=True)}
    aliases = {alias: target for alias, target in registry.aliases.items() if target in models}
    return structs.replace(registry, models=models, aliases=aliases, default_model=first.model_id)


def _with_named(registry: Registry, name: str) -> Registry:
    """Return the registry with the named model as its default."""
    known = _known_names(registry)
    if name in known:
        return structs.replace(registry, default_model=known[name])
    if "/" not in name and not name.startswith(_PACKAGE) and existing_folder(name) is None:
        _refuse(f"{name}: no model of the registry, and no folder{nearest(name, known)}; {_NAMES_AND_IDS}")
    return _with_model(registry, name, label=name, may_use_whole_id=True)


def _known_names(registry: Registry) -> dict[str, str]:
    """Return the model ids by id, alias and source."""
    by_source = {spec.adapter or spec.source: model_id for model_id, spec in registry.models.items()}
    return by_source | registry.aliases | {model_id: model_id for model_id in registry.models}


def with_model_path(registry: Registry, settings: Settings) -> Registry:
    """Return the registry with `MODEL_PATH` as its default model; unchanged where it is not set.

    Raises:
        RegistryError: no such model, or another model has its name.
    """
    given = settings.model_path
    return registry if given is None else _with_model(registry, given, label=f"MODEL_PATH={given}")


def _with_model(registry: Registry, given: str, *, label: str, may_use_whole_id: bool = False) -> Registry:
    """Return the registry with the given model as its default. There are three cases:

    1. an existing folder: registered under its base name. A model of that name keeps its prompts and limits, because
       the folder is most likely a copy of it; its revision and `trust_remote_code` are reset.
    2. a name, alias or source in the registry: that model.
    3. another hub id or package: registered under its base name, with the full id as alias, and with what the shipped
       registry says of it.
    """
    folder = existing_folder(given)
    if folder is not None:  # (1)
        known = registry.models.get(folder.name)
        spec = ModelSpec(model_id=folder.name, source=str(folder))
        if known is not None:
            spec = structs.replace(
                known, source=str(folder), revision=None, adapter=None, adapter_revision=None, trust_remote_code=False
            )
        return _with_default(registry, spec, label)
    names = _known_names(registry)
    if given in names:  # (2)
        return structs.replace(registry, default_model=names[given])
    if not is_hub_id(given) and not given.startswith(_PACKAGE):
        _refuse(f"{label}: folder not found")
    base = given.rpartition("/")[2]  # (3)
    if base in names and not (may_use_whole_id and is_hub_id(given)):
        _refuse(f"{label}: the name {base!r} is used by another model: add this one to the registry")
    spec = structs.replace(known_model(given) or ModelSpec(model_id=base, source=given), model_id=base)
    if base in names:
        spec = structs.replace(spec, model_id=given)
    return _with_default(registry, spec, label, alias=given)


def existing_folder(given: str) -> Path | None:
    """Return the absolute path of an existing folder; None if `given` names none."""
    try:
        folder = Path(given).expanduser().absolute()
        return folder if folder.is_dir() else None
    except (OSError, RuntimeError):  # the name is too long for the file system, or ~user is unknown
        return None


def _with_default(registry: Registry, spec: ModelSpec, label: str, alias: str = "") -> Registry:
    """Return the registry with a model as its default; `alias`: another name for it, if it is a hub id."""
    try:
        check_name(spec.model_id)
        check_source(spec.source)
    except ValueError as error:
        _refuse(f"{label}: needs {error}")
    models = registry.models | {spec.model_id: spec}
    aliases = {alias: target for alias, target in registry.aliases.items() if alias != spec.model_id}
    for name in (alias, spec.source):
        if "/" in name and is_hub_id(name) and name != spec.model_id:
            aliases[name] = spec.model_id
    return structs.replace(registry, models=models, aliases=aliases, default_model=spec.model_id)


def is_demo_installed() -> bool:
    """Whether the Python package with the embedded model is installed."""
    return find_spec(DEMO_PACKAGE) is not None


def missing_sources(specs: Iterable[ModelSpec]) -> dict[str, str]:
    """Return the models that cannot be loaded on this machine, by id, each with the reason.

    These are folders and packages only: what is missing of a hub is downloaded. Reads no file and imports no package.
    """
    reasons = {
        spec.model_id: next(filter(None, (_missing_reason(part.source) for part in parts_of(spec))), "")
        for spec in specs
    }
    return {model_id: reason for model_id, reason in reasons.items() if reason}


def _missing_reason(source: str) -> str:
    """Return why a local source cannot be loaded; an empty text if it can, or if it is not local."""
    if source.startswith(_PACKAGE):
        name = source.removeprefix(_PACKAGE).partition("/")[0]
        if find_spec(name.partition(".")[0]) is not None:
            return ""
        remedy = f": {INSTALL_DEMO}" if name == DEMO_PACKAGE else ""
        return f"the Python package {name} is not installed{remedy}"
    if not source.startswith(_FOLDER_STARTS) and source not in (".", ".."):
        return ""
    folder = existing_folder(source)
    if folder is None:
        return f"the folder {source} does not exist"
    if not any((folder / name).is_file() for name in ("modules.json", "config.json", "adapter_config.json")):
        return f"the folder {source} holds no model (neither modules.json nor config.json)"
    return ""


def _refuse(message: str) -> NoReturn:
    raise ModelChoiceError((Mistake((), message),)) from None
