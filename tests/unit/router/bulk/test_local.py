"""Embedding on hosts in this process, with fake engines: the vectors of the server, and refusals of single texts."""

from collections.abc import Sequence

import numpy as np
import pytest
from msgspec import structs

from engines.errors import Busy, InvalidValue, NonFiniteEmbedding, QueueFull, UnsupportedModel
from engines.host import Host, HostConfig
from engines.spec import Calibration, ModelSpec, Output
from engines.testing.engine import WIDTH, fake_vector
from engines.testing.fakes import WORKSPACE_BYTES, FakeFiles, FakeLoader, InlineWorkers, fake_runtime
from engines.types import Budget
from router.bulk.local import LocalEmbedder, check_ranges
from router.bulk.records import BulkError, EmbedOptions, VectorWidths, WindowAnswer
from router.errors import TABLE
from router.quantization import quantize
from tests.testkit.servers import fake_server

SPEC = ModelSpec(model_id="mini", source="fake/mini", max_tokens=5)
TEXTS = ["a b", "one two three four five", "c"]


def embedder(options: EmbedOptions, spec: ModelSpec = SPEC, loader: FakeLoader | None = None) -> LocalEmbedder:
    config = HostConfig(host_id="cpu", budget=Budget(size_bytes=10**6), workspace_bytes=WORKSPACE_BYTES)
    runtime = structs.replace(fake_runtime(), workers=InlineWorkers())
    host = Host(config, {spec.model_id: spec}, FakeFiles(), loader or FakeLoader(), runtime)
    return LocalEmbedder([host], spec, options)


async def embed_texts(*outcomes: Exception | None) -> WindowAnswer:
    """Embeds the texts; the outcomes are those of the model's calls, of which the first is the probe."""
    here = embedder(EmbedOptions(), loader=FakeLoader(embed_failures={"mini": outcomes}))
    await here.open()
    found = await here.embed(TEXTS)
    await here.close()
    return found


def assert_vectors(found: WindowAnswer, texts: Sequence[str]) -> None:
    """Asserts that these texts were embedded, and no others."""
    assert found.vectors.dense is not None
    assert np.array_equal(found.vectors.dense, np.stack([fake_vector("mini", text) for text in texts]))


async def test_vectors_are_those_of_the_server_bit_by_bit() -> None:
    here = embedder(EmbedOptions())
    widths, model = await here.open()
    found = await here.embed(TEXTS)
    await here.close()
    async with fake_server() as server:
        data = (await server.client.post("/v1/embeddings", json={"model": "mini", "input": TEXTS})).json()["data"]

    assert found.vectors.dense is not None
    assert np.array_equal(found.vectors.dense, np.array([item["embedding"] for item in data], np.float32))
    assert widths == VectorWidths(dense=WIDTH)
    assert model["id"] == "mini"
    assert found.refusals == {}  # too long ones are cut, as the server does


async def test_too_long_texts_are_refused_alone() -> None:
    here = embedder(EmbedOptions(truncate="error"))
    await here.open()
    found = await here.embed(TEXTS)
    await here.close()

    assert {index: refusal.code for index, refusal in found.refusals.items()} == {1: "context_length_exceeded"}
    assert "more than 5 tokens" in found.refusals[1].message
    assert_vectors(found, [TEXTS[0], TEXTS[2]])


async def test_binary_vectors_are_those_of_output_dtype() -> None:
    here = embedder(EmbedOptions(dtype="binary"))
    widths, _ = await here.open()
    found = await here.embed(TEXTS)
    await here.close()
    expected = quantize(np.stack([fake_vector("mini", text) for text in TEXTS]), "binary")

    assert found.vectors.dense is not None
    assert np.array_equal(found.vectors.dense, expected)
    assert widths.dense == WIDTH // 8


async def test_a_text_whose_vector_is_not_finite_is_refused_and_the_others_run_again() -> None:
    found = await embed_texts(None, NonFiniteEmbedding("nan", index=1), QueueFull("full", retry_after_s=0.0))

    assert {index: refusal.code for index, refusal in found.refusals.items()} == {1: "non_finite_embedding"}
    assert_vectors(found, [TEXTS[0], TEXTS[2]])


async def test_a_text_that_the_tokenizer_cannot_read_is_refused_and_the_others_run_again_in_one_call() -> None:
    refusal = InvalidValue("input[0] has no tokens: leave it out", param="input")
    calls = (None, refusal, None, refusal, refusal, None)  # the probe, all, the first, the others, each of these alone
    found = await embed_texts(*calls)

    assert {index: refusal.code for index, refusal in found.refusals.items()} == {1: "invalid_value"}
    assert found.refusals[1].message == "the text has no tokens: leave it out"
    assert_vectors(found, [TEXTS[0], TEXTS[2]])


async def test_a_window_that_is_refused_only_as_a_whole_runs_in_halves() -> None:
    refusal = InvalidValue("the outputs of 2 inputs may take 300 MiB", param="input")
    # the probe; all, of which one is not finite; the others, each of these alone, and each again for its vectors
    calls = (None, NonFiniteEmbedding("nan", index=1), refusal, None, None, None, None)
    found = await embed_texts(*calls)

    assert {index: refusal.code for index, refusal in found.refusals.items()} == {1: "non_finite_embedding"}
    assert_vectors(found, [TEXTS[0], TEXTS[2]])


async def test_a_window_whose_half_is_also_refused_only_as_a_whole_ends() -> None:
    refusal = InvalidValue("the outputs of 3 inputs may take 300 MiB", param="input")
    found = await embed_texts(None, refusal, None, refusal, *[None] * 6)

    assert found.refusals == {}
    assert_vectors(found, TEXTS)


async def test_options_that_no_text_can_have_end_the_job_at_once() -> None:
    failures = {"mini": (InvalidValue("input[0] has 4 tokens, and the first 4 are its prompt", param="input"),) * 9}
    here = embedder(EmbedOptions(prompt="long"), loader=FakeLoader(embed_failures=failures))
    with pytest.raises(BulkError, match="the text has 4 tokens"):
        await here.open()
    await here.close()


async def test_a_model_that_cannot_be_loaded_ends_the_job_at_once() -> None:
    here = embedder(EmbedOptions(), loader=FakeLoader(failures={"mini": (UnsupportedModel("a head it lacks"),) * 9}))
    with pytest.raises(BulkError, match="a head it lacks"):
        await here.open()
    await here.close()


def test_int8_without_calibration_is_refused_as_each_window_would_have_its_own_ranges() -> None:
    calibrated = structs.replace(SPEC, calibration=Calibration(lowest=(-0.5,), highest=(0.5,)))
    check_ranges(calibrated, EmbedOptions(dtype="int8"))
    with pytest.raises(BulkError, match="needs a calibration of mini"):
        check_ranges(SPEC, EmbedOptions(dtype="int8"))
    outputs: tuple[Output, ...] = ("multi_vector",)
    with pytest.raises(BulkError, match="is for dense vectors"):
        check_ranges(calibrated, EmbedOptions(dtype="int8", outputs=outputs))


def test_codes_in_the_errors_file_are_those_of_the_table() -> None:
    from engines import errors

    assert TABLE[errors.ContextLengthExceeded].code == "context_length_exceeded"
    assert TABLE[NonFiniteEmbedding].code == "non_finite_embedding"
    assert issubclass(errors.QueueFull, Busy)
