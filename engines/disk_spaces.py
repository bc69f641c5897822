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
from engines.space import NO_DENSE, Ingredients, Listed, list_spaces, with_numeric
from engines.spec import Matryoshka, ModelSpec

__all__ = ["ContentDigests", "DiskSpaces", "spaces_on_disk"]


class DiskSpaces(Struct, frozen=True, kw_only=True):
    """The spaces of one model. `spaces` is as `list_spaces` returns it.

    `prompts`: of the model, by name. `why_unknown`: why `spaces` is empty, in words. `ingredients` is None then, except
    of a model that gives sparse outputs or vectors of tokens only: the names of their spaces need the loaded model.
    """

    ingredients: Ingredients | None = None
    prompts: dict[str, str] = {}
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
    ingredients = with_numeric(found, expected_dtype(folder, spec, device.partition(":")[0]))
    prompts = {**folder.prompts, **spec.prompts}
    if "dense" not in outputs_of(folder):
        return DiskSpaces(ingredients=ingredients, prompts=prompts, why_unknown=NO_DENSE)
    width = native_width(Path(located.path), spec, located.adapter_folder)
    if width is None:
        return DiskSpaces(why_unknown="its files do not state the width of its vectors")
    listed = Listed(
        width=width,
        prompts=prompts,
        matryoshka=spec.matryoshka or Matryoshka(widths=folder.widths),
        is_normalized=spec.normalize,
    )
    return DiskSpaces(ingredients=ingredients, prompts=prompts, spaces=list_spaces(ingredients, listed))
