"""Knows the prompts, widths and licences of widely used models, for `embedyard add` and for hub ids in no registry.

They are those of the shipped `registry.yaml`, of which the package has a copy: the one beside the server is its
operator's, who may have removed them. A test holds both equal.
"""

from functools import cache
from importlib.resources import files

from msgspec import structs

from engines.spec import ModelSpec
from router.registry.new_entry import NewEntry
from router.registry.registry import Registry, parse_registry

FILE = "catalogue.yaml"


@cache
def catalogue() -> Registry:
    """Return the shipped registry."""
    return parse_registry(files("router.registry").joinpath(FILE).read_text(encoding="utf-8"))


def known_model(hub_id: str) -> ModelSpec | None:
    """Return the entry of a model of the hub, without settings of the shipped file; None if it has none.

    `source` may be another repository than `hub_id`: a copy of the same weights that needs no code of its own. It is
    `hub_id` where the shipped registry takes the files from a Python package.
    """
    shipped = catalogue()
    by_source = {spec.source: spec for spec in shipped.models.values()}
    spec = by_source.get(hub_id) or shipped.models.get(shipped.aliases.get(hub_id, ""))
    if spec is None or "/" not in hub_id:
        return None
    source = hub_id if spec.source.startswith("package:") else spec.source
    return structs.replace(spec, source=source, sha256={}, preload=False, truncate=None)


def with_known(entry: NewEntry, known: ModelSpec, taken: Registry) -> NewEntry:
    """Return an entry with what is known of its model, for a registry in which some names are taken already."""
    aliases = [
        alias for alias in catalogue().aliases_of(known.model_id) if alias not in (*taken.aliases, *taken.models)
    ]
    return structs.replace(
        entry,
        source=known.source,
        aliases=tuple(dict.fromkeys(alias for alias in (*entry.aliases, *aliases) if alias != entry.name)),
        task=known.task,
        prompts=known.prompts,
        default_prompt=known.default_prompt,
        instruction_template=known.instruction_template,
        matryoshka=known.matryoshka,
        description=known.description,
        license=known.license,
    )
