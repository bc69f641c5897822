"""Pieces of documents over HTTP: Jina's `late_chunking` and Voyage's route."""

import base64
from typing import Any

import numpy as np
import pytest

from engines.errors import InvalidValue, TaskNotSupported
from engines.types import ContextualCall
from router.schemas.inference import MAX_INPUTS
from tests.testkit.backends import vector
from tests.testkit.contract import assert_envelope
from tests.testkit.servers import Served

DOCUMENTS = [["one", "three"], ["fifteen"]]


def _jina(served: Served, pieces: Any, **fields: Any) -> Any:
    return served.client.post("/v1/embeddings", json={"input": pieces, "late_chunking": True, **fields})


def _voyage(served: Served, documents: Any, **fields: Any) -> Any:
    return served.client.post("/v1/contextualizedembeddings", json={"inputs": documents, "model": "mini", **fields})


def _call_of(served: Served) -> ContextualCall:
    (call,) = served.backend.contextual_calls
    assert not served.backend.calls
    return call


def test_all_of_the_input_is_one_document(served: Served) -> None:
    answer = _jina(served, ["one", "three"], input_type="document", dimensions=4, normalize=False)
    call = _call_of(served)

    assert (call.texts, call.pieces, call.input_type) == (("one", "three"), (2,), "document")
    assert (call.dimensions, call.normalize) == (4, False)
    assert [row["embedding"] for row in answer.json()["data"]] == [
        pytest.approx(vector(text, 4), rel=1e-6) for text in ("one", "three")
    ]


def test_one_text_is_a_document_of_one_piece(served: Served) -> None:
    _jina(served, "one")

    assert _call_of(served).pieces == (1,)


@pytest.mark.parametrize("given", [False, None])
def test_without_late_chunking_inputs_are_independent(served: Served, given: bool | None) -> None:
    served.client.post("/v1/embeddings", json={"input": ["one"], "late_chunking": given})

    assert served.backend.calls and not served.backend.contextual_calls


def test_voyages_documents_are_answered_in_voyages_shape(served: Served) -> None:
    served.backend.truncated = (1,)
    answer = _voyage(served, DOCUMENTS, input_type="document", output_dimension=4)
    call, body = _call_of(served), answer.json()

    assert (call.texts, call.pieces) == (("one", "three", "fifteen"), (2, 1))
    assert (call.model_id, call.input_type, call.dimensions) == ("mini", "document", 4)
    assert body == {
        "object": "list",
        "data": [
            {
                "object": "list",
                "data": [
                    {"object": "embedding", "index": place, "embedding": pytest.approx(vector(piece, 4), rel=1e-6)}
                    for place, piece in enumerate(document)
                ],
                "index": index,
            }
            for index, document in enumerate(DOCUMENTS)
        ],
        "model": "mini",
        "usage": {"total_tokens": 15},
    }
    assert answer.headers["x-embed-truncated"] == "1"
    assert "forward;dur=30.5" in answer.headers["server-timing"]


@pytest.mark.parametrize("dtype", ["float", "int8", "ubinary"])
def test_voyages_client_reads_base64(served: Served, dtype: str) -> None:
    plain = _voyage(served, DOCUMENTS, output_dtype=dtype).json()["data"]
    coded = _voyage(served, DOCUMENTS, output_dtype=dtype, encoding_format="base64").json()["data"]
    kind = {"float": "<f4", "int8": "i1", "ubinary": "u1"}[dtype]

    for one, other in zip(plain, coded, strict=True):
        for row, text in zip(one["data"], other["data"], strict=True):
            assert np.frombuffer(base64.b64decode(text["embedding"]), kind).tolist() == pytest.approx(row["embedding"])


def test_a_large_answer_is_the_same(served: Served) -> None:
    documents = [[f"text {number}"] * 64 for number in range(32)]
    served.backend.delays_s = {}
    body = _voyage(served, documents, model="BAAI/bge-m3", output_dimension=64).json()

    assert [len(each["data"]) for each in body["data"]] == [64] * 32
    assert body["data"][31]["data"][63]["embedding"] == pytest.approx(vector("text 31", 64), rel=1e-6)


@pytest.mark.parametrize(
    ("inputs", "code", "message"),
    [
        ([], "empty_input", "inputs is empty"),
        ([["a"], []], "empty_input", "inputs[1] is empty"),
        ([["a"], ["b", ""]], "empty_input", "inputs[1][1] is empty"),
        ([["a"] * 1500] * 2, "too_many_inputs", f"inputs has 3000 pieces (maximum {MAX_INPUTS}"),
        (["a", "b"], "invalid_value", "inputs[0]"),
        ("a", "invalid_value", "inputs"),
    ],
)
def test_what_is_no_document_is_refused(served: Served, inputs: Any, code: str, message: str) -> None:
    answer = _voyage(served, inputs)

    assert_envelope(answer, 400, code, "inputs")
    assert message in answer.json()["error"]["message"]
    assert not served.backend.contextual_calls


def test_pieces_are_named_by_document_and_place(served: Served) -> None:
    served.backend.failures["mini"] = InvalidValue("input[2] has no token of its own", param="input")
    error = _voyage(served, DOCUMENTS).json()["error"]

    assert error["message"] == "inputs[1][0] has no token of its own"
    assert error["param"] == "inputs"


def test_a_model_that_pools_otherwise_answers_with_the_reason(served: Served) -> None:
    refusal = TaskNotSupported("mini cannot embed the pieces of a document together", param="late_chunking")
    served.backend.failures["mini"] = refusal

    assert _jina(served, ["one"]).json()["error"]["param"] == "late_chunking"
    served.backend.failures["mini"] = TaskNotSupported("mini cannot", param="late_chunking")
    assert _voyage(served, DOCUMENTS).json()["error"]["param"] == "model"
