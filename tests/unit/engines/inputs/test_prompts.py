"""Tests the selection of prompts, byte for byte."""

from typing import Any

import pytest

from engines.errors import InvalidValue, PromptNotFound
from engines.inputs.prompts import PromptTemplate, select_prompt
from engines.types import EmbedCall

QWEN = "Instruct: {task}\nQuery:{text}"
E5 = {"query": "query: ", "passage": "passage: "}
NOMIC = {"search_query": "search_query: ", "search_document": "search_document: ", "clustering": "clustering: "}


def template_for(
    prompts: dict[str, str], *, default: str | None = None, template: str | None = None, **call: Any
) -> PromptTemplate:
    return select_prompt(EmbedCall(model_id="m", texts=("t",), **call), prompts, default, template)


@pytest.mark.parametrize(
    ("prompts", "input_type", "before"),
    [
        (E5, "query", "query: "),
        (E5, "passage", "passage: "),
        (E5, "document", "passage: "),
        (E5, "search_query", "query: "),
        (NOMIC, "query", "search_query: "),
        (NOMIC, "document", "search_document: "),
        (NOMIC, "clustering", "clustering: "),
        ({"query": "a", "search_query": "b"}, "search_query", "b"),
        ({"corpus": "c: ", "passage": "p: "}, "document", "p: "),
        ({"query": "q: "}, "document", ""),
        ({}, "query", ""),
        ({"document": "", "passage": "p: "}, "document", ""),
    ],
)
def test_an_input_type_is_a_prompts_name_or_one_of_its_family(
    prompts: dict[str, str], input_type: str, before: str
) -> None:
    assert template_for(prompts, input_type=input_type) == PromptTemplate(before)


def test_an_unknown_name_is_refused_with_those_that_exist() -> None:
    with pytest.raises(
        PromptNotFound, match="no prompt named 'sts': use one of clustering, document, query, search_"
    ) as caught:
        template_for(NOMIC, input_type="sts")
    assert caught.value.param == "input_type"


@pytest.mark.parametrize("prompt", ["", " ", "为这个句子生成表示以用于检索相关文章：", "a\n\tb  "])
def test_a_prompt_of_the_request_is_verbatim(prompt: str) -> None:
    assert template_for(E5, default="query", prompt=prompt).apply(" text ") == f"{prompt} text "


def test_an_instruction_goes_into_the_models_template() -> None:
    filled = template_for({}, template=QWEN, instruction="Find it", input_type="query")

    assert filled == PromptTemplate("Instruct: Find it\nQuery:", "")
    assert filled.apply(" text") == "Instruct: Find it\nQuery: text"


def test_a_template_may_go_on_behind_the_text() -> None:
    assert template_for({}, template="{task}: {text} ({task})", instruction="x").apply("y") == "x: y (x)"


def test_braces_of_a_text_or_a_task_are_no_template() -> None:
    assert template_for({}, template=QWEN, instruction="{text}").apply("{task}") == "Instruct: {text}\nQuery:{task}"


@pytest.mark.parametrize(
    ("call", "param"),
    [
        ({"prompt": "p", "input_type": "query"}, "prompt"),
        ({"prompt": "", "instruction": "i"}, "prompt"),
        ({"instruction": "i", "input_type": "document"}, "instruction"),
        ({"instruction": "i", "input_type": "passage"}, "instruction"),
    ],
)
def test_fields_that_exclude_each_other_are_refused(call: dict[str, str], param: str) -> None:
    with pytest.raises(InvalidValue, match="send one of them") as caught:
        template_for(E5, template=QWEN, **call)
    assert caught.value.param == param


def test_an_instruction_without_a_template_is_refused() -> None:
    with pytest.raises(InvalidValue, match="this model does not support instruction: use input_type or prompt"):
        template_for(E5, instruction="i")


@pytest.mark.parametrize(("default", "before"), [(None, ""), ("query", "query: "), ("document", "")])
def test_without_a_word_the_models_default_prompt_counts(default: str | None, before: str) -> None:
    assert template_for(E5, default=default) == PromptTemplate(before)
