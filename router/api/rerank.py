"""`POST /v1/rerank`, `/v2/rerank` and `/rerank`: Cohere's, Jina's, vLLM's and LiteLLM's, and on `/rerank` TEI's too.

Infinity's clients are told by their `raw_scores`, which they always send. LiteLLM's `infinity/` sends what its
`hosted_vllm/` sends and reads another answer, so it has an address of its own, `/infinity/rerank`.
"""

from collections.abc import Sequence
from typing import Any, Literal

from litestar import Controller, Request
from litestar.params import JSONBody
from litestar.response.base import ASGIResponse

from engines.types import ScoreCall
from router.api.inference import TEI_TRUNCATION, InferenceRoute, rename_error_params
from router.api.score_calls import either_rerank_call, rerank_call
from router.api.score_encoding import encode_infinity_ranking, encode_ranking, encode_tei_ranking
from router.api.scoring import METHODS, score
from router.schemas.scoring import (
    EitherRerankRequest,
    InfinityRerankResponse,
    RerankOptions,
    RerankRequest,
    RerankResponse,
    TeiRank,
)

_BEST_FIRST = "Documents, best first"


class RerankController(Controller):
    """Ranks documents for a query."""

    tags = ("rerank",)

    @InferenceRoute("/v1/rerank", summary="Rank documents for a query", returns=RerankResponse, description=_BEST_FIRST)
    async def rerank(self, request: Request[Any, Any, Any], data: JSONBody[RerankRequest]) -> ASGIResponse:
        """Scores each document with a reranker; an embedding model ranks by its vectors (`method`)."""
        return await answer_rerank(request, data, rerank_call(data), "1")

    @InferenceRoute("/v2/rerank", summary="Rank documents (Cohere)", returns=RerankResponse, description=_BEST_FIRST)
    async def cohere_rerank(self, request: Request[Any, Any, Any], data: JSONBody[RerankRequest]) -> ASGIResponse:
        """As POST /v1/rerank."""
        return await answer_rerank(request, data, rerank_call(data), "2")

    @InferenceRoute(
        "/rerank",
        summary="Rank documents (Jina, Infinity, text-embeddings-inference)",
        returns=RerankResponse | InfinityRerankResponse | list[TeiRank],
        description="Documents, best first; a list for a request with `texts`; as Infinity with `raw_scores`",
    )
    async def either_rerank(self, request: Request[Any, Any, Any], data: JSONBody[EitherRerankRequest]) -> ASGIResponse:
        """As POST /v1/rerank with `documents`; with `texts` as text-embeddings-inference, whose scores are sigmoids."""
        call = either_rerank_call(data)
        if data.documents is not None:
            return await answer_rerank(request, data, call, "2" if data.raw_scores is None else "infinity")
        with rename_error_params(TEI_TRUNCATION, documents="texts"):
            scored = await score(request, data.model, call, "rerank", methods=("maxsim",), method=data.method)
        body = await encode_tei_ranking(scored, call.texts if data.return_text else None)
        return ASGIResponse(body=body, headers=scored.headers)

    @InferenceRoute(
        "/infinity/rerank",
        summary="Rank documents (LiteLLM's `infinity/`)",
        returns=InfinityRerankResponse,
        description=_BEST_FIRST,
    )
    async def infinity_rerank(self, request: Request[Any, Any, Any], data: JSONBody[RerankRequest]) -> ASGIResponse:
        """As POST /v1/rerank; the answer is Infinity's, with documents as strings."""
        return await answer_rerank(request, data, rerank_call(data), "infinity")


async def answer_rerank(
    request: Request[Any, Any, Any], data: RerankOptions, call: ScoreCall, shape: Literal["1", "2", "infinity"]
) -> ASGIResponse:
    """Rank, and answer as that version of Cohere's API does, or as Infinity."""
    scored = await score(request, data.model, call, "rerank", methods=METHODS, method=data.method)
    texts: Sequence[str] | None = call.texts if data.return_documents in (True, "true") else None
    if shape == "infinity":
        body = await encode_infinity_ranking(scored, texts, data.top_n)
    else:
        body = await encode_ranking(scored, texts, data.top_n, shape)
    return ASGIResponse(body=body, headers=scored.headers)
