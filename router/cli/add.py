"""`embedyard add`: writes an entry for a model into the registry, with what the model's own files say."""

from pathlib import Path
from typing import TYPE_CHECKING

import click
from msgspec import structs

from engines.errors import BadModel, HubUnreachable, OfflineMode, UnsupportedModel
from engines.spec import Matryoshka, ModelSpec
from router.config.settings import SettingsError, load_settings
from router.config.yaml_editing import EditError
from router.registry.catalogue import known_model, with_known
from router.registry.editor import add_entry, check_is_new, create_file
from router.registry.file import SOURCE_ALLOWED, is_hub_id, read_name, read_source
from router.registry.new_entry import NewEntry, entry_lines
from router.registry.opening import existing_folder, is_demo_installed
from router.registry.registry import Registry, RegistryError, read_registry
from router.registry.starter import starter_text

if TYPE_CHECKING:
    from engines.description import Description

EXIT_FAILED = 1
EXIT_INVALID = 2
"""Exit codes: the model cannot be read or served; invalid command, registry or settings, or a name that is taken."""

_KINDS = {"rerank": "reranker", "classify": "classifier"}
_GIGA, _MEGA = 10**9, 10**6
_MIN_BILLIONS = 10**8
"""From here on, parameters are shown in billions."""


@click.command(
    epilog="""
\b
Examples:
  embedyard add BAAI/bge-m3
  embedyard add ./my-model --name support-v2
  embedyard add ./my-lora            a PEFT adapter: merged into its base model at load
  embedyard add intfloat/e5-small-v2 --revision ffb93f3bd4047442299a41ebb6fa998a38507c52
"""
)
@click.argument("model", metavar="MODEL", type=click.Path(path_type=str))
@click.option("--name", help="Name that clients send. Default: the last part of the id or path.")
@click.option("--revision", help="Branch, tag or commit of the hub repository.")
@click.option("--registry", type=click.Path(path_type=Path, dir_okay=False), help="Registry file, instead of REGISTRY.")
def command(model: str, name: str | None, revision: str | None, registry: Path | None) -> None:
    """Add MODEL, a hub id or a folder, to the registry, with the prompts, widths and licence that its files state.

    Of a hub only the configurations are read (kilobytes). A model of the registry that Embedyard is shipped with gets
    the vendor's prompts, instruction template and widths from there, unless --revision is given. Comments of the
    registry are kept; without a file, one is written. Exit code 0: added; 1: the model cannot be read or served; 2:
    invalid command, registry or settings, or a name that is taken.
    """
    try:
        settings = load_settings(flags={"REGISTRY": str(registry)} if registry else {})
        path = settings.registry
        entry = _bare_entry(model, name, revision, path)
        check_is_new(read_registry(path) if path.exists() else Registry(), entry)
        known = None if revision or existing_folder(model) else known_model(model)
        entry = _described(entry) if known is None else _known(entry, known, path)
        _write(path, entry)
    except BadModel as error:
        _fail(f"{model} was not added: {error}", EXIT_FAILED)
    except (SettingsError, RegistryError, EditError, ValueError) as error:
        _fail(str(error), EXIT_INVALID)
    except OSError as error:
        _fail(f"the registry cannot be written: {error.strerror}", EXIT_INVALID)
    click.echo(f"Added to {path}{', with what Embedyard knows of this model' if known else ''}:\n")
    click.echo("\n".join(f"  {line}" for line in entry_lines(entry)))
    option = f" --registry {registry}" if registry else ""
    click.echo(f"\nNext: embedyard serve{option}; a server that runs reads the file by itself")


def _bare_entry(model: str, name: str | None, revision: str | None, registry: Path) -> NewEntry:
    """Return the entry with its name and source only.

    Raises:
        ValueError: neither a folder nor a hub id, or a name that is none.
    """
    folder = existing_folder(model)
    if folder is None and not (is_hub_id(model) and "/" in model):
        raise ValueError(f"{model}: folder not found; MODEL is {SOURCE_ALLOWED.partition(' or package')[0]}")
    if folder is not None and revision:
        raise ValueError("--revision is for models of a hub: a folder has none")
    source = model if folder is None else _folder_source(model, folder, registry)
    base = folder.name if folder else model.rpartition("/")[2]
    try:
        read_name(name or base)
        read_source(source)
    except ValueError as error:
        raise ValueError(f"{name or base}: needs {error}" + ("" if name else "; choose one with --name")) from None
    aliases = (model,) if folder is None and model != (name or base) else ()
    return NewEntry(name=name or base, source=source, aliases=aliases, revision=revision)


