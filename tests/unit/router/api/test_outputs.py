"""Tests `outputs` on /v1/embeddings, TEI's routes for sparse outputs and vectors of tokens, and their refusals."""

import asyncio
from typing import Any

import httpx
import numpy as np
import pytest

from engines.errors import OutOfMemory, TaskNotSupported
from engines.models.outputs import MAX_TERMS
from engines.testing.engine import fake_vector
from engines.testing.outputs import fake_names, fake_row
from engines.types import MAX_ANSWER_BYTES, ModelInfo, OutputsCall
from router.api.outputs import MOST_TERMS, largest_answer_bytes
from router.config.settings import Settings
from router.limits import limiter
from router.limits.answer_memory import AnswerMemory
from tests.testkit.contract import assert_envelope
from tests.testkit.output_servers import output_server
from tests.testkit.servers import EMBED, FakeServer, Served, bearer, limited, write_keys

TEXTS = ["a cat and a dog", "one more"]
ALL = ["dense", "sparse", "multi_vector"]


async def embed(server: FakeServer, model: str, outputs: list[str] | None, **fields: Any) -> httpx.Response:
    named = {} if outputs is None else {"outputs": outputs}
    return await server.client.post(EMBED, json={"input": TEXTS, "model": model, **named, **fields})


async def test_all_outputs_come_in_one_answer_and_are_those_of_a_call_for_each() -> None:
    async with output_server() as server:
        together = (await embed(server, "bge-m3", ALL)).json()
        alone = [(await embed(server, "bge-m3", [output])).json()["data"] for output in ALL]
        runs = server.loader.engines[0]._attempts.counts["bge-m3"]

    for index, (item, *parts) in enumerate(zip(together["data"], *alone, strict=True)):
        row = fake_row(TEXTS[index])
        assert item == parts[0] | parts[1] | parts[2]
        assert item["embedding"] == pytest.approx(fake_vector("bge-m3", TEXTS[index]).tolist())
        assert item["sparse_embedding"]["indices"] == row.entries.tolist()
        assert item["sparse_embedding"]["values"] == row.weights.tolist()
        assert item["multi_vector_embedding"] == pytest.approx(row.vectors)
    assert together["usage"]["prompt_tokens"] == 7 + 4
    assert together["model"] == "bge-m3"
    assert runs == 1 + len(ALL)


@pytest.mark.parametrize(
    ("model", "fields"),
    [("splade", {"sparse_embedding"}), ("colbert", {"multi_vector_embedding"}), ("bge-m3", {"embedding"})],
)
async def test_without_outputs_a_model_gives_dense_vectors_or_what_it_has(model: str, fields: set[str]) -> None:
    async with output_server() as server:
        cold = await embed(server, model, None)
        warm = await embed(server, model, None)

    assert cold.json() == warm.json()
    assert set(cold.json()["data"][0]) - {"object", "index"} == fields
    assert cold.headers["openai-version"]
    assert "forward" in cold.headers["server-timing"]


async def test_terms_are_chosen_and_named_as_the_request_says() -> None:
    async with output_server() as server:
        answer = await embed(server, "splade", ["sparse"], sparse_top_k=3, sparse_min_weight=2, return_tokens=True)

    names = {name: entry for entry, name in fake_names(TEXTS[0]).items()}
    first, second = [item["sparse_embedding"] for item in answer.json()["data"]]
    assert first == {"indices": [names["a"]], "values": [2.0], "tokens": ["a"]}
    assert second == {"indices": [], "values": [], "tokens": []}


def test_every_field_reaches_the_engine(served: Served) -> None:
    fields = {"sparse_top_k": 65_536, "sparse_min_weight": 0.25, "pool_factor": 2, "return_tokens": True,
              "input_type": "query", "truncate": "start", "truncate_prompt_tokens": 9, "dimensions": 4,
              "normalize": False, "keep_alive": 5}  # fmt: skip
    answer = served.client.post(EMBED, json={"input": TEXTS, "outputs": ALL, **fields})

    assert answer.status_code == 200
    assert served.backend.outputs_calls == [
        OutputsCall(
            model_id="mini", texts=tuple(TEXTS), outputs=("dense", "sparse", "multi_vector"), sparse_top_k=65_536,
            sparse_min_weight=0.25, pool_factor=2, names_terms=True, input_type="query", truncate="start",
            max_tokens=9, dimensions=4, normalize=False, keep_alive_s=5.0,
        )
    ]  # fmt: skip
    assert served.backend.calls == []


