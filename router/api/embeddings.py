"""`POST /v1/embeddings` and `POST /m/{model}/v1/embeddings`: decode the request, embed it, encode the answer."""

from typing import Any

from litestar import Controller, Request
from litestar.di import NamedDependency
from litestar.params import JSONBody
from litestar.response.base import ASGIResponse
from msgspec import structs

from engines.spec import ModelSpec
from router.api.encoding import OutputFormat, encode_answer
from router.api.inference import InferenceRoute, embed
from router.schemas.inference import EmbeddingRequest, EmbeddingResponse


class EmbeddingsController(Controller):
    """OpenAI's embeddings API."""

    path = "/v1/embeddings"
    tags = ("embeddings",)

    @InferenceRoute(summary="Embed texts", returns=EmbeddingResponse)
    async def create_embeddings(
        self, request: Request[Any, Any, Any], data: JSONBody[EmbeddingRequest]
    ) -> ASGIResponse:
        """Loads the model first if it is not in memory; the request waits for it."""
        return await _answer(request, data)


class PathController(Controller):
    """The same API with the model in the path, so that any load balancer can route a model to one server."""

    path = "/m/{model_id:str}/v1/embeddings"
    tags = ("skins",)

    @InferenceRoute(summary="Embed texts with the model of the path", returns=EmbeddingResponse)
    async def create_embeddings_of_model(
        self, request: Request[Any, Any, Any], data: JSONBody[EmbeddingRequest], spec: NamedDependency[ModelSpec]
    ) -> ASGIResponse:
        """Ignores the body's `model`, which OpenAI's clients always send."""
        return await _answer(request, structs.replace(data, model=spec.model_id))


async def _answer(request: Request[Any, Any, Any], wanted: EmbeddingRequest) -> ASGIResponse:
    answer = await embed(request, wanted)
    output = OutputFormat(
        encoding=wanted.encoding_format or "float",
        dtype=wanted.output_dtype or "float",
        calibration=answer.calibration,
    )
    body = await encode_answer(answer.embeddings, answer.model_id, output)
    return ASGIResponse(body=body, headers=answer.headers)
