"""Checks the errors of refused model folders."""

import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks.lib.engine_kit import Kit, embed
from benchmarks.lib.models import WIDTH
from engines.errors import BadModel

# Remedies that a message may name.
_REMEDIES = (
    r"fetch the model again|in the registry|serve the result|set `|save|use (a|one|another)|only |can be served|remove"
)


def refusal(kit: Kit, folder: Path, **spec: Any) -> BadModel:
    """Return the error of a folder that must be refused: it names a remedy and no path, and the next model loads."""
    with pytest.raises(BadModel) as caught:
        kit.load(folder, **spec)
    message = str(caught.value)

    assert str(folder.parent) not in message
    assert not re.search(r"(^|[\s'\"(])/\w", message)
    assert re.search(_REMEDIES, message), message
    assert embed(kit.load(kit.recipe_folder("bert-cls")), ["next"]).shape == (1, WIDTH)
    return caught.value