def test_dense_vectors_alone_take_the_path_of_a_request_without_outputs(served: Served) -> None:
    answers = [served.client.post(EMBED, json={"input": "a", **more}).json() for more in ({}, {"outputs": ["dense"]})]

    assert answers[0] == answers[1]
    assert len(served.backend.calls) == 2


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"outputs": []}, "invalid_value", "outputs"),
        ({"outputs": ["dense", "sparse", "dense"]}, "invalid_value", "outputs"),
        ({"outputs": ALL + ALL}, "invalid_value", "outputs"),
        ({"outputs": ["tokens"]}, "invalid_value", "outputs"),
        ({"outputs": "sparse"}, "invalid_value", "outputs"),
        ({"outputs": ALL, "late_chunking": True}, "invalid_value", "late_chunking"),
        ({"outputs": ALL, "sparse_top_k": 0}, "invalid_value", "sparse_top_k"),
        ({"outputs": ALL, "sparse_top_k": 65_537}, "invalid_value", "sparse_top_k"),
        ({"outputs": ALL, "sparse_min_weight": -0.1}, "invalid_value", "sparse_min_weight"),
        ({"outputs": ALL, "pool_factor": 0}, "invalid_value", "pool_factor"),
        ({"outputs": ALL, "pool_factor": 17}, "invalid_value", "pool_factor"),
        ({"outputs": ALL, "return_tokens": "yes"}, "invalid_value", "return_tokens"),
        ({"outputs": ["sparse"], "dimensions": 4}, "dimensions_not_supported", "dimensions"),
        ({"outputs": ALL, "output_dtype": "int8", "input": "one"}, "invalid_value", "output_dtype"),
        ({"outputs": ALL, "input": []}, "empty_input", "input"),
        ({"outputs": ALL, "input": ["a"] * 2049}, "too_many_inputs", "input"),
        ({"outputs": ALL, "input": "a", "prompt": "p", "input_type": "query"}, "invalid_value", "prompt"),
    ],
)
def test_a_wrong_request_is_refused_before_any_work(
    served: Served, fields: dict[str, Any], code: str, param: str
) -> None:
    answer = served.client.post(EMBED, json={"input": "a", "model": "mini", **fields})

    assert_envelope(answer, 400, code, param)
    assert served.backend.outputs_calls == []
    assert served.backend.calls == []


def test_numbers_that_json_cannot_hold_are_refused(served: Served) -> None:
    body = b'{"input": "a", "outputs": ["sparse"], "sparse_min_weight": 1e999}'
    answer = served.client.post(EMBED, content=body, headers={"content-type": "application/json"})

    assert answer.status_code == 400


def test_int8_vectors_of_tokens_need_no_second_input(served: Served) -> None:
    fields = {"outputs": ["multi_vector"], "output_dtype": "int8", "encoding_format": "base64"}
    item = served.client.post(EMBED, json={"input": "a", **fields}).json()["data"][0]["multi_vector_embedding"]

    assert item == {"shape": [1, 2], "data": "fv8="}


async def test_int8_of_one_input_needs_no_ranges_where_the_model_turns_out_to_have_vectors_of_tokens() -> None:
    async with output_server() as server:
        answers = [
            await embed(server, "colbert", None, input="a", output_dtype="int8", encoding_format="base64")
            for _ in ("cold", "warm")
        ]
        refused = [await embed(server, "dense", None, input="a", output_dtype="int8") for _ in ("cold", "warm")]

    assert [answer.status_code for answer in answers] == [200, 200]
    assert answers[0].json() == answers[1].json()
    for answer in refused:
        assert_envelope(answer, 400, "invalid_value", "output_dtype")


