"""Tests the output of scores: activations, caching, and calls that a model does not compute."""

import numpy as np
import pytest
import torch
from msgspec import structs

from engines.batching import scores as scores_module
from engines.batching.output import OutputDefaults, output_spec
from engines.batching.scores import ScoreOutput, activation_named, read_scored
from engines.errors import InvalidValue, TaskNotSupported, UnsupportedModel
from engines.spec import ModelSpec
from engines.types import EmbedCall, ModelInfo, ScoreCall, Timings
from tests.unit.engines.inputs.test_pairs import pairs

SPEC = ModelSpec(model_id="m", source="x")
LOGITS = torch.tensor([[0.5, -1.0], [2.0, 3.0]])
CALL = ScoreCall(model_id="m", texts=("t",))


def info(task: str = "classify", labels: tuple[str, ...] = ("no", "yes"), *, is_multi_label: bool = False) -> ModelInfo:
    return ModelInfo(
        dimensions=0, max_tokens=9, dtype="float32", attention="packed", task=task, labels=labels,  # type: ignore[arg-type]
        is_multi_label=is_multi_label,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("call", "model", "name"),
    [
        ("default", info(), "Tanh"),
        ("none", info(), "Identity"),
        ("probabilities", info(), "Softmax"),
        ("probabilities", info(is_multi_label=True), "Sigmoid"),
        ("probabilities", info("rerank", ("LABEL_0",)), "Sigmoid"),
    ],
)
def test_the_call_chooses_the_activation(call: str, model: ModelInfo, name: str) -> None:
    asked = ScoreCall(model_id="m", texts=("t",), activation=call)  # type: ignore[arg-type]  # parametrized

    output = output_spec(asked, model, OutputDefaults(activation="Tanh"))

    assert output == ScoreOutput(model.labels, name)


def test_rows_and_cached_rows_have_the_same_activation() -> None:
    output = ScoreOutput(("no", "yes"), "Softmax")

    rows = output.finish(LOGITS, [1]).rows
    cached = output.finish_cached(ScoreOutput.cache_rows(LOGITS).rows)

    assert np.allclose(np.asarray(rows)[0], torch.softmax(LOGITS, dim=1)[1].numpy())
    assert np.allclose(np.asarray(cached), torch.softmax(LOGITS, dim=1).numpy())


def test_a_result_names_its_labels() -> None:
    output = ScoreOutput(("no", "yes"), "Softmax")
    rows = output.allocate(1)
    rows[0] = 0.25, 0.75

    packed = output.pack(
        rows, token_counts=(3,), truncated=(), timings=Timings(), batches=(), deduplicated=0, cache_hits=0
    )

    assert (packed.labels, packed.num_labels, packed.array().tolist()) == (("no", "yes"), 2, [[0.25, 0.75]])


def test_a_row_that_is_not_finite_is_found() -> None:
    finished = ScoreOutput(("no", "yes"), "Identity").finish(torch.tensor([[1.0, 2.0], [float("nan"), 0.0]]), None)

    assert finished.is_finite.tolist() == [True, False]
    assert "score of input[1]" in str(ScoreOutput(("no", "yes"), "Identity").not_finite(1))


@pytest.mark.parametrize("name", ["Nonsense", "Linear", "functional"])
def test_an_activation_that_torch_does_not_have_is_refused(name: str) -> None:
    with pytest.raises(UnsupportedModel, match=name):
        activation_named(name)


def test_a_model_refuses_what_it_does_not_compute() -> None:
    with pytest.raises(TaskNotSupported, match="m can embed, not score"):
        output_spec(CALL, info("embed", ()), OutputDefaults())
    with pytest.raises(TaskNotSupported, match="m can rerank, not embed"):
        output_spec(EmbedCall(model_id="m", texts=("t",)), info("rerank", ("LABEL_0",)), OutputDefaults())


def test_queries_are_one_for_all_or_one_for_each() -> None:
    with pytest.raises(InvalidValue, match="2 queries for 3 texts"):
        read_scored(ScoreCall(model_id="m", queries=("a", "b"), texts=("c", "d", "e")), pairs(), SPEC)


def test_an_instruction_for_many_queries_is_bounded() -> None:
    many = tuple("q" * 9000)
    call = ScoreCall(model_id="m", queries=many, texts=many, instruction="i" * 2000)

    with pytest.raises(InvalidValue, match="instruction puts 18000000 characters") as error:
        read_scored(call, pairs(), SPEC)
    assert error.value.param == "instruction"


def test_a_long_query_for_many_documents_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """150 KB of request would be 1 GB of ids: 2,048 documents, and a query of 32,768 tokens."""
    monkeypatch.setattr(scores_module, "MAX_FRAME_CHARS", 100)
    many = ScoreCall(model_id="m", queries=("q" * 1000,), texts=tuple("t" * 6))

    with pytest.raises(InvalidValue, match="each of 6 documents, as up to 120 tokens") as error:
        read_scored(many, pairs(), SPEC)
    assert error.value.param == "query"
    assert read_scored(structs.replace(many, texts=tuple("t" * 5)), pairs(), SPEC)
    assert read_scored(structs.replace(many, queries=("q",), texts=tuple("t" * 25)), pairs(), SPEC)


@pytest.mark.parametrize(("asked", "kept"), [(None, "^qqqqqqqqq|tttttttt$"), ("end", "^qqqqqqqqqqqq|ttttt$")])
def test_the_reference_cuts_the_longer_and_a_named_side_the_document(asked: str | None, kept: str) -> None:
    call = ScoreCall(model_id="m", queries=("q" * 12,), texts=("t" * 12,), truncate=asked)  # type: ignore[arg-type]

    (ids,) = read_scored(call, pairs(), ModelSpec(model_id="m", source="x", truncate="end")).run_all().ids

    lengths = sum(ids & 0xFFFF == ord("q")), sum(ids & 0xFFFF == ord("t"))
    assert lengths == ((8, 9) if asked is None else (12, 5))
    assert len(kept) == len(ids)
