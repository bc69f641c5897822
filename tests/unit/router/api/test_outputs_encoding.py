"""Tests the encoding of several outputs: numbers, base64, quantized vectors of tokens, and large answers."""

import asyncio
import base64
import json
import math
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from litestar.response.base import ASGIResponse
from numpy.typing import NDArray

from engines.errors import InvalidValue
from engines.spec import Calibration
from engines.types import Outputs
from router.api import outputs_encoding
from router.api.encoding import OutputFormat
from router.api.outputs_encoding import encode_outputs, encode_terms, encode_token_vectors, quantize_token_vectors
from router.quantization import quantize

FORMATS = ("float", "base64")


def made_outputs(
    dense: NDArray[np.float32] | None,
    terms: Sequence[tuple[NDArray[np.int32], NDArray[np.float32]]] | None,
    vectors: Sequence[NDArray[np.float32]] | None,
    count: int,
    names: dict[int, str] | None = None,
) -> Outputs:
    parts: list[Any] = [] if dense is None else [dense.astype("<f4")]
    parts += [entries.astype("<i4") for entries, _ in terms or ()]
    parts += [weights.astype("<f4") for _, weights in terms or ()]
    parts += [matrix.astype("<f4") for matrix in vectors or ()]
    return Outputs(
        body=b"".join(part.tobytes() for part in parts),
        dimensions=0 if dense is None else dense.shape[1],
        num_terms=tuple(len(entries) for entries, _ in terms or ()),
        num_vectors=tuple(map(len, vectors or ())),
        vector_width=vectors[0].shape[1] if vectors else 0,
        token_counts=(3,) * count,
        term_names=names or {},
    )


def unit_rows(seed: int, rows: int, width: int) -> NDArray[np.float32]:
    raw = np.random.default_rng(seed).standard_normal((rows, width))
    rows_of_length_1: NDArray[np.float32] = (raw / np.linalg.norm(raw, axis=1, keepdims=True)).astype("<f4")
    return rows_of_length_1


async def body_of(
    answer: Awaitable[ASGIResponse],
    on_chunk: Callable[[], None] = lambda: None,
    left: asyncio.Event | None = None,
) -> bytes:
    """What a client reads of an answer until it has `left`; `on_chunk` is called after each part."""
    parts: list[bytes] = []
    leaving = left or asyncio.Event()

    async def receive() -> Any:
        await leaving.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body":
            parts.append(message["body"])
            on_chunk()

    response: Any = await answer
    await response({}, receive, send)
    return b"".join(parts)


async def encoded_body(result: Outputs, output: OutputFormat, *, has_names: bool = False) -> bytes:
    return await body_of(encode_outputs(result, "m", output, {}, has_names=has_names))


def decoded(item: Any, dtype: str = "<f4") -> NDArray[Any]:
    return np.frombuffer(base64.b64decode(item["data"]), dtype).reshape(item["shape"])


def drawn(data: Any, *shape: int) -> NDArray[np.float32]:
    size = math.prod(shape)
    floats = st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=size, max_size=size)
    return np.array(data.draw(floats), "<f4").reshape(shape)


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=6),
    width=st.integers(1, 9),
    has=st.tuples(st.booleans(), st.booleans(), st.booleans()).filter(any),
    encoding=st.sampled_from(FORMATS),
    piece=st.sampled_from([3, 12, 2**15]),
    data=st.data(),
)
async def test_every_answer_reads_back_as_its_numbers(
    counts: list[tuple[int, int]], width: int, has: tuple[bool, bool, bool], encoding: Any, piece: int, data: Any
) -> None:
    """Whatever the counts of terms and tokens, and wherever the encoder's pieces end."""
    rows = len(counts)
    draw = partial(drawn, data)
    dense = draw(rows, width) if has[0] else None
    terms = [(np.arange(number, dtype="<i4") * 7, draw(number)) for number, _ in counts] if has[1] else None
    vectors = [draw(number, width) for _, number in counts] if has[2] else None
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(outputs_encoding, "_PIECE_NUMBERS", piece)
        patched.setattr(outputs_encoding, "_PIECE_BYTES", piece)
        body = await encoded_body(made_outputs(dense, terms, vectors, rows), OutputFormat(encoding=encoding))

    answer = json.loads(body)
    assert answer["usage"] == {"prompt_tokens": 3 * rows, "total_tokens": 3 * rows}
    assert [item["index"] for item in answer["data"]] == list(range(rows))
    for index, item in enumerate(answer["data"]):
        assert set(item) - {"object", "index"} == {
            name
            for name, is_there in zip(("embedding", "sparse_embedding", "multi_vector_embedding"), has, strict=True)
            if is_there
        }
        if dense is not None:
            raw = item["embedding"]
            found = np.frombuffer(base64.b64decode(raw), "<f4") if encoding == "base64" else np.array(raw, "<f4")
            assert found.tolist() == dense[index].tolist()
        if terms is not None:
            assert item["sparse_embedding"]["indices"] == terms[index][0].tolist()
            assert np.array(item["sparse_embedding"]["values"], "<f4").tolist() == terms[index][1].tolist()
        if vectors is not None:
            raw = item["multi_vector_embedding"]
            assert (decoded(raw) if encoding == "base64" else np.array(raw, "<f4")).tolist() == vectors[index].tolist()


