"""Which models a key may use: whatever a client names, lists or is told of goes through here.

A model is allowed when its id or one of its aliases fits a pattern of the key. Operators' routes do not ask: who may
evict any model learns nothing from a list.
"""

from typing import Any

from litestar import Request

from engines.spec import ModelSpec
from router.auth.guards import key_of
from router.auth.keys import Key
from router.errors import ModelNotAllowed
from router.observability.request_context import context_of
from router.registry.registry import Registry


def may_use(key: Key, registry: Registry, model_id: str) -> bool:
    """Whether the key's patterns name this model."""
    return key.may_use((model_id,)) or key.may_use(registry.aliases_of(model_id))


def resolve(request: Request[Any, Any, Any], registry: Registry, name: str | None) -> ModelSpec:
    """The model that a client means; the visit knows it from then on.

    Raises:
        ModelNotFound: nothing is called so; only names that the key may use are suggested.
        ModelNotAllowed: the key may not use it.
        InvalidValue: no name, and no default.
    """
    key = key_of(request)
    spec = registry.resolve(name, lambda model_id: may_use(key, registry, model_id))
    context_of(request).set_model(spec.model_id)
    if not may_use(key, registry, spec.model_id):
        raise ModelNotAllowed(
            f"This key may not use the model {name or spec.model_id!r}; GET /v1/models lists those that it may use"
        )
    return spec
