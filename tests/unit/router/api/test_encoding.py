"""Tests the encoding of vectors: exact as float32, quantized as sentence-transformers does it."""

import asyncio
import base64
import json
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from litestar.response.base import ASGIResponse
from litestar.types import Message, Receive, Scope
from numpy.typing import NDArray

from engines.errors import InvalidValue
from engines.spec import Calibration, ModelSpec
from engines.types import Embeddings
from router.api.encoding import EncodedAnswer, OutputFormat, check_ranges, encode_answer
from router.quantization import quantize
from router.schemas.inference import EncodingFormat, OutputDtype

DTYPES: tuple[OutputDtype, ...] = ("int8", "uint8", "binary", "ubinary")


@pytest.fixture(scope="module")
def reference() -> Callable[..., Any]:
    """Return `quantize_embeddings`; its import takes seconds, so it is a fixture."""
    from sentence_transformers.util.quantization import quantize_embeddings

    found: Callable[..., Any] = quantize_embeddings
    return found


def matrix(rows: int, width: int, seed: int = 0) -> NDArray[np.float32]:
    drawn = np.random.default_rng(seed).standard_normal((rows, width)).astype(np.float32)
    found: NDArray[np.float32] = drawn / np.linalg.norm(drawn, axis=1, keepdims=True)
    return found


def embeddings(vectors: NDArray[np.float32]) -> Embeddings:
    rows, width = vectors.shape
    return Embeddings(vectors=vectors.astype("<f4").tobytes(), dimensions=width, token_counts=(3,) * rows)


def answer(vectors: NDArray[np.float32], encoding: EncodingFormat, dtype: OutputDtype = "float") -> dict[str, Any]:
    body = asyncio.run(encode_answer(embeddings(vectors), 'a "model"', OutputFormat(encoding=encoding, dtype=dtype)))
    found: dict[str, Any] = json.loads(body)
    return found


@pytest.mark.parametrize("encoding", ["float", "base64"])
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 5), (700, 100), (40, 1024), (300, 1024)])
def test_every_component_comes_back_exactly(encoding: EncodingFormat, rows: int, width: int) -> None:
    vectors = matrix(rows, width)
    found = answer(vectors, encoding)
    items = [item["embedding"] for item in found.pop("data")]
    back = (
        np.array(items, np.float32)
        if encoding == "float"
        else np.array([np.frombuffer(base64.b64decode(item), "<f4") for item in items])
    )

    assert np.array_equal(back, vectors)
    assert found == {
        "object": "list",
        "model": 'a "model"',
        "usage": {"prompt_tokens": 3 * rows, "total_tokens": 3 * rows},
    }


def test_items_are_numbered_across_pieces() -> None:
    found = answer(matrix(400, 300), "float")["data"]

    assert [item["index"] for item in found] == list(range(400))
    assert {item["object"] for item in found} == {"embedding"}
    assert all(len(item["embedding"]) == 300 for item in found)


@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
@settings(max_examples=200)
def test_any_float32_is_printed_so_that_it_reads_back(component: float) -> None:
    vectors = np.array([[component]], np.float32)
    (item,) = answer(vectors, "float")["data"]

    assert np.float32(item["embedding"][0]) == vectors[0, 0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(2, 8), (3, 13), (50, 384)])
def test_quantisation_is_that_of_sentence_transformers(
    reference: Callable[..., Any], dtype: OutputDtype, rows: int, width: int
) -> None:
    vectors = matrix(rows, width, seed=rows)
    vectors[:, 0] = 0.25  # a constant component has no range
    vectors[0, 1] = 0.0  # neither positive nor negative
    expected = reference(vectors, precision=dtype)
    found = quantize(vectors, dtype)

    assert found.dtype == expected.dtype
    assert np.array_equal(found, expected)


SPEC = ModelSpec(model_id="m", source="o/m")
CALIBRATED = ModelSpec(model_id="m", source="o/m", calibration=Calibration(lowest=(-0.5,), highest=(0.5,)))


