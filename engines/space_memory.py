"""Remembers the models that this machine has served, to say how an earlier space differs from one of now."""

import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from msgspec import Struct

from engines.space import (
    Ingredients,
    Listed,
    SpaceParts,
    VectorForm,
    differences,
    parts_of,
    settled,
    space_of,
    widths_of,
)
from engines.spec import Matryoshka
from engines.storage import JsonStore
from engines.types import fingerprint

MAX_MODELS = 64
"""Generations of models that are remembered; the one that was loaded longest ago is dropped for a new one."""

_MAX_PROMPTS = 64
_MAX_PROMPT_CHARS = 2048
_MAX_DIFFERENCES = 4
"""Ingredients that a message names."""


class RememberedModel(Struct, frozen=True, kw_only=True):
    """One generation of one model. `seen_s`: when it was loaded last, in Unix seconds."""

    model_id: str
    ingredients: Ingredients
    width: int
    prompts: dict[str, str]
    matryoshka: Matryoshka
    seen_s: float

    @property
    def listed(self) -> Listed:
        return Listed(width=self.width, prompts=self.prompts, matryoshka=self.matryoshka)


class Asked(Struct, frozen=True, kw_only=True):
    """A request whose client expects another space than it would get."""

    expected: str
    model: RememberedModel
    form: VectorForm


class Explanation(Struct, frozen=True):
    """Why two spaces differ, in words. `other_model`: a model that the words name beside the request's own."""

    words: str
    other_model: str | None = None


class SpaceMemory:
    """Keeps what was loaded between starts, for all models. Thread-safe; blocks on the disk.

    Args:
        folder: where; None keeps it in memory only.
    """

    def __init__(self, folder: Path | None) -> None:
        self._lock = threading.Lock()
        path = folder / "spaces.json" if folder else None
        self._models: JsonStore[RememberedModel] = JsonStore(path, dict[str, RememberedModel], keep=_newest)

    def remember(self, model_id: str, ingredients: Ingredients, listed: Listed) -> RememberedModel:
        """Remembers a generation that has just been loaded."""
        prompts = {name: text for name, text in listed.prompts.items() if len(text) <= _MAX_PROMPT_CHARS}
        model = RememberedModel(
            model_id=model_id,
            ingredients=ingredients,
            width=listed.width,
            prompts=dict(sorted(prompts.items())[:_MAX_PROMPTS]),
            matryoshka=listed.matryoshka,
            seen_s=time.time(),
        )
        key = fingerprint([model_id, *sorted(ingredients.values.items()), *sorted(prompts.items())])
        with self._lock:
            self._models.put(key, model)
        return model

    def explain(self, asked: Asked) -> Explanation:
        """Says how the expected space differs from the request's own, as far as it is known."""
        parts = parts_of(asked.expected)
        if parts is None:
            return Explanation("it is not a fingerprint of this version of the server")
        with self._lock:
            self._models.refresh()
            known = self._models.values()
        newest_first = sorted(known, key=lambda model: (model.model_id != asked.model.model_id, -model.seen_s))
        for model in (asked.model, *newest_first):
            form = _form_of(asked.expected, parts, model, asked.form)
            if form is not None:
                return _compare(asked, model, form)
        return Explanation(_compare_parts(parts, parts_of(space_of(asked.model.ingredients, asked.form))))


def _newest(models: dict[str, RememberedModel]) -> dict[str, RememberedModel]:
    if len(models) <= MAX_MODELS:
        return models
    return dict(sorted(models.items(), key=lambda item: item[1].seen_s)[-MAX_MODELS:])


def _form_of(expected: str, parts: SpaceParts, model: RememberedModel, asked: VectorForm) -> VectorForm | None:
    """Returns the form in which a model's vectors lie in the expected space; None if no form is known that does."""
    first = space_of(model.ingredients, asked)
    if first == expected:
        return asked
    of_model = parts_of(first)
    if of_model is None or of_model[:2] != parts[:2]:
        return None
    return next((form for form in _forms(model, asked) if space_of(model.ingredients, form) == expected), None)


def _forms(model: RememberedModel, asked: VectorForm) -> Iterator[VectorForm]:
    """Yields the forms of a model that can be listed, the plain ones first."""
    widths = dict.fromkeys([*widths_of(model.listed), asked.width])
    prompts = dict.fromkeys([("", ""), *((text, "") for text in model.prompts.values()), (asked.before, asked.behind)])
    for cut, max_tokens in dict.fromkeys([(None, None), (asked.cut, asked.max_tokens)]):
        for before, behind in prompts:
            for width in widths:
                for is_normalized in (True, False):
                    yield VectorForm(
                        width=width,
                        native_width=model.width,
                        before=before,
                        behind=behind,
                        is_normalized=is_normalized,
                        has_layer_norm=model.matryoshka.layer_norm,
                        cut=cut,
                        max_tokens=max_tokens,
                        output=asked.output,
                    )


def _compare(asked: Asked, model: RememberedModel, form: VectorForm) -> Explanation:
    theirs, ours = settled(model.ingredients, form), settled(asked.model.ingredients, asked.form)
    pairs = [
        (_prompt_words(theirs, model), _prompt_words(ours, asked.model)),
        (f"{theirs.width} dimensions", f"{ours.width} dimensions"),
        *((_flag(name, getattr(theirs, name)), _flag(name, getattr(ours, name))) for name in _FLAGS),
    ]
    unlike = [(before, after) for before, after in pairs if before != after]
    if model.model_id != asked.model.model_id:
        named = ", ".join(before for before, _ in unlike)
        return Explanation(f"that space is {model.model_id}{f' with {named}' if named else ''}", model.model_id)
    words = [str(each) for each in differences(model.ingredients, asked.model.ingredients)]
    more = f" and {len(words) - _MAX_DIFFERENCES} more" if len(words) > _MAX_DIFFERENCES else ""
    found = [f"of this model the {', '.join(words[:_MAX_DIFFERENCES])}{more}"] if words else []
    if unlike:
        before, after = (", ".join(side) for side in zip(*unlike, strict=True))
        found.append(f"that space is {model.model_id} with {before}; this request has {after}")
    return Explanation("; ".join(found))


_FLAGS: dict[str, dict[bool | str | int | None, str]] = {
    "is_normalized": {True: "vectors of length one", False: "vectors as the modules leave them"},
    "has_layer_norm": {True: "a layer norm", False: "no layer norm"},
    "cut": {None: "texts cut as the model does", "start": "texts cut at the start", "end": "texts cut at the end"},
    "max_tokens": {None: "as many tokens as the model reads"},
}  # fmt: skip


def _flag(name: str, value: bool | str | int | None) -> str:
    return _FLAGS[name].get(value, f"at most {value} tokens")


def _prompt_words(form: VectorForm, model: RememberedModel) -> str:
    if not form.before and not form.behind:
        return "no prompt"
    names = sorted(name for name, text in model.prompts.items() if (text, "") == (form.before, form.behind))
    return f"the prompt {names[0]!r}" if names else "a prompt of its own"


def _compare_parts(theirs: SpaceParts, ours: SpaceParts | None) -> str:
    """Says which parts of two fingerprints differ, where nothing else is known of the first."""
    names = ("weights", "tokenizer or modules", "prompt, width or other fields of the request")
    assert ours is not None, "made a moment ago"
    unlike = [name for name, before, after in zip(names, theirs, ours, strict=True) if before != after]
    return f"this server does not know it; by its digits it differs in {_and(unlike)}"


def _and(words: Sequence[str]) -> str:
    return " and in ".join(words) or "one of its parts"
