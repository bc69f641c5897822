"""Tests OpenAI's Python client, unchanged, with other outputs than dense vectors: its fields go into `extra_body`."""

import base64
from collections.abc import Iterator
from typing import Any

import numpy as np
import openai
import pytest

from engines.testing.engine import fake_vector
from engines.testing.outputs import fake_row
from tests.testkit.output_servers import serve_outputs

TEXTS = ["a cat and a dog", "one more"]
ALL = ["dense", "sparse", "multi_vector"]


@pytest.fixture(scope="module")
def client() -> Iterator[openai.OpenAI]:
    with serve_outputs() as url, openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


def extra(item: Any, name: str) -> Any:
    return item.model_extra[name]


def test_the_client_decodes_dense_vectors_and_keeps_the_rest_as_attributes(client: openai.OpenAI) -> None:
    answer = client.embeddings.create(model="bge-m3", input=TEXTS, extra_body={"outputs": ALL})

    for text, item in zip(TEXTS, answer.data, strict=True):
        row = fake_row(text)
        vectors = extra(item, "multi_vector_embedding")
        found = np.frombuffer(base64.b64decode(vectors["data"]), "<f4").reshape(vectors["shape"])
        assert item.embedding == pytest.approx(fake_vector("bge-m3", text).tolist())
        assert extra(item, "sparse_embedding") == {"indices": row.entries.tolist(), "values": row.weights.tolist()}
        assert found.tolist() == row.vectors.tolist()


def test_numbers_come_where_the_client_asks_for_numbers(client: openai.OpenAI) -> None:
    answer = client.embeddings.create(
        model="bge-m3", input=TEXTS, encoding_format="float", extra_body={"outputs": ["multi_vector"], "pool_factor": 1}
    )

    for text, item in zip(TEXTS, answer.data, strict=True):
        assert extra(item, "multi_vector_embedding") == pytest.approx(fake_row(text).vectors)


@pytest.mark.parametrize("outputs", [["sparse"], None])
def test_an_answer_without_dense_vectors_does_not_stop_the_client(
    client: openai.OpenAI, outputs: list[str] | None
) -> None:
    answer = client.embeddings.create(model="splade", input=TEXTS, extra_body={"outputs": outputs})

    assert [extra(item, "sparse_embedding")["indices"] for item in answer.data] == [
        fake_row(text).entries.tolist() for text in TEXTS
    ]
    assert answer.usage.prompt_tokens == 7 + 4


def test_a_refusal_is_the_clients_own_error(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="dense has no sparse output: it has dense") as caught:
        client.embeddings.create(model="dense", input="a", extra_body={"outputs": ["sparse"]})

    assert caught.value.code == "task_not_supported"
    assert caught.value.param == "outputs"