@pytest.mark.parametrize("dtype", ["int8", "uint8"])
def test_one_vector_has_no_ranges(reference: Callable[..., Any], dtype: OutputDtype) -> None:
    with pytest.raises(InvalidValue, match="needs at least 2 inputs to compute ranges, got 1") as caught:
        check_ranges(SPEC, ("float", dtype), 1, None)
    with pytest.raises(ValueError, match="single embedding"):
        reference(matrix(1, 8), precision=dtype)

    assert caught.value.param == "output_dtype"


def test_ranges_are_asked_for_only_where_they_are_needed() -> None:
    for spec, dtypes, num_items in (
        (SPEC, ("float", "binary", None), 1),
        (SPEC, ("int8",), 2),
        (CALIBRATED, ("int8",), 1),
    ):
        check_ranges(spec, dtypes, num_items, None)
    check_ranges(CALIBRATED, ("int8",), 1, True)
    with pytest.raises(InvalidValue, match="calibration, which was made with normalize=true"):
        check_ranges(CALIBRATED, ("int8",), 2, False)


@pytest.mark.parametrize("dtype", ["int8", "uint8"])
@pytest.mark.parametrize("rows", [1, 50])
def test_calibrated_codes_are_those_of_sentence_transformers_ranges(
    reference: Callable[..., Any], dtype: OutputDtype, rows: int
) -> None:
    vectors, ranges = matrix(rows, 64), np.stack([np.full(64, -0.2), np.linspace(0.1, 0.3, 64)]).astype(np.float32)
    ranges[:, 3] = 0.1  # a constant component
    calibration = Calibration(lowest=tuple(map(float, ranges[0])), highest=tuple(map(float, ranges[1])))

    found = quantize(vectors, dtype, calibration)

    assert np.array_equal(found, reference(vectors, precision=dtype, ranges=ranges))
    assert (vectors > ranges[1]).any(), "what lies outside gets the code of the nearest end"


def test_one_number_is_the_range_of_every_component_at_any_width(reference: Callable[..., Any]) -> None:
    calibration = Calibration(lowest=(-0.5,), highest=(0.25,))
    for width in (8, 31):
        ranges = np.array([[-0.5] * width, [0.25] * width], np.float32)

        found = quantize(matrix(3, width), "int8", calibration)

        assert np.array_equal(found, reference(matrix(3, width), precision="int8", ranges=ranges))


def test_a_calibration_of_another_width_is_refused_with_both_numbers() -> None:
    calibration = Calibration(lowest=(-0.5,), highest=(0.5,) * 8)

    with pytest.raises(InvalidValue, match="has 8 components, the vectors have 4: omit dimensions"):
        quantize(matrix(3, 4), "uint8", calibration)
    assert quantize(matrix(3, 4), "ubinary", calibration).shape == (3, 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [2, 3000])
def test_base64_and_numbers_hold_the_same_codes(dtype: OutputDtype, rows: int) -> None:
    vectors = matrix(rows, 20)
    numbers = [item["embedding"] for item in answer(vectors, "float", dtype)["data"]]
    kind = np.uint8 if dtype.startswith("u") else np.int8
    codes = [
        np.frombuffer(base64.b64decode(item["embedding"]), kind).tolist()
        for item in answer(vectors, "base64", dtype)["data"]
    ]

    assert numbers == codes == quantize(vectors, dtype).tolist()


async def test_the_loop_goes_on_while_a_large_answer_is_written() -> None:
    large = embeddings(matrix(2048, 512))
    task = asyncio.create_task(encode_answer(large, "m", OutputFormat()))
    turns = 0
    while not task.done():
        await asyncio.sleep(0)
        turns += 1

    assert turns > 10


async def test_an_encoded_answer_is_sent_as_litestar_sends_it() -> None:
    body, headers = b'{"data":[]}', {"server-timing": "load;dur=0.1", "x-embed-truncated": "0,3"}

    async def messages(response: ASGIResponse) -> list[Message]:
        sent: list[Message] = []

        async def send(message: Message) -> None:
            sent.append(message)

        await response(cast(Scope, {}), cast(Receive, None), send)
        return sent

    assert await messages(EncodedAnswer(body, headers)) == await messages(ASGIResponse(body=body, headers=headers))
