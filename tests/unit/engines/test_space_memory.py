"""What the server says of a space that a client expects and that its request does not get."""

from pathlib import Path

import pytest
from msgspec import structs

from engines.space import Ingredients, Listed, VectorForm, space_of
from engines.space_memory import MAX_MODELS, Asked, SpaceMemory
from engines.spec import Matryoshka

OLD = Ingredients({"weights": "3f2a" * 8, "config": "cd" * 16, "modules": "Transformer > Pooling"})
NOW = Ingredients({**OLD.values, "weights": "91bc" * 8})
LISTED = Listed(width=8, prompts={"query": "q: ", "document": "d: "}, matryoshka=Matryoshka(widths=(4,)))
FORM = VectorForm(width=8, native_width=8)


@pytest.fixture
def memory(tmp_path: Path) -> SpaceMemory:
    return SpaceMemory(tmp_path)


def explain(memory: SpaceMemory, expected: str, form: VectorForm = FORM) -> str:
    model = memory.remember("m", NOW, LISTED)
    return memory.explain(Asked(expected=expected, model=model, form=form)).words


def test_the_prompt_is_named(memory: SpaceMemory) -> None:
    expected = space_of(NOW, structs.replace(FORM, before="q: "))

    assert explain(memory, expected) == "that space is m with the prompt 'query'; this request has no prompt"


def test_width_and_length_are_named_together(memory: SpaceMemory) -> None:
    expected = space_of(NOW, structs.replace(FORM, width=4, is_normalized=False))

    assert explain(memory, expected) == (
        "that space is m with 4 dimensions, vectors as the modules leave them; this request has 8 dimensions, "
        "vectors of length one"
    )


def test_a_prompt_of_the_request_itself_is_not_repeated(memory: SpaceMemory) -> None:
    found = explain(memory, space_of(NOW, FORM), structs.replace(FORM, before="a secret of somebody's: "))

    assert found == "that space is m with no prompt; this request has a prompt of its own"


def test_texts_that_are_cut_elsewhere_are_named(memory: SpaceMemory) -> None:
    found = explain(memory, space_of(NOW, FORM), structs.replace(FORM, max_tokens=5, cut="start"))

    assert found == (
        "that space is m with texts cut as the model does, as many tokens as the model reads; this request has texts "
        "cut at the start, at most 5 tokens"
    )


def test_an_earlier_generation_is_known_after_a_restart(memory: SpaceMemory, tmp_path: Path) -> None:
    memory.remember("m", OLD, LISTED)

    found = explain(SpaceMemory(tmp_path), space_of(OLD, FORM))

    assert found == "of this model the weights 3f2a3f2a3f2a… then, 91bc91bc91bc… now"


def test_an_earlier_generation_with_another_prompt_is_known_too(memory: SpaceMemory) -> None:
    memory.remember("m", OLD, LISTED)

    found = explain(memory, space_of(OLD, structs.replace(FORM, before="d: ")))

    assert found == (
        "of this model the weights 3f2a3f2a3f2a… then, 91bc91bc91bc… now; that space is m with the prompt 'document'; "
        "this request has no prompt"
    )


def test_another_model_is_named_apart_so_that_it_can_be_hidden(memory: SpaceMemory) -> None:
    memory.remember("other", OLD, LISTED)
    model = memory.remember("m", NOW, LISTED)

    found = memory.explain(Asked(expected=space_of(OLD, FORM), model=model, form=FORM))

    assert (found.words, found.other_model) == ("that space is other", "other")


def test_of_an_unknown_space_its_digits_say_which_part_differs(memory: SpaceMemory) -> None:
    config = Ingredients({**NOW.values, "config": "other"})

    assert explain(memory, space_of(OLD, FORM)) == "this server does not know it; by its digits it differs in weights"
    assert explain(memory, space_of(config, FORM)) == (
        "this server does not know it; by its digits it differs in tokenizer or modules"
    )
    assert explain(memory, space_of(OLD, structs.replace(FORM, before="?"))) == (
        "this server does not know it; by its digits it differs in weights and in prompt, width or other fields of the "
        "request"
    )


@pytest.mark.parametrize("text", ["", "nonsense", "s0-0123456789ab-0123456789abcdef"])
def test_what_is_no_fingerprint_is_called_none(memory: SpaceMemory, text: str) -> None:
    assert explain(memory, text) == "it is not a fingerprint of this version of the server"


def test_the_file_is_bounded_and_forgets_what_was_loaded_longest_ago(
    memory: SpaceMemory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(10_000))
    monkeypatch.setattr("engines.space_memory.time.time", lambda: float(next(clock)))
    memory.remember("m", OLD, LISTED)
    for index in range(MAX_MODELS):
        memory.remember(f"m{index}", Ingredients({"weights": f"{index}"}), LISTED)

    kept = SpaceMemory(tmp_path)._models.values()

    assert len(kept) == MAX_MODELS
    assert "m" not in {model.model_id for model in kept}


def test_long_prompts_are_not_kept(memory: SpaceMemory) -> None:
    model = memory.remember("m", NOW, structs.replace(LISTED, prompts={"long": "x" * 10_000, "query": "q: "}))

    assert model.prompts == {"query": "q: "}
