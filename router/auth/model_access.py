"""Decides which models a key may use, list, and see in error messages.

A model is allowed if its id or one of its aliases matches a pattern of the key. Operators' routes do not check: a key
that may evict any model may also see it.
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
    """Whether a pattern of the key matches this model."""
    return "*" in key.models or key.may_use((model_id,)) or key.may_use(registry.aliases_of(model_id))


def resolve(request: Request[Any, Any, Any], registry: Registry, name: str | None) -> ModelSpec:
    """Return the model that a client names, and record it in the request context.

    Raises:
        ModelNotFound: no model has this name; only names that the key may use are suggested.
        ModelNotAllowed: the key may not use the model.
        InvalidValue: no name was given, and there is no default model.
    """
    key = key_of(request)
    spec = registry.resolve(name, lambda model_id: may_use(key, registry, model_id))
    context_of(request).set_model(spec.model_id)
    if not may_use(key, registry, spec.model_id):
        raise ModelNotAllowed(
            f"This key may not use the model {name or spec.model_id!r}: GET /v1/models lists the models that it may use"
        )
    return spec
