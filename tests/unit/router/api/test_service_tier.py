"""OpenAI's `service_tier` over HTTP: `flex` marks the call, and takes no place among the running requests."""

from collections.abc import Iterator
from typing import Any

import pytest

from router.config.settings import Settings
from tests.testkit.contract import assert_envelope
from tests.testkit.score_servers import serve_rerankers
from tests.testkit.servers import Served


@pytest.fixture(scope="module")
def module_rerankers() -> Iterator[Served]:
    yield from serve_rerankers(Settings())


@pytest.mark.parametrize(
    ("tier", "is_flex"),
    [("flex", True), ("auto", False), ("default", False), ("priority", False), (None, False)],
)
def test_only_flex_asks_for_idle_capacity(served: Served, tier: str | None, is_flex: bool) -> None:
    answer = served.client.post("/v1/embeddings", json={"input": ["one"], "service_tier": tier})

    assert answer.status_code == 200
    assert [call.is_flex for call in served.backend.calls] == [is_flex]
    assert "service_tier" not in answer.json(), "OpenAI's answer has none either"


def test_a_document_in_pieces_may_be_flex(served: Served) -> None:
    served.client.post("/v1/embeddings", json={"input": ["one"], "late_chunking": True, "service_tier": "flex"})

    assert [call.is_flex for call in served.backend.contextual_calls] == [True]


@pytest.mark.parametrize("body", [{"documents": ["a", "b"]}, {"texts": ["a", "b"]}])
def test_a_request_to_rerank_may_be_flex(module_rerankers: Served, body: Any) -> None:
    module_rerankers.backend.score_calls.clear()

    answer = module_rerankers.client.post("/rerank", json={"query": "q", "service_tier": "flex", **body})

    assert answer.status_code == 200
    assert [call.is_flex for call in module_rerankers.backend.score_calls] == [True]


def test_another_tier_is_refused_by_name(served: Served) -> None:
    answer = served.client.post("/v1/embeddings", json={"input": ["one"], "service_tier": "fast"})

    assert_envelope(answer, 400, "invalid_value", "service_tier")
    assert "flex" in answer.json()["error"]["message"]
