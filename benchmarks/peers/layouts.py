"""Finds the names that `own.py` uses in a tree of either layout, because `offline.regression` runs it on old commits.

Commits before the packages of `docs/architecture.md` define the call in `engines/records.py` and run it with
`Host.embed`; later ones have `engines/types.py` and `Host.run`. `engines.machine`, `engines.host` and `engines.spec`
have the same names in both. Imports `engines` when called, from the first tree on the path.
"""

import importlib
from collections.abc import Awaitable, Callable
from importlib.util import find_spec
from typing import Any

CALL_MODULES = ("engines.types", "engines.records")
RUN_METHODS = ("run", "embed")


def embed_call() -> Any:
    """Return the class `EmbedCall` of the tree.

    Raises:
        ImportError: no known layout has its module.
    """
    for name in CALL_MODULES:
        if find_spec(name) is not None:
            return importlib.import_module(name).EmbedCall
    raise ImportError(f"no EmbedCall in {' or '.join(CALL_MODULES)}: a layout that {__name__} does not know")


def run_of(host: object) -> Callable[[Any], Awaitable[Any]]:
    """Return the method of a host that takes a call and returns its vectors.

    Raises:
        AttributeError: the host has none of `RUN_METHODS`.
    """
    for name in RUN_METHODS:
        if callable(method := getattr(host, name, None)):
            return method  # type: ignore[no-any-return]  # the tree decides which one it is
    raise AttributeError(f"{type(host).__name__} has neither {' nor '.join(RUN_METHODS)}")
