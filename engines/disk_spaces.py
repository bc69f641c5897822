"""Names the spaces of models from their files on disk, without torch and without a server.

Like `engines/planner.py`, it is for commands that run without a server.
"""

from pathlib import Path

from msgspec import Struct

from engines.errors import BadModel
from engines.hub.content_digests import ContentDigests
from engines.loading.folder import outputs_of, read_files
from engines.loading.ingredients import expected_dtype, list_weights, read_ingredients
from engines.loading.score_forms import score_form
from engines.planner import native_width
from engines.protocols import Files
from engines.space import Ingredients, Listed, list_spaces, with_numeric
from engines.spec import Matryoshka, ModelSpec

__all__ = ["ContentDigests", "DiskSpaces", "spaces_on_disk"]


class DiskSpaces(Struct, frozen=True, kw_only=True):
    """The spaces of one model. `spaces` is as `list_spaces` returns it.

    `why_unknown`: why they are not known, in words; empty where they are. `ingredients` is None then.
    """

    ingredients: Ingredients | None = None
    spaces: dict[str, dict[str, str]] = {}
    why_unknown: str = ""


def spaces_on_disk(files: Files, spec: ModelSpec, device: str, digests: ContentDigests) -> DiskSpaces:
    """Names the spaces that a model would have on a device, `cpu` or `cuda:N`. Blocks: it may hash the weights."""
    try:
        located = files.locate(spec)
        if located is None:
            return DiskSpaces(why_unknown="not on disk")
        folder = read_files(located)
        if score_form(folder, spec) is not None:
            return DiskSpaces(why_unknown="gives scores, not vectors")
        found = read_ingredients(folder, spec, list_weights(folder), digests)
    except (BadModel, OSError, ValueError) as error:
        return DiskSpaces(why_unknown=str(error) if isinstance(error, BadModel) else "its files cannot be read")
    if "dense" not in outputs_of(folder):
        return DiskSpaces(why_unknown="gives no dense vectors")
    width = native_width(Path(located.path), spec, located.adapter_folder)
    if width is None:
        return DiskSpaces(why_unknown="its files do not state the width of its vectors")
    ingredients = with_numeric(found, expected_dtype(folder, spec, device.partition(":")[0]))
    listed = Listed(
        width=width,
        prompts={**folder.prompts, **spec.prompts},
        matryoshka=spec.matryoshka or Matryoshka(widths=folder.widths),
        is_normalized=spec.normalize,
    )
    return DiskSpaces(ingredients=ingredients, spaces=list_spaces(ingredients, listed))
