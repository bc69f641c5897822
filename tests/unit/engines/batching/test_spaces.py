"""The spaces of a loaded model: known once its files are hashed; requests that expect one wait for that."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from msgspec import structs
from structlog.testing import capture_logs

from benchmarks.lib.engine_kit import Kit, answer
from engines.batching.contextual import ContextualOutput
from engines.batching.output import DenseOutput, OutputSpec
from engines.batching.outputs import kind_of_outputs
from engines.batching.spaces import ModelSpaces, SpaceSource
from engines.errors import ModelLoading, PromptNotFound, ShuttingDown, SpaceMismatch
from engines.models.outputs import Wanted
from engines.space import Ingredients, VectorForm, space_of, with_numeric
from engines.space_memory import SpaceMemory
from engines.spec import ModelSpec
from engines.types import EmbedCall, ModelInfo

FILES = Ingredients({"weights": "ab" * 16, "modules": "Transformer > Pooling", "truncation_side": "end"})
MODEL = with_numeric(FILES, "float32")
INFO = ModelInfo(dimensions=8, max_tokens=64, dtype="float32", attention="packed", prompts={"query": "q: "})
SPEC = ModelSpec(model_id="m", source="m", instruction_template="{task}: {text} !")
DENSE = DenseOutput(8, normalized=True, pre_norm=False)
FORM = VectorForm(width=8, native_width=8)


def call(**fields: object) -> EmbedCall:
    return EmbedCall(**{"model_id": "m", "texts": ("text",), "load_timeout_s": 5.0, **fields})  # type: ignore[arg-type]  # a test's own fields


class Files:
    """Files that are hashed when `gate` opens."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.failure: Exception | None = None
        self.go_on: Callable[[], bool] = lambda: True

    def read(self, go_on: Callable[[], bool]) -> Ingredients:
        self.go_on = go_on
        self.gate.wait(10)
        if self.failure is not None:
            raise self.failure
        return FILES


@pytest.fixture
def files() -> Files:
    return Files()


@pytest.fixture
def spaces(files: Files, tmp_path: Path) -> Iterator[ModelSpaces]:
    made = ModelSpaces(SpaceSource(files.read, SpaceMemory(tmp_path)), SPEC)
    made.begin()
    made.describe(SPEC, INFO, lambda found: with_numeric(found, "float32"))
    yield made
    made.close()
    files.gate.set()


async def hashed(files: Files, spaces: ModelSpaces) -> ModelSpaces:
    files.gate.set()
    await spaces.settled_within(10)
    return spaces


async def test_until_the_files_are_hashed_vectors_have_no_name(files: Files, spaces: ModelSpaces) -> None:
    assert (spaces.name(call(), DENSE), spaces.ingredients) == ("", None)
    await spaces.settled_within(0.001)

    await hashed(files, spaces)

    assert (spaces.name(call(), DENSE), spaces.ingredients) == (space_of(MODEL, FORM), MODEL)


FORMS: dict[str, tuple[dict[str, object], dict[str, object]]] = {
    "a named prompt": ({"input_type": "query"}, {"before": "q: "}),
    "its alias": ({"input_type": "search_query"}, {"before": "q: "}),
    "a prompt of the request": ({"prompt": "x"}, {"before": "x"}),
    "an instruction": ({"instruction": "find"}, {"before": "find: ", "behind": " !"}),
    "no prompt for token ids": ({"texts": (), "token_ids": ((5,),)}, {}),
    "the other end": ({"truncate": "start"}, {"cut": "start"}),
    "the same end": ({"truncate": "end"}, {}),
    "a refusal instead of a cut": ({"truncate": "error"}, {}),
    "fewer tokens": ({"max_tokens": 7}, {"max_tokens": 7}),
    "more tokens than the model reads": ({"max_tokens": 64}, {}),
}


@pytest.mark.parametrize(("fields", "form"), FORMS.values(), ids=FORMS)
async def test_what_a_request_asks_for_is_part_of_the_name(
    files: Files, spaces: ModelSpaces, fields: dict[str, object], form: dict[str, object]
) -> None:
    await hashed(files, spaces)

    assert spaces.name(call(**fields), DENSE) == space_of(MODEL, structs.replace(FORM, **form))


async def test_width_and_length_are_the_outputs(files: Files, spaces: ModelSpaces) -> None:
    await hashed(files, spaces)
    output = DenseOutput(4, normalized=False, pre_norm=True)

    form = structs.replace(FORM, width=4, is_normalized=False, has_layer_norm=True)
    assert spaces.name(call(), output) == space_of(MODEL, form)
    assert spaces.name(call(), OutputSpec()) == ""


async def test_a_default_prompt_counts_where_a_request_names_none(files: Files, spaces: ModelSpaces) -> None:
    spaces.describe(structs.replace(SPEC, default_prompt="query"), INFO, lambda found: with_numeric(found, "float32"))
    await hashed(files, spaces)

    assert spaces.name(call(), DENSE) == space_of(MODEL, structs.replace(FORM, before="q: "))


