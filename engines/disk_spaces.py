"""Names the spaces of models from their files on disk, without a server.

Like `engines/planner.py`, it is for commands that run without a server. It needs torch for models with vectors of
tokens only, to read the width of these from pickled weights.
"""

from pathlib import Path

from msgspec import Struct, structs

from engines.errors import BadModel
from engines.hub.content_digests import ContentDigests
from engines.loading.folder import Folder, outputs_of, read_files, require_json
from engines.loading.ingredients import expected_dtype, list_weights, read_ingredients
from engines.loading.score_forms import score_form
from engines.planner import hidden_width, native_width
from engines.protocols import Files
from engines.space import Ingredients, Listed, list_output_spaces, list_spaces, with_numeric
from engines.spec import Matryoshka, ModelSpec

__all__ = ["ContentDigests", "DiskSpaces", "spaces_on_disk"]


class DiskSpaces(Struct, frozen=True, kw_only=True):
    """The spaces of one model: `spaces` as `list_spaces` returns them, `output_spaces` as `list_output_spaces` does.

    `prompts`: of the model, by name. `why_unknown`: why there are none of either, in words.
    """

    ingredients: Ingredients | None = None
    prompts: dict[str, str] = {}
    spaces: dict[str, dict[str, str]] = {}
    output_spaces: dict[str, dict[str, dict[str, str]]] = {}
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
    outputs = outputs_of(folder)
    width = native_width(Path(located.path), spec, located.adapter_folder) if "dense" in outputs else 0
    if width is None:
        return DiskSpaces(ingredients=ingredients, why_unknown="its files do not state the width of its vectors")
    listed = Listed(
        width=width,
        prompts={**folder.prompts, **spec.prompts},
        matryoshka=spec.matryoshka or Matryoshka(widths=folder.widths),
        is_normalized=spec.normalize,
        outputs=outputs,
    )
    try:
        listed = _with_token_vectors(listed, folder)
    except (BadModel, OSError, KeyError, TypeError, ValueError, StopIteration):
        listed = structs.replace(listed, outputs=tuple(name for name in outputs if name != "multi_vector"))
    is_known = bool(listed.outputs)
    return DiskSpaces(
        ingredients=ingredients,
        prompts=dict(listed.prompts),
        spaces=list_spaces(ingredients, listed) if listed.width else {},
        output_spaces=list_output_spaces(ingredients, listed),
        why_unknown="" if is_known else "its files do not state the width of its vectors",
    )


def _with_token_vectors(listed: Listed, folder: Folder) -> Listed:
    """Adds the width of vectors of tokens, and how they are merged.

    Raises:
        BadModel, OSError, KeyError, TypeError, ValueError, StopIteration: the files do not state it.
    """
    if "multi_vector" not in listed.outputs:
        return listed
    from engines.loading.multi_vector import read_stated_vectors  # late: imports torch

    stated = read_stated_vectors(folder, hidden_width(require_json(folder.weights, "config.json")))
    assert stated is not None, "it is among the outputs"
    return structs.replace(listed, vector_width=stated.width, token_pooling=stated.token_pooling)
