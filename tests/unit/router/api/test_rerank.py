"""Tests the rerank, score, classify and predict routes over sockets: their calls, their answers and their errors."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from engines.errors import ContextLengthExceeded, NonFiniteEmbedding
from engines.types import ScoreCall
from router.config.settings import Settings
from tests.testkit.contract import assert_envelope
from tests.testkit.score_servers import serve_rerankers
from tests.testkit.servers import Served, bearer, write_keys

DOCUMENTS = ["first", "second one", "third"]
RERANK = {"query": "which?", "documents": DOCUMENTS}
TEI = {"query": "which?", "texts": DOCUMENTS}
MAX_BODY_BYTES = 2**22


@pytest.fixture(scope="module")
def module_rerankers() -> Iterator[Served]:
    yield from serve_rerankers(Settings(max_body_bytes=MAX_BODY_BYTES))


@pytest.fixture
def served(module_rerankers: Served) -> Served:
    backend = module_rerankers.backend
    backend.failures.clear()
    backend.calls.clear()
    backend.score_calls.clear()
    backend.truncated, backend.num_labels = (), 1
    return module_rerankers


def ask(served: Served, path: str, body: Any, **fields: Any) -> httpx.Response:
    return served.client.post(path, json={**body, **fields})


def message_of(answer: httpx.Response) -> str:
    found: str = answer.json()["error"]["message"]
    return found


def call_of(served: Served) -> ScoreCall:
    (call,) = served.backend.score_calls
    return call


@pytest.mark.parametrize(("path", "version"), [("/v1/rerank", "1"), ("/v2/rerank", "2"), ("/rerank", "2")])
def test_documents_come_best_first_in_coheres_shape(served: Served, path: str, version: str) -> None:
    answer = ask(served, path, RERANK).json()

    assert answer.pop("id")
    assert answer == {
        "object": "list",
        "model": "ranker",
        "results": [
            {"index": 0, "relevance_score": 1.0},
            {"index": 1, "relevance_score": 0.5},
            {"index": 2, "relevance_score": 0.33333334},
        ],
        "usage": {"prompt_tokens": 20, "total_tokens": 20},
        "meta": {
            "api_version": {"version": version},
            "billed_units": {"search_units": 1},
            "tokens": {"input_tokens": 20, "output_tokens": 0},
        },
    }


def test_the_best_n_come_with_their_documents_when_asked_for(served: Served) -> None:
    documents = ["first", {"text": "second", "title": "ignored"}, "third"]
    answer = ask(served, "/v1/rerank", RERANK, documents=documents, top_n=2, return_documents=True).json()
    everything = ask(served, "/v1/rerank", RERANK, top_n=0).json()

    assert [result["document"] for result in answer["results"]] == [{"text": "first"}, {"text": "second"}]
    assert len(everything["results"]) == 3
    assert "document" not in everything["results"][0]


def test_a_rerank_request_is_translated(served: Served) -> None:
    ask(
        served, "/v1/rerank", RERANK, model="rerank-v3.5", max_tokens_per_doc=12, instruction="Judge.",
        raw_scores=True, truncate="start", keep_alive="1m", rank_fields=["text"], max_chunks_per_doc=10, priority=3,
    )  # fmt: skip
    call = call_of(served)

    assert (call.model_id, call.queries, call.texts) == ("ranker", ("which?",), tuple(DOCUMENTS))
    assert (call.max_text_tokens, call.instruction, call.truncate) == (12, "Judge.", "start")
    assert (call.activation, call.keep_alive_s) == ("none", 60.0)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, (None, None, "default")),
        ({"max_tokens_per_doc": 0, "truncate": None, "raw_scores": False}, (None, None, "default")),
        ({"truncate": True}, (None, "end", "default")),
        ({"truncate": False}, (None, "error", "default")),
    ],
    ids=str,
)
def test_what_is_not_given_is_the_models_own(served: Served, fields: dict[str, Any], expected: tuple[Any, ...]) -> None:
    ask(served, "/v1/rerank", RERANK, **fields)
    call = call_of(served)

    assert (call.max_text_tokens, call.truncate, call.activation) == expected


def test_teis_body_on_the_same_path_gets_teis_answer(served: Served) -> None:
    served.backend.truncated = (0, 1, 2)
    plain = ask(served, "/rerank", TEI)
    texts = ask(served, "/rerank", TEI, return_text=True).json()

    assert plain.json() == [
        {"index": 0, "score": 1.0}, {"index": 1, "score": 0.5}, {"index": 2, "score": 0.33333334},
    ]  # fmt: skip
    assert [rank["text"] for rank in texts] == DOCUMENTS
    assert plain.headers["x-embed-truncated"] == "0-2"
    assert plain.headers["content-type"].startswith("application/json")
    assert "forward;dur=30.5" in plain.headers["server-timing"]


@pytest.mark.parametrize(
    ("fields", "truncate", "activation"),
    [
        ({}, None, "probabilities"),
        ({"raw_scores": True, "truncate": True, "truncation_direction": "left"}, "start", "none"),
        ({"truncation_direction": "Right"}, "end", "probabilities"),
        ({"truncate": False}, "error", "probabilities"),
    ],
    ids=str,
)
def test_teis_options_mean_what_tei_means(
    served: Served, fields: dict[str, Any], truncate: str | None, activation: str
) -> None:
    ask(served, "/rerank", TEI, **fields)

    assert (call_of(served).truncate, call_of(served).activation) == (truncate, activation)


@pytest.mark.parametrize(("path", "fields"), [("/rerank", {"raw_scores": False}), ("/infinity/rerank", {})], ids=str)
def test_a_request_of_infinity_gets_its_documents_as_strings(
    served: Served, path: str, fields: dict[str, object]
) -> None:
    answer = ask(served, path, RERANK, top_n=2, return_documents=True, **fields).json()

    assert answer.pop("id")
    assert answer.pop("created") > 0
    assert answer == {
        "object": "rerank",
        "model": "ranker",
        "results": [
            {"index": 0, "relevance_score": 1.0, "document": "first"},
            {"index": 1, "relevance_score": 0.5, "document": "second one"},
        ],
        "usage": {"prompt_tokens": 20, "total_tokens": 20},
    }
    assert call_of(served).activation == "default"


def test_ragflow_writes_true_as_a_string(served: Served) -> None:
    shown = ask(served, "/v1/rerank", RERANK, return_documents="true", return_len="true").json()["results"]
    hidden = ask(served, "/v1/rerank", RERANK, return_documents="false").json()["results"]

    assert [result["document"]["text"] for result in shown] == DOCUMENTS
    assert all("document" not in result for result in hidden)


@pytest.mark.parametrize("path", ["/v1/score", "/score"])
def test_scores_of_pairs_come_in_input_order(served: Served, path: str) -> None:
    answer = ask(served, path, {"text_1": "q", "text_2": ["a", "b"]}).json()

    assert answer["id"].startswith("score-")
    assert (answer["object"], answer["created"] > 0, answer["model"]) == ("list", True, "ranker")
    assert answer["data"] == [
        {"index": 0, "object": "score", "score": 1.0}, {"index": 1, "object": "score", "score": 0.5},
    ]  # fmt: skip
    assert answer["usage"] == {"prompt_tokens": 2, "total_tokens": 2}


@pytest.mark.parametrize(
    ("text_1", "text_2", "queries", "texts"),
    [
        ("q", "a", ("q",), ("a",)),
        ("q", ["a", "b"], ("q",), ("a", "b")),
        (["q"], ["a", "b"], ("q",), ("a", "b")),
        (["q", "r"], ["a", "b"], ("q", "r"), ("a", "b")),
    ],
)
def test_pairs_are_one_with_many_or_item_by_item(
    served: Served, text_1: Any, text_2: Any, queries: Any, texts: Any
) -> None:
    assert ask(served, "/score", {"text_1": text_1, "text_2": text_2}, use_activation=False).status_code == 200
    assert (call_of(served).queries, call_of(served).texts) == (queries, texts)
    assert call_of(served).activation == "none"


def test_two_lists_of_different_lengths_are_refused(served: Served) -> None:
    answer = ask(served, "/v1/score", {"text_1": ["a", "b"], "text_2": ["a", "b", "c"]})

    assert_envelope(answer, 400, "invalid_value", "text_1")
    assert "text_1 has 2 texts and text_2 has 3" in message_of(answer)


@pytest.mark.parametrize("path", ["/v1/classify", "/classify"])
def test_labels_come_with_their_probabilities_in_vllms_shape(served: Served, path: str) -> None:
    served.backend.num_labels = 3
    answer = ask(served, path, {"model": "labeler", "input": ["a", "b"]}).json()

    assert answer["data"][0] == {"index": 0, "label": "LABEL_0", "probs": [1.0, 0.25, 0.25], "num_classes": 3}
    assert (answer["object"], answer["model"], answer["data"][1]["index"]) == ("list", "labeler", 1)
    assert (call_of(served).queries, call_of(served).activation) == ((), "probabilities")


def test_a_request_of_infinity_gets_all_labels_best_first(served: Served) -> None:
    served.backend.num_labels = 2
    body = {"model": "labeler", "input": ["a", "b", "c", "d", "e"], "raw_scores": False}
    answer = ask(served, "/classify", body).json()

    assert answer["object"] == "classify"
    assert answer["data"][0] == [{"score": 1.0, "label": "LABEL_0"}, {"score": 0.25, "label": "LABEL_1"}]
    assert answer["data"][4] == [{"score": 0.25, "label": "LABEL_1"}, {"score": pytest.approx(0.2), "label": "LABEL_0"}]


@pytest.mark.parametrize(
    ("inputs", "queries", "texts", "is_list"),
    [
        ("a", (), ("a",), False),
        (["a"], (), ("a",), False),
        (["a", "b"], ("a",), ("b",), False),
        ([["a"], ["b"]], (), ("a", "b"), True),
        ([["a", "b"]], ("a",), ("b",), True),
        ([["a", "b"], ["c", "d"]], ("a", "c"), ("b", "d"), True),
    ],
    ids=str,
)
def test_predict_takes_teis_three_forms(served: Served, inputs: Any, queries: Any, texts: Any, is_list: bool) -> None:
    served.backend.num_labels = 2
    answer = ask(served, "/predict", {"inputs": inputs, "model": "labeler"}).json()
    first = answer[0] if is_list else answer

    assert (call_of(served).queries, call_of(served).texts) == (queries, texts)
    assert first == [{"score": 1.0, "label": "LABEL_0"}, {"score": 0.25, "label": "LABEL_1"}]
    assert not is_list or len(answer) == len(texts)


HUGE = "x" * 70_000

BAD: list[tuple[str, str, Any, str, str | None]] = [
    ("no documents", "/v1/rerank", {"query": "q"}, "invalid_value", "documents"),
    ("neither documents nor texts", "/rerank", {"query": "q"}, "invalid_value", "documents"),
    ("documents and texts", "/rerank", RERANK | {"texts": ["a"]}, "invalid_value", "texts"),
    ("no query", "/v1/rerank", {"documents": ["a"]}, "invalid_value", "query"),
    ("an empty query", "/v1/rerank", RERANK | {"query": ""}, "empty_input", "query"),
    ("a list as query", "/v1/rerank", RERANK | {"query": ["q"]}, "invalid_value", "query"),
    ("an empty list", "/v1/rerank", RERANK | {"documents": []}, "empty_input", "documents"),
    ("an empty document", "/v2/rerank", RERANK | {"documents": ["a", ""]}, "empty_input", "documents"),
    ("an object with an empty text", "/rerank", RERANK | {"documents": [{"text": ""}]}, "empty_input", "documents"),
    ("a text for a list", "/v1/rerank", RERANK | {"documents": "a"}, "invalid_value", "documents"),
    ("numbers", "/v1/rerank", RERANK | {"documents": [1]}, "invalid_value", "documents"),
    ("null among documents", "/v1/rerank", RERANK | {"documents": ["a", None]}, "invalid_value", "documents"),
    ("an object without text", "/v1/rerank", RERANK | {"documents": [{"title": "a"}]}, "invalid_value", "documents"),
    ("an object with a number", "/v1/rerank", RERANK | {"documents": [{"text": 1}]}, "invalid_value", "documents"),
    ("2,049 documents", "/v1/rerank", RERANK | {"documents": ["a"] * 2049}, "too_many_inputs", "documents"),
    ("2,049 long ones", "/v1/rerank", RERANK | {"documents": ["a" * 99] * 2049}, "too_many_inputs", "documents"),
    ("a late fault in much", "/rerank", RERANK | {"documents": [HUGE, {"text": 5}]}, "invalid_value", "documents"),
    ("an empty one in much", "/v1/rerank", RERANK | {"documents": [HUGE, ""]}, "empty_input", "documents"),
    ("top_n as text", "/v1/rerank", RERANK | {"top_n": "3"}, "invalid_value", "top_n"),
    ("negative top_n", "/v1/rerank", RERANK | {"top_n": -1}, "invalid_value", "top_n"),
    ("top_n beyond 32 bits", "/v1/rerank", RERANK | {"top_n": 2**40}, "invalid_value", "top_n"),
    ("top_n beyond 64 bits", "/v1/rerank", RERANK | {"top_n": 2**80}, "invalid_value", "top_n"),
    (
        "return_documents as text",
        "/v1/rerank",
        RERANK | {"return_documents": "yes"},
        "invalid_value",
        "return_documents",
    ),
    ("an unknown truncation", "/v1/rerank", RERANK | {"truncate": "middle"}, "invalid_value", "truncate"),
    ("other fields to rank", "/v1/rerank", RERANK | {"rank_fields": ["title"]}, "invalid_value", "rank_fields"),
    ("a bad keep_alive", "/v1/rerank", RERANK | {"keep_alive": "soon"}, "invalid_value", "keep_alive"),
    ("an array", "/v1/rerank", [], "invalid_value", None),
    ("TEI: no texts", "/rerank", TEI | {"texts": []}, "empty_input", "texts"),
    ("TEI: objects", "/rerank", TEI | {"texts": [{"text": "a"}]}, "invalid_value", "texts"),
    ("TEI: a huge object", "/rerank", TEI | {"texts": [HUGE, {"text": "a"}]}, "invalid_value", "texts"),
    ("TEI: an empty text", "/rerank", TEI | {"texts": ["a", ""]}, "empty_input", "texts"),
    ("TEI: 2,049 texts", "/rerank", TEI | {"texts": ["a"] * 2049}, "too_many_inputs", "texts"),
    ("TEI: a word for truncate", "/rerank", TEI | {"truncate": "end"}, "invalid_value", "truncate"),
    ("score: no text_2", "/v1/score", {"text_1": "a"}, "invalid_value", "text_2"),
    ("score: an empty text", "/v1/score", {"text_1": "", "text_2": "a"}, "empty_input", "text_1"),
    ("score: an empty list", "/v1/score", {"text_1": "a", "text_2": []}, "empty_input", "text_2"),
    ("score: objects", "/v1/score", {"text_1": "a", "text_2": [{"text": "a"}]}, "invalid_value", "text_2"),
    ("score: 2,049 texts", "/v1/score", {"text_1": "a", "text_2": ["b"] * 2049}, "too_many_inputs", "text_2"),
    ("classify: no input", "/v1/classify", {}, "invalid_value", "input"),
    ("classify: a pair", "/v1/classify", {"input": [["a", "b"]]}, "invalid_value", "input"),
    ("classify: an empty text", "/v1/classify", {"input": ["a", ""]}, "empty_input", "input"),
    ("predict: three texts", "/predict", {"inputs": ["a", "b", "c"]}, "invalid_value", "inputs"),
    ("predict: three in a pair", "/predict", {"inputs": [["a", "b", "c"]]}, "invalid_value", "inputs"),
    ("predict: an empty pair", "/predict", {"inputs": [[]]}, "invalid_value", "inputs"),
    ("predict: an empty text", "/predict", {"inputs": [["a", ""]]}, "empty_input", "inputs"),
    ("predict: an empty list", "/predict", {"inputs": []}, "empty_input", "inputs"),
    ("predict: texts and pairs", "/predict", {"inputs": [["a"], ["a", "b"]]}, "invalid_value", "inputs"),
    ("predict: texts and lists", "/predict", {"inputs": ["a", ["a", "b"]]}, "invalid_value", "inputs"),
    ("predict: 2,049 lists", "/predict", {"inputs": [["a"]] * 2049}, "too_many_inputs", "inputs"),
]


@pytest.mark.parametrize(("path", "body", "code", "param"), [row[1:] for row in BAD], ids=[row[0] for row in BAD])
def test_a_bad_body_is_refused_before_any_work(
    served: Served, path: str, body: Any, code: str, param: str | None
) -> None:
    answer = served.client.post(path, content=json.dumps(body))

    assert_envelope(answer, 400, code, param)
    assert (served.backend.score_calls, served.backend.calls) == ([], [])


def test_a_body_over_the_limit_is_refused(served: Served) -> None:
    answer = ask(served, "/v1/rerank", RERANK, query="x" * MAX_BODY_BYTES)

    assert_envelope(answer, 413, "body_too_large", None)


def test_the_most_documents_with_long_texts_are_answered_whole(served: Served) -> None:
    documents = [f"{index} " + "x" * 500 for index in range(2048)]
    answer = ask(served, "/v1/rerank", RERANK, documents=documents, return_documents=True).json()

    assert [result["index"] for result in answer["results"]] == list(range(2048))
    assert [result["document"]["text"] for result in answer["results"]] == documents


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/rerank", RERANK, "documents"),
        ("/rerank", TEI, "texts"),
        ("/v1/score", {"text_1": "a", "text_2": "b"}, "text_2"),
        ("/predict", {"inputs": ["a", "b"]}, "inputs"),
        ("/v1/classify", {"input": "a", "model": "labeler"}, "input"),
    ],
)
def test_an_error_of_the_model_names_the_field_of_the_route(served: Served, path: str, body: Any, param: str) -> None:
    for model in ("ranker", "labeler"):
        served.backend.failures[model] = ContextLengthExceeded(
            'documents[0] has 50 tokens: shorten it, or send "truncate": "end"', param="documents"
        )
    answer = ask(served, path, body)
    truncation = "true" if param in ("texts", "inputs") else '"end"'

    assert_envelope(answer, 400, "context_length_exceeded", param)
    assert message_of(answer) == f'{param}[0] has 50 tokens: shorten it, or send "truncate": {truncation}'


def test_a_score_that_is_not_finite_is_no_answer(served: Served) -> None:
    served.backend.failures["ranker"] = NonFiniteEmbedding("the score of text 1 is not finite", index=1)

    assert_envelope(ask(served, "/v1/rerank", RERANK), 500, "non_finite_embedding", None)


def test_a_reranker_is_not_asked_to_embed_and_the_refusal_says_what_it_can(served: Served) -> None:
    for path, body in (("/v1/embeddings", {"input": "a"}), ("/embed", {"inputs": "a"})):
        answer = ask(served, path, body, model="ranker")

        assert_envelope(answer, 400, "task_not_supported", "model")
        assert message_of(answer) == "ranker cannot embed: it can rerank (POST /v1/rerank, /v1/score)"
    assert served.backend.calls == []


@pytest.mark.parametrize(
    ("path", "body", "model"),
    [
        ("/v1/rerank", RERANK, "labeler"),
        ("/rerank", TEI, "labeler"),
        ("/rerank", TEI, "embedder"),
        ("/v1/score", {"text_1": "a", "text_2": "b"}, "labeler"),
        ("/v1/classify", {"input": "a"}, "ranker"),
        ("/v1/classify", {"input": "a"}, "embedder"),
        ("/predict", {"inputs": "a"}, "embedder"),
    ],
)
def test_a_model_of_another_task_is_not_loaded(served: Served, path: str, body: Any, model: str) -> None:
    assert_envelope(ask(served, path, body, model=model), 400, "task_not_supported", "model")
    assert (served.backend.score_calls, served.backend.calls) == ([], [])


def test_a_model_with_several_labels_is_no_reranker(served: Served) -> None:
    served.backend.num_labels = 3

    answer = ask(served, "/v1/rerank", RERANK)

    assert_envelope(answer, 400, "task_not_supported", "model")
    assert "it has 3 labels" in message_of(answer)


def test_unknown_models_are_not_found(served: Served) -> None:
    assert_envelope(ask(served, "/v1/rerank", RERANK, model="rankr"), 404, "model_not_found", None)


def test_keys_and_their_models_are_checked_as_for_vectors(tmp_path: Path) -> None:
    keys = {"few": {"scopes": ["embed"], "models": ["labeler"]}, "all": {"scopes": ["embed"]}}
    for served in serve_rerankers(Settings(keys_file=write_keys(tmp_path / "keys.yaml", keys))):
        nobody = ask(served, "/v1/rerank", RERANK)
        other = served.client.post("/v1/rerank", json=RERANK, headers=bearer("few"))
        keeping = served.client.post("/v1/rerank", json={**RERANK, "keep_alive": 0}, headers=bearer("all"))
        calls = list(served.backend.score_calls)
        allowed = served.client.post("/rerank", json=TEI, headers=bearer("all"))

        assert_envelope(nobody, 401, "invalid_api_key", None)
        assert_envelope(other, 403, "model_not_allowed", None)
        assert_envelope(keeping, 403, "insufficient_scope", None)
        assert calls == []
        assert allowed.status_code == 200
        assert [call.caller for call in served.backend.score_calls] == ["all"]