async def test_base64_states_the_shape_of_the_array_even_where_it_is_empty() -> None:
    result = made_outputs(None, None, [unit_rows(1, 3, 5), np.zeros((0, 5), "<f4")], 2)
    items = json.loads(await encoded_body(result, OutputFormat(encoding="base64")))["data"]

    assert [item["multi_vector_embedding"]["shape"] for item in items] == [[3, 5], [0, 5]]
    assert items[1]["multi_vector_embedding"]["data"] == ""


@pytest.mark.parametrize(
    ("dtype", "numpy_type", "shape"),
    [("int8", "i1", [4, 12]), ("uint8", "u1", [4, 12]), ("binary", "i1", [4, 2]), ("ubinary", "u1", [4, 2])],
)
async def test_quantized_vectors_of_tokens_are_the_same_as_numbers_and_as_base64(
    dtype: Any, numpy_type: str, shape: list[int]
) -> None:
    result = made_outputs(None, None, [unit_rows(2, 4, 12)], 1)
    numbers, encoded = [
        json.loads(await encoded_body(result, OutputFormat(encoding=encoding, dtype=dtype)))["data"][0][
            "multi_vector_embedding"
        ]
        for encoding in ("float", "base64")
    ]

    assert encoded["shape"] == shape
    assert decoded(encoded, numpy_type).tolist() == numbers


def test_int8_vectors_of_tokens_can_be_compared_across_requests_and_give_their_maxsim() -> None:
    query, document = unit_rows(3, 8, 128), unit_rows(4, 30, 128)
    together = quantize_token_vectors(np.concatenate([query, document]), "int8")
    codes = [quantize_token_vectors(rows, "int8") for rows in (query, document)]
    values = [(code.astype(np.float32) + 128.5) / 127.5 - 1 for code in codes]

    assert (np.concatenate(codes) == together).all()
    for rows, found in zip((query, document), values, strict=True):
        assert np.abs(rows - found).max() <= 1 / 255 + 1e-6
    exact, approximate = [(q @ d.T).max(axis=1).sum() for q, d in ((query, document), values)]
    assert approximate == pytest.approx(exact, abs=0.05)


@pytest.mark.parametrize("dtype", ["int8", "uint8"])
def test_vectors_of_tokens_that_int8_would_clip_are_refused(dtype: Any) -> None:
    vectors = 3 * unit_rows(5, 2, 2)

    with pytest.raises(InvalidValue, match="length 1") as caught:
        quantize_token_vectors(vectors, dtype)

    assert caught.value.param == "output_dtype"
    assert (quantize_token_vectors(vectors, "binary") == quantize(vectors, "binary")).all()


async def test_a_calibration_is_that_of_dense_vectors_and_not_of_tokens() -> None:
    """The ranges of pooled vectors would clip vectors of tokens, whose components are larger."""
    calibration = Calibration(lowest=(-0.1,), highest=(0.1,))
    dense, vectors = unit_rows(6, 1, 8), unit_rows(7, 3, 8)
    output = OutputFormat(dtype="int8", calibration=calibration)
    item = json.loads(await encoded_body(made_outputs(dense, None, [vectors], 1), output))["data"][0]

    assert item["embedding"] == quantize(dense, "int8", calibration)[0].tolist()
    assert item["multi_vector_embedding"] == quantize_token_vectors(vectors, "int8").tolist()