@pytest.mark.parametrize(
    ("model", "outputs", "lacks", "has"),
    [
        ("splade", ["dense"], "dense", "sparse"),
        ("splade", ["sparse", "multi_vector"], "multi_vector", "sparse"),
        ("colbert", ALL, "dense or sparse", "multi_vector"),
        ("dense", ALL, "sparse or multi_vector", "dense"),
    ],
)
async def test_a_refusal_names_what_the_model_lacks_what_it_has_and_where(
    model: str, outputs: list[str], lacks: str, has: str
) -> None:
    async with output_server() as server:
        answer = await embed(server, model, outputs)

    assert_envelope(answer, 400, "task_not_supported", "model" if outputs == ["dense"] else "outputs")
    message = answer.json()["error"]["message"]
    assert message.startswith(
        f'{model} has no {lacks} output: it has {has} (POST /v1/embeddings with outputs ["{has}"]'
    )
    assert ("POST /v1/rerank" in message) is (has != "sparse")


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/embed", {"inputs": "a", "model": "splade"}),
        ("/v2/embed", {"texts": ["a"], "model": "splade", "input_type": "search_query"}),
        ("/api/embed", {"input": "a", "model": "splade"}),
    ],
)
async def test_routes_of_dense_vectors_refuse_a_model_without_them(path: str, body: dict[str, Any]) -> None:
    async with output_server() as server:
        answer = await server.client.post(path, json=body)

    assert answer.status_code == 400
    assert "splade has no dense output: it has sparse" in answer.text


async def test_a_reranker_has_no_outputs_and_is_not_loaded_for_them() -> None:
    async with output_server() as server:
        answers = [await embed(server, "ranker", outputs) for outputs in (["sparse"], None)]
        everything = await server.client.post("/embed_all", json={"inputs": "a", "model": "ranker"})

    for answer in (*answers, everything):
        assert_envelope(answer, 400, "task_not_supported", "model")
    assert server.loader.loads == {}


async def test_other_errors_of_the_engine_are_not_taken_for_a_missing_output() -> None:
    async with output_server() as server:
        await embed(server, "dense", None)
        server.loader.engines[0]._attempts._script = {"dense": [None, OutOfMemory("none left"), TaskNotSupported("no")]}
        memory = await embed(server, "dense", None)
        refusal = await embed(server, "dense", None)

    assert memory.status_code == 503
    assert_envelope(refusal, 400, "task_not_supported", None)


async def test_models_list_their_outputs_once_they_are_known() -> None:
    fields = ("outputs", "dimensions", "vocab_size", "vector_width")
    async with output_server() as server:
        for model in ("bge-m3", "splade", "colbert"):
            await server.client.post(f"/admin/models/{model}/preload")
        models = {model["id"]: model for model in (await server.client.get("/v1/models")).json()["data"]}
        slot = await server.slot("splade")

    assert [models["bge-m3"][field] for field in fields] == [ALL, 16, 30_000, 4]
    assert [models["splade"][field] for field in fields] == [["sparse"], None, 30_000, None]
    assert [models["colbert"][field] for field in fields] == [["multi_vector"], None, None, 4]
    assert [models["dense"][field] for field in fields] == [[], None, None, None]
    assert "vocab_size" in str(slot)


async def test_the_shapes_of_text_embeddings_inference() -> None:
    async with output_server() as server:
        sparse = await server.client.post("/embed_sparse", json={"inputs": TEXTS, "truncate": True})
        one = await server.client.post("/embed_sparse", json={"inputs": TEXTS[1], "model": "splade"})
        every = await server.client.post("/embed_all", json={"inputs": TEXTS, "model": "dense"})
        lacking = await server.client.post("/embed_sparse", json={"inputs": "a", "model": "dense"})

    rows = [fake_row(text) for text in TEXTS]
    expected = [
        [
            {"index": index, "value": value}
            for index, value in zip(row.entries.tolist(), row.weights.tolist(), strict=True)
        ]
        for row in rows
    ]
    assert sparse.json() == expected
    assert one.json() == expected[1:]
    assert "forward" in sparse.headers["server-timing"]
    assert [np.array(vectors, "<f4").tolist() for vectors in every.json()] == [row.vectors.tolist() for row in rows]
    assert_envelope(lacking, 400, "task_not_supported", "model")


def test_the_fields_of_text_embeddings_inference_reach_the_engine(served: Served) -> None:
    body = {"inputs": "a", "truncate": True, "truncation_direction": "Left", "prompt_name": "query"}
    for path in ("/embed_sparse", "/embed_all"):
        assert served.client.post(path, json=body).status_code == 200
    ids = served.client.post("/embed_all", json={"inputs": [[1, 2], [3]], "truncate": False})

    sparse, every, last = served.backend.outputs_calls
    assert (sparse.outputs, every.outputs) == (("sparse",), ("tokens",))
    assert {(call.texts, call.truncate, call.input_type) for call in (sparse, every)} == {(("a",), "start", "query")}
    assert (last.token_ids, last.truncate, ids.status_code) == (((1, 2), (3,)), "error", 200)