def _folder_source(given: str, folder: Path, registry: Path) -> str:
    """Return the folder as the registry should name it: `./` is where the server is started."""
    if given.startswith(("/", "~")):
        return given.rstrip("/") or given
    is_beside = registry.absolute().parent == Path.cwd() and folder.is_relative_to(Path.cwd())
    return f"./{folder.relative_to(Path.cwd())}" if is_beside else str(folder)


def _describe(entry: NewEntry) -> "Description":
    """Read what the model's files state.

    Raises:
        BadModel: they cannot be read, or the model cannot be served.
    """
    from engines.description import describe  # late: imports huggingface_hub
    from engines.planner import ModelStore

    store = ModelStore()
    try:
        return describe(store, _spec_of(entry))
    finally:
        store.close()


def _known(entry: NewEntry, known: ModelSpec, registry: Path) -> NewEntry:
    """Return the entry of a model that the shipped registry has. Its files are asked only whether they can be served.

    Raises:
        BadModel: they cannot.
    """
    entry = with_known(entry, known, read_registry(registry) if registry.exists() else Registry())
    try:
        _describe(entry)
    except (HubUnreachable, OfflineMode):
        click.echo("warning: the hub does not answer, so the model's own files were not looked at", err=True)
    return entry


def _described(entry: NewEntry) -> NewEntry:
    """Return the entry with what the model's files state.

    Raises:
        BadModel: as for `_describe`.
    """
    entry = _on_base(entry)
    found = _describe(entry)
    return NewEntry(
        name=entry.name,
        source=entry.source,
        aliases=entry.aliases,
        revision=entry.revision,
        adapter=entry.adapter,
        adapter_revision=entry.adapter_revision,
        task=None if found.task == "embed" else found.task,
        prompts=found.prompts,
        default_prompt=found.default_prompt if found.default_prompt in found.prompts else None,
        matryoshka=Matryoshka(widths=found.matryoshka_widths) if found.matryoshka_widths else None,
        assumed_pooling=found.assumed_pooling,
        description=_summary(found),
        license=found.license,
    )


def _spec_of(entry: NewEntry) -> ModelSpec:
    return ModelSpec(
        model_id=entry.name,
        source=entry.source,
        revision=entry.revision,
        adapter=entry.adapter,
        adapter_revision=entry.adapter_revision,
    )


def _on_base(entry: NewEntry) -> NewEntry:
    """Return the entry of an adapter with the model that it belongs to as its source; another entry as it is.

    Raises:
        BadModel: it cannot be read, or that model is neither on a hub nor on this machine.
    """
    from engines.description import base_of  # late, as above
    from engines.planner import ModelStore

    store = ModelStore()
    try:
        found = base_of(store, _spec_of(entry))
    finally:
        store.close()
    if found is None:
        return entry
    base, revision = found
    folder = existing_folder(base)
    if folder is None and not is_hub_id(base):
        raise UnsupportedModel(
            f"it is an adapter of {base!r}, which is neither a hub id nor a folder here: add it to the registry by "
            "hand, with its base model as `source`"
        )
    return structs.replace(
        entry,
        source=base if folder is None else str(folder),
        revision=revision if folder is None else None,
        adapter=entry.source,
        adapter_revision=entry.revision,
    )


def _summary(found: "Description") -> str:
    """Format what people compare models by: `1024 wide, 0.57 B parameters, 8192 tokens`."""
    parts = (
        _KINDS.get(found.task, ""),
        f"{found.width} wide" if found.width else "",
        f"{_parameters(found.num_parameters)} parameters" if found.num_parameters else "",
        f"{found.max_tokens} tokens" if found.max_tokens else "",
    )
    return ", ".join(part for part in parts if part)


def _parameters(number: int) -> str:
    if number >= _MIN_BILLIONS:
        return f"{number / _GIGA:.2g} B"
    return f"{number / _MEGA:.0f} M" if number >= _MEGA else f"{number:,}".replace(",", " ")


def _write(path: Path, entry: NewEntry) -> None:
    if path.exists():
        add_entry(path, entry)
        return
    create_file(path, starter_text(has_embedded=is_demo_installed(), entry=entry))


def _fail(message: str, code: int) -> None:
    click.echo(message, err=True)
    raise SystemExit(code)
