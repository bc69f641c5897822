"""`POST /v1/score` and `/v1/classify`, each also without `/v1`: vLLM's APIs, and Infinity's `/classify`."""

from typing import Any

from litestar import Controller, Request
from litestar.params import JSONBody
from litestar.response.base import ASGIResponse

from router.api.inference import InferenceRoute, rename_error_params
from router.api.score_calls import classify_call, score_call
from router.api.score_encoding import encode_infinity_labels, encode_labels, encode_scores
from router.api.scoring import METHODS, score
from router.schemas.scoring import (
    ClassifyRequest,
    ClassifyResponse,
    InfinityClassifyResponse,
    ScoreRequest,
    ScoreResponse,
)

_IN_ORDER = "Scores in input order"
_LABELS = "Labels in input order"
_ANY_LABELS = ClassifyResponse | InfinityClassifyResponse


class ScoreController(Controller):
    """Scores pairs of texts, and labels texts."""

    tags = ("rerank",)

    @InferenceRoute("/v1/score", summary="Score pairs of texts", returns=ScoreResponse, description=_IN_ORDER)
    async def score_pairs(self, request: Request[Any, Any, Any], data: JSONBody[ScoreRequest]) -> ASGIResponse:
        """Scores one text with each of many, or two lists item by item; an embedding model compares its vectors."""
        return await _score(request, data)

    @InferenceRoute("/score", summary="Score pairs of texts (vLLM)", returns=ScoreResponse, description=_IN_ORDER)
    async def vllm_score(self, request: Request[Any, Any, Any], data: JSONBody[ScoreRequest]) -> ASGIResponse:
        """As POST /v1/score."""
        return await _score(request, data)

    @InferenceRoute("/v1/classify", summary="Label texts", returns=_ANY_LABELS, description=_LABELS)
    async def classify_texts(self, request: Request[Any, Any, Any], data: JSONBody[ClassifyRequest]) -> ASGIResponse:
        """Returns the probability of each label, for each text."""
        return await _classify(request, data)

    @InferenceRoute("/classify", summary="Label texts (vLLM, Infinity)", returns=_ANY_LABELS, description=_LABELS)
    async def vllm_classify(self, request: Request[Any, Any, Any], data: JSONBody[ClassifyRequest]) -> ASGIResponse:
        """As POST /v1/classify."""
        return await _classify(request, data)


async def _score(request: Request[Any, Any, Any], data: ScoreRequest) -> ASGIResponse:
    with rename_error_params(query="text_1", documents="text_2"):
        scored = await score(request, data.model, score_call(data), "rerank", methods=METHODS, method=data.method)
    return ASGIResponse(body=await encode_scores(scored), headers=scored.headers)


async def _classify(request: Request[Any, Any, Any], data: ClassifyRequest) -> ASGIResponse:
    with rename_error_params(documents="input"):
        scored = await score(request, data.model, classify_call(data), "classify")
    encode = encode_labels if data.raw_scores is None else encode_infinity_labels
    return ASGIResponse(body=await encode(scored), headers=scored.headers)