async def test_a_request_that_expects_a_space_waits_for_the_hashes(files: Files, spaces: ModelSpaces) -> None:
    expected = space_of(MODEL, FORM)
    waiting = asyncio.ensure_future(spaces.check(call(expect_space=expected), DENSE))
    await asyncio.sleep(0)
    assert not waiting.done()

    files.gate.set()

    assert await waiting == expected


async def test_a_request_that_expects_another_space_is_told_both_and_why(files: Files, spaces: ModelSpaces) -> None:
    await hashed(files, spaces)
    expected = space_of(MODEL, FORM)

    with pytest.raises(SpaceMismatch) as caught:
        await spaces.check(call(expect_space=expected, input_type="query"), DENSE)

    found = space_of(MODEL, structs.replace(FORM, before="q: "))
    assert str(caught.value) == (
        f"expect_space is {expected}, but this request gives {found}: that space is m with no prompt; this request has "
        "the prompt 'query'. Send the requests that made the index, or build it anew"
    )
    assert (caught.value.param, caught.value.other_model) == ("expect_space", None)


async def test_a_wrong_prompt_is_refused_as_without_an_expectation(files: Files, spaces: ModelSpaces) -> None:
    await hashed(files, spaces)

    with pytest.raises(PromptNotFound):
        await spaces.check(call(expect_space="s1", input_type="nothing"), DENSE)


async def test_files_that_cannot_be_hashed_refuse_expectations_only(files: Files, spaces: ModelSpaces) -> None:
    files.failure = OSError("/secret/path")
    with capture_logs() as lines:
        await hashed(files, spaces)

    assert (spaces.name(call(), DENSE), spaces.ingredients) == ("", None)
    assert "model.space_unknown" in {line["event"] for line in lines}
    with pytest.raises(SpaceMismatch, match="the space of m is unknown") as caught:
        await spaces.check(call(expect_space="s1"), DENSE)
    assert "secret" not in str(caught.value)


async def test_waiting_ends_with_the_time_that_a_load_may_take(spaces: ModelSpaces) -> None:
    with pytest.raises(ModelLoading, match="still being hashed"):
        await spaces.check(call(expect_space="s1", load_timeout_s=0.001), DENSE)


async def test_a_model_that_leaves_ends_hashing_and_those_that_wait(files: Files, spaces: ModelSpaces) -> None:
    with capture_logs() as lines:
        waiting = asyncio.ensure_future(spaces.check(call(expect_space="s1"), DENSE))
        await asyncio.sleep(0.01)
        spaces.close()
        files.gate.set()
        with pytest.raises(ShuttingDown):
            await waiting

    assert not files.go_on()
    assert "model.space_unknown" not in {line["event"] for line in lines}


async def test_a_cancelled_wait_leaves_the_others(files: Files, spaces: ModelSpaces) -> None:
    first, second = (asyncio.ensure_future(spaces.check(call(expect_space=space_of(MODEL, FORM)), DENSE)) for _ in "ab")
    await asyncio.sleep(0)
    first.cancel()
    await asyncio.sleep(0)

    files.gate.set()

    assert await second == space_of(MODEL, FORM)


async def test_dense_vectors_have_one_space_whichever_call_asks_for_them(files: Files, spaces: ModelSpaces) -> None:
    await hashed(files, spaces)
    alone = kind_of_outputs(Wanted(dense=True))(DENSE, 0, 0, 0.0)
    both = kind_of_outputs(Wanted(dense=True, sparse=True))(DENSE, 0, 9, 0.0)
    query = kind_of_outputs(Wanted(dense=True, sparse=True, side="query"))(DENSE, 0, 9, 0.0)
    states = kind_of_outputs(Wanted(states=True))(None, 8, 0, 0.0)

    names = [spaces.name(call(), output) for output in (alone, both, query, states)]

    assert names[0] == spaces.name(call(), DENSE)
    assert len({*names}) == 4


def test_the_names_that_an_engine_holds_are_bounded_and_long_prompts_are_not_held(kit: Kit) -> None:
    engine = kit.engine("static")
    for index in range(300):
        answer(engine, texts=("text",), prompt=f"{index}")
    held = len(engine._named_spaces)
    long = [answer(engine, texts=("text",), prompt=letter * 2000).space for letter in "xyx"]

    assert held <= 256
    assert len(engine._named_spaces) == held
    assert (long[0] == long[2], long[0] == long[1], "" in long) == (True, False, False)


def test_an_engine_refuses_before_it_reads_a_text(kit: Kit) -> None:
    engine = kit.engine("static")
    space = answer(engine, texts=("text",)).space

    assert answer(engine, texts=("text",), expect_space=space).space == space
    with pytest.raises(SpaceMismatch, match="with no prompt"):
        answer(engine, texts=("text",), expect_space=space, prompt="p" * 2000)
    with pytest.raises(SpaceMismatch, match="with no prompt"):
        answer(engine, texts=("text",), expect_space=space, prompt="p")


def test_a_piece_in_the_context_of_its_document_lies_in_a_space_of_its_own() -> None:
    plain = DenseOutput(dimensions=4, normalized=True, pre_norm=False)
    late = ContextualOutput(dimensions=4, normalized=True, pre_norm=False)

    assert late.space_form() != plain.space_form()
    assert late.space_form().width == 4
