"""Selects the prompt for a request's texts. Pure; uses prompts byte for byte as the files or the registry state them.

A prompt is concatenated with the text, as in sentence-transformers, so every space counts.
"""

from collections.abc import Mapping

from msgspec import Struct

from engines.errors import InvalidValue, PromptNotFound
from engines.types import TextCall

# Equivalent prompt names; the first that the model has is used, in sentence-transformers' order for `encode_query` and
# `encode_document`. A model without any of them gets the texts without a prompt.
QUERY_NAMES = ("query", "search_query")
DOCUMENT_NAMES = ("document", "passage", "corpus", "search_document", "search_passage")
_FAMILIES = (QUERY_NAMES, DOCUMENT_NAMES)


class PromptTemplate(Struct, frozen=True):
    """The strings to put before and after a text."""

    before: str = ""
    behind: str = ""

    def apply(self, text: str) -> str:
        """Returns the text with the prompt around it."""
        return f"{self.before}{text}{self.behind}"

    @property
    def num_chars(self) -> int:
        """The characters that the template adds to each text."""
        return len(self.before) + len(self.behind)

    def head(self, text: str, size: int) -> str:
        """Returns the first `size` characters of `apply(text)` without building the rest."""
        num_text = max(size - len(self.before), 0)
        num_behind = max(num_text - len(text), 0)
        return f"{self.before[:size]}{text[:num_text]}{self.behind[:num_behind]}"

    def tail(self, text: str, size: int) -> str:
        """Returns the last `size` characters of `apply(text)` without building the rest."""
        num_text = max(size - len(self.behind), 0)
        num_before = max(num_text - len(text), 0)
        return f"{_last(self.before, num_before)}{_last(text, num_text)}{_last(self.behind, size)}"


def _last(text: str, size: int) -> str:
    return text[max(len(text) - size, 0) :]


def select_prompt(
    call: TextCall, prompts: Mapping[str, str], default_prompt: str | None, instruction_template: str | None
) -> PromptTemplate:
    """Returns the prompt template of a call. Four cases:

    1. `prompt`: prepended verbatim; excludes the other two.
    2. `instruction`: inserted into the model's instruction template.
    3. `input_type`: the prompt of that name, or of an equivalent name (query, document).
    4. none: the model's default prompt, if any, as `SentenceTransformer.encode` does.

    Raises:
        InvalidValue: fields that exclude each other, or an instruction for a model without a template.
        PromptNotFound: the model has no such prompt.
    """
    if call.prompt is not None:  # (1)
        if call.input_type is not None or call.instruction is not None:
            raise InvalidValue("prompt excludes input_type and instruction: send one of them", param="prompt")
        return PromptTemplate(call.prompt)
    if call.instruction is not None:  # (2)
        return _apply_instruction(call, instruction_template)
    if call.input_type is not None:  # (3)
        return PromptTemplate(_named_prompt(call.input_type, prompts))
    return PromptTemplate(prompts.get(default_prompt, "") if default_prompt else "")  # (4)


def _apply_instruction(call: TextCall, template: str | None) -> PromptTemplate:
    if template is None:
        raise InvalidValue("this model does not support instruction: use input_type or prompt", param="instruction")
    if call.input_type is not None and call.input_type not in QUERY_NAMES:
        raise InvalidValue(
            f"instruction applies to queries, but input_type is {call.input_type!r}: send one of them",
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
    raise PromptNotFound(f"this model has no prompt named {name!r}: use one of {', '.join(known)}", param="input_type")
