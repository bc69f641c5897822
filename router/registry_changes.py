"""What differs between two registries, in the terms of a reload: pure, and ignorant of what is in memory."""

from msgspec import Struct

from engines.spec import is_same_engine
from router.registry import Registry


class Changes(Struct, frozen=True, kw_only=True):
    """Model ids by what has to happen to them, each in the order of its registry."""

    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    updated: tuple[str, ...] = ()
    """Changed in place: aliases, or fields of `engines.spec.IN_PLACE`."""
    replaced: tuple[str, ...] = ()
    """Need a new generation: the engine must be loaded again."""
    is_default_changed: bool = False
    is_budget_changed: bool = False

    @property
    def is_empty(self) -> bool:
        """Whether the registries mean the same."""
        return self == Changes()


def diff(old: Registry, new: Registry) -> Changes:
    """What leads from `old` to `new`."""
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