@pytest.mark.parametrize("path", ["/embed_sparse", "/embed_all"])
@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        ({"inputs": []}, "empty_input", "inputs"),
        ({"inputs": ["a", ""]}, "empty_input", "inputs"),
        ({"inputs": ["a"] * 2049}, "too_many_inputs", "inputs"),
        ({"input": "a"}, "invalid_value", "inputs"),
        ({"inputs": "a", "truncation_direction": "up"}, "invalid_value", "truncation_direction"),
    ],
)
def test_wrong_requests_of_text_embeddings_inference(
    served: Served, path: str, body: dict[str, Any], code: str, param: str
) -> None:
    assert_envelope(served.client.post(path, json=body), 400, code, param)


async def test_a_prompt_that_the_model_lacks_has_the_name_of_the_routes_field() -> None:
    async with output_server() as server:
        answer = await server.client.post("/embed_sparse", json={"inputs": "a", "prompt_name": "poem"})

    assert_envelope(answer, 400, "prompt_not_found", "prompt_name")


def test_tokens_of_outputs_count_in_a_callers_limit(tmp_path: Any) -> None:
    keys = write_keys(tmp_path / "keys.yaml", {"one": {"scopes": ["embed"], "tokens_per_minute": 100}})
    with limited(Settings(keys_file=keys)) as server:
        answer = server.embed("one", input="a" * 30, outputs=["sparse"])
        large = server.client.post("/embed_all", json={"inputs": "a" * 900}, headers=bearer("one"))

    assert answer.headers["x-ratelimit-remaining-tokens"] == "70"
    assert_envelope(large, 429, "rate_limit_exceeded", None)


async def test_many_requests_at_once_get_their_own_outputs() -> None:
    async with output_server() as server:
        answers = await asyncio.gather(
            *(
                server.client.post(EMBED, json={"input": [f"text {number}"], "model": "bge-m3", "outputs": ALL})
                for number in range(20)
            )
        )

    for number, answer in enumerate(answers):
        row = fake_row(f"text {number}")
        assert answer.json()["data"][0]["sparse_embedding"]["indices"] == row.entries.tolist()
        assert answer.json()["data"][0]["multi_vector_embedding"] == pytest.approx(row.vectors)


async def test_an_answer_that_may_be_large_waits_for_memory_and_gives_it_back(monkeypatch: pytest.MonkeyPatch) -> None:
    memory, long = AnswerMemory(0.0, max_bytes=4 * 2**20), ["word " * 200]
    monkeypatch.setattr(limiter, "AnswerMemory", lambda max_wait_s: memory)
    async with output_server() as server:
        await memory.hold("another", 2**21)
        await memory.hold("a third", 2**19)
        refused = await embed(server, "bge-m3", ["multi_vector"], input=long)
        memory.release("another", 2**21)
        answered = await embed(server, "bge-m3", ["multi_vector"], input=long)

    assert_envelope(refused, 429, "too_many_requests", None)
    assert refused.json()["error"]["message"].startswith("Memory for large answers is full: 2.5 MiB of 4.0 MiB")
    assert answered.status_code == 200
    assert memory.held_bytes == 2**19


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"outputs": ("dense",)}, 4 * 2 * 24),
        ({"outputs": ("sparse",)}, 8 * 2 * 100),
        ({"outputs": ("sparse",), "sparse_top_k": 7}, 8 * 2 * 7),
        ({"outputs": ("multi_vector",)}, 4 * 16 * (65 + 512)),
        ({"outputs": ("multi_vector",), "texts": ("x" * 10**8,)}, 4 * 16 * 512),
        ({"outputs": ("tokens",), "texts": ("x" * 10**8,) * 1000}, MAX_ANSWER_BYTES),
    ],
)
def test_the_largest_answer_of_a_call_is_known_before_it_runs(fields: dict[str, Any], expected: int) -> None:
    info = ModelInfo(
        dimensions=24, max_tokens=512, dtype="float32", attention="packed", vocab_size=100, vector_width=16
    )
    call = OutputsCall(**({"model_id": "m", "texts": ("x", "y" * 500)} | fields))

    assert largest_answer_bytes(call, [info]) == min(expected, MAX_ANSWER_BYTES)


def test_sparse_outputs_of_an_unknown_model_have_as_many_entries_as_the_engine_gives() -> None:
    call = OutputsCall(model_id="m", texts=("x",), outputs=("sparse",))

    assert MOST_TERMS == MAX_TERMS
    assert largest_answer_bytes(call, []) == 8 * MAX_TERMS
