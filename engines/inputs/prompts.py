"""Which prompt goes in front of a text: pure, and byte for byte what the model's files or the registry say.

A prompt is plain string concatenation, as sentence-transformers does it, so every space counts.
"""

from collections.abc import Mapping

from msgspec import Struct

from engines.errors import InvalidValue, PromptNotFound
from engines.types import EmbedCall

# Names that clients use for one thing; the first that the model has is taken, in sentence-transformers' order for
# `encode_query` and `encode_document`. A model without any of them takes such texts as they are.
_FAMILIES = (
    ("query", "search_query"),
    ("document", "passage", "corpus", "search_document", "search_passage"),
)


class PromptTemplate(Struct, frozen=True):
    """What stands before and behind a text."""

    before: str = ""
    behind: str = ""

    def apply(self, text: str) -> str:
        """The text inside its frame."""
        return f"{self.before}{text}{self.behind}"

    @property
    def num_chars(self) -> int:
        """What it adds to each text."""
        return len(self.before) + len(self.behind)

    def head(self, text: str, size: int) -> str:
        """The first `size` characters of the framed text, without joining the rest."""
        for_text = max(size - len(self.before), 0)
        for_behind = max(for_text - len(text), 0)
        return f"{self.before[:size]}{text[:for_text]}{self.behind[:for_behind]}"

    def tail(self, text: str, size: int) -> str:
        """The last `size` characters of the framed text, without joining the rest."""
        for_text = max(size - len(self.behind), 0)
        for_before = max(for_text - len(text), 0)
        return f"{_last(self.before, for_before)}{_last(text, for_text)}{_last(self.behind, size)}"


def _last(text: str, size: int) -> str:
    return text[max(len(text) - size, 0) :]


def select_prompt(
    call: EmbedCall, prompts: Mapping[str, str], default_prompt: str | None, instruction_template: str | None
) -> PromptTemplate:
    """The frame of a call's texts. There are four cases:

    1. `prompt`: verbatim in front; excludes the other two.
    2. `instruction`: put into the model's template.
    3. `input_type`: a prompt of that name, or of its family (query, document).
    4. none: the model's default prompt if it has one, which is what `SentenceTransformer.encode` does.

    Raises:
        InvalidValue: fields that exclude each other, or an instruction for a model without a template.
        PromptNotFound: the model has no such prompt.
    """
    if call.prompt is not None:  # (1)
        if call.input_type is not None or call.instruction is not None:
            raise InvalidValue("prompt excludes input_type and instruction: send one of them", param="prompt")
        return PromptTemplate(call.prompt)
    if call.instruction is not None:  # (2)
        return _instruct(call, instruction_template)
    if call.input_type is not None:  # (3)
        return PromptTemplate(_named_prompt(call.input_type, prompts))
    return PromptTemplate(prompts.get(default_prompt, "") if default_prompt else "")  # (4)


def _instruct(call: EmbedCall, template: str | None) -> PromptTemplate:
    if template is None:
        raise InvalidValue("this model takes no instruction; use input_type or prompt", param="instruction")
    if call.input_type is not None and call.input_type not in _FAMILIES[0]:
        raise InvalidValue(
            f"instruction describes a query, but input_type is {call.input_type!r}: send one of them",
            param="instruction",
        )
    before, _, behind = template.partition("{text}")
    task = call.instruction or ""
    return PromptTemplate(before.replace("{task}", task), behind.replace("{task}", task))


def _named_prompt(name: str, prompts: Mapping[str, str]) -> str:
    if name in prompts:
        return prompts[name]
    for family in _FAMILIES:
        if name in family:
            return next((prompts[other] for other in family if other in prompts), "")
    known = sorted({*prompts, "query", "document"})
    raise PromptNotFound(f"this model has no prompt named {name!r}; it has {', '.join(known)}", param="input_type")
