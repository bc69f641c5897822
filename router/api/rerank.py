"""`POST /v1/rerank`, `/v2/rerank` and `/rerank`: Cohere's, Jina's, vLLM's and LiteLLM's, and on `/rerank` TEI's too."""

from collections.abc import Sequence
from typing import Any, Literal

from litestar import Controller, Request
from litestar.params import JSONBody
from litestar.response.base import ASGIResponse

from engines.types import ScoreCall
from router.api.inference import InferenceRoute, rename_error_params
from router.api.score_calls import either_rerank_call, rerank_call
from router.api.score_encoding import encode_ranking, encode_tei_ranking
from router.api.scoring import score
from router.schemas.scoring import EitherRerankRequest, RerankOptions, RerankRequest, RerankResponse, TeiRank

_BEST_FIRST = "Documents, best first"


class RerankController(Controller):
    """Ranks documents for a query."""

    tags = ("rerank",)

    @InferenceRoute("/v1/rerank", summary="Rank documents for a query", returns=RerankResponse, description=_BEST_FIRST)
    async def rerank(self, request: Request[Any, Any, Any], data: JSONBody[RerankRequest]) -> ASGIResponse:
        """Scores each document with a reranker; an embedding model ranks by the cosine of its vectors (`method`)."""
        return await _answer(request, data, rerank_call(data), "1")

    @InferenceRoute("/v2/rerank", summary="Rank documents (Cohere)", returns=RerankResponse, description=_BEST_FIRST)
    async def cohere_rerank(self, request: Request[Any, Any, Any], data: JSONBody[RerankRequest]) -> ASGIResponse:
        """As POST /v1/rerank."""
        return await _answer(request, data, rerank_call(data), "2")

    @InferenceRoute(
        "/rerank",
        summary="Rank documents (Jina, Infinity, text-embeddings-inference)",
        returns=RerankResponse | list[TeiRank],
        description="Documents, best first; a list for a request with `texts`",
    )
    async def either_rerank(self, request: Request[Any, Any, Any], data: JSONBody[EitherRerankRequest]) -> ASGIResponse:
        """As POST /v1/rerank with `documents`; with `texts` as text-embeddings-inference, whose scores are sigmoids."""
        call = either_rerank_call(data)
        if data.documents is not None:
            return await _answer(request, data, call, "2")
        with rename_error_params(documents="texts"):
            scored = await score(request, data.model, call, "rerank")
        body = await encode_tei_ranking(scored, call.texts if data.return_text else None)
        return ASGIResponse(body=body, headers=scored.headers)


async def _answer(
    request: Request[Any, Any, Any], data: RerankOptions, call: ScoreCall, api_version: Literal["1", "2"]
) -> ASGIResponse:
    scored = await score(request, data.model, call, "rerank", allows_cosine=True)
    texts: Sequence[str] | None = call.texts if data.return_documents else None
    body = await encode_ranking(scored, texts, data.top_n, api_version)
    return ASGIResponse(body=body, headers=scored.headers)