async def test_terms_have_their_names_as_the_vocabulary_writes_them() -> None:
    terms = [(np.array([2, 9], "<i4"), np.array([0.5, 0.25], "<f4")), (np.array([], "<i4"), np.array([], "<f4"))]
    result = made_outputs(None, terms, None, 2, {2: '##"ing', 9: "▁的"})
    items = json.loads(await encoded_body(result, OutputFormat(), has_names=True))["data"]

    assert items[0]["sparse_embedding"] == {"indices": [2, 9], "values": [0.5, 0.25], "tokens": ['##"ing', "▁的"]}
    assert items[1]["sparse_embedding"] == {"indices": [], "values": [], "tokens": []}


async def test_the_shapes_of_text_embeddings_inference() -> None:
    terms = [(np.array([2, 9], "<i4"), np.array([0.5, 0.25], "<f4")), (np.array([], "<i4"), np.array([], "<f4"))]
    vectors = [unit_rows(8, 2, 3), unit_rows(9, 1, 3)]

    assert json.loads(await body_of(encode_terms(made_outputs(None, terms, None, 2), {}))) == [
        [{"index": 2, "value": 0.5}, {"index": 9, "value": 0.25}],
        [],
    ]
    found = json.loads(await body_of(encode_token_vectors(made_outputs(None, None, vectors, 2), {})))
    assert [np.array(rows, "<f4").tolist() for rows in found] == [rows.tolist() for rows in vectors]


@pytest.mark.parametrize(("rows", "on_a_thread"), [(4, False), (4000, True)])
async def test_large_answers_are_encoded_on_a_thread(
    rows: int, monkeypatch: pytest.MonkeyPatch, *, on_a_thread: bool
) -> None:
    threads: list[str] = []
    numbers = outputs_encoding._numbers

    def noted(array: Any) -> Iterator[bytes]:
        threads.append(threading.current_thread().name)
        return numbers(array)

    monkeypatch.setattr(outputs_encoding, "_numbers", noted)
    result = made_outputs(None, None, [unit_rows(10, rows, 16)], 1)
    await encoded_body(result, OutputFormat())
    await body_of(encode_token_vectors(result, {}))

    assert {name == "MainThread" for name in threads} == {not on_a_thread}


async def test_a_large_answer_is_encoded_as_the_client_reads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a server never holds the JSON of it, which is three times as large as the vectors."""
    monkeypatch.setattr(outputs_encoding, "_CHUNK_BYTES", 4096)
    begun: list[int] = []
    read: list[int] = []
    numbers = outputs_encoding._numbers

    def noted(array: Any) -> Iterator[bytes]:
        begun.append(len(read))
        return numbers(array)

    monkeypatch.setattr(outputs_encoding, "_numbers", noted)
    vectors = [unit_rows(seed, 20, 32) for seed in range(60)]
    body = await body_of(
        encode_outputs(made_outputs(None, None, vectors, 60), "m", OutputFormat(), {}), lambda: read.append(1)
    )

    assert begun == sorted(begun)
    assert begun[-1] > 50
    items = json.loads(body)["data"]
    assert [np.array(item["multi_vector_embedding"], "<f4").tolist() for item in items] == [v.tolist() for v in vectors]


async def test_nothing_more_is_encoded_for_a_client_that_has_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outputs_encoding, "_CHUNK_BYTES", 4096)
    result = made_outputs(None, None, [unit_rows(seed, 20, 32) for seed in range(60)], 60)
    whole = await body_of(encode_outputs(result, "m", OutputFormat(), {}))
    left = asyncio.Event()

    part = await body_of(encode_outputs(result, "m", OutputFormat(), {}), left.set, left)

    assert whole.startswith(part)
    assert len(part) < len(whole) / 4


async def test_what_cannot_be_encoded_is_refused_before_the_answer_begins() -> None:
    with pytest.raises(InvalidValue, match="int8 covers vectors of tokens of length 1"):
        await encode_outputs(
            made_outputs(None, None, [2 * unit_rows(1, 4000, 16)], 1), "m", OutputFormat(dtype="int8"), {}
        )
