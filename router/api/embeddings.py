"""OpenAI's embeddings API, at its own path and at those of other servers: decode the request, embed it, encode it."""

from typing import Any

from litestar import Controller, Request, get
from litestar.di import NamedDependency
from litestar.params import JSONBody
from litestar.response.base import ASGIResponse
from msgspec import structs

from engines.errors import TaskNotSupported
from engines.spec import ModelSpec
from engines.types import BaseResult
from router.api.compat.infinity import list_for_infinity
from router.api.encoding import EncodedAnswer, OutputFormat, encode_answer
from router.api.inference import InferenceRoute, embed, headers_of
from router.api.models import describe_model
from router.api.openapi import BEARER, GUARDED, failures
from router.api.outputs import answer_outputs, outputs_without_dense
from router.auth.guards import requires
from router.schemas.compat import InfinityModelList, InfinityRequest
from router.schemas.inference import EmbeddingRequest, EmbeddingResponse, Model

OPENAI_HEADERS = ("openai-processing-ms", "openai-version")
UNNAMED_MODEL = "default/not-specified"
"""The model that Infinity's client names if its user names none."""
_VERSION = "2020-10-01"
"""The only version of OpenAI's API so far."""


class EmbeddingsController(Controller):
    """OpenAI's embeddings API."""

    path = "/v1/embeddings"
    tags = ("embeddings",)

    @InferenceRoute(summary="Embed texts", returns=EmbeddingResponse)
    async def create_embeddings(
        self, request: Request[Any, Any, Any], data: JSONBody[EmbeddingRequest]
    ) -> ASGIResponse:
        """Loads the model first if it is not in memory; the request waits for it."""
        return await answer_embeddings(request, data)


class PathController(Controller):
    """The same API with the model in the path, so that any load balancer can route a model to one server."""

    path = "/m/{model_id:str}/v1/embeddings"
    tags = ("skins",)

    @InferenceRoute(summary="Embed texts with the model of the path", returns=EmbeddingResponse)
    async def create_embeddings_of_model(
        self, request: Request[Any, Any, Any], data: JSONBody[EmbeddingRequest], spec: NamedDependency[ModelSpec]
    ) -> ASGIResponse:
        """Ignores the body's `model`, which OpenAI's clients always send."""
        return await answer_embeddings(request, structs.replace(data, model=spec.model_id))


class InfinityController(Controller):
    """OpenAI's API without `/v1`: Infinity's paths, and those of clients whose base URL lacks it."""

    tags = ("skins",)

    @InferenceRoute("/embeddings", summary="Embed texts (Infinity)", returns=EmbeddingResponse)
    async def infinity_embeddings(
        self, request: Request[Any, Any, Any], data: JSONBody[InfinityRequest]
    ) -> ASGIResponse:
        """Does the same as POST /v1/embeddings, and understands the defaults that Infinity's client sends."""
        model = None if data.model == UNNAMED_MODEL else data.model
        return await answer_embeddings(request, structs.replace(data, model=model, dimensions=data.dimensions or None))

    @get(
        "/models",
        guards=(requires("embed"),),
        security=BEARER,
        responses=failures(*GUARDED),
        summary="List the models (Infinity)",
    )
    async def infinity_models(self, request: Request[Any, Any, Any]) -> InfinityModelList:
        """Lists what GET /v1/models does, with Infinity's `stats`, `backend` and `capabilities`."""
        return list_for_infinity(request)

    @get(
        "/models/{model_id:str}",
        guards=(requires("embed"),),
        security=BEARER,
        responses=failures(*GUARDED, "model_not_found", "model_not_allowed"),
        summary="Show a model (Infinity)",
    )
    async def infinity_model(self, request: Request[Any, Any, Any], spec: NamedDependency[ModelSpec]) -> Model:
        """Does the same as GET /v1/models/{model_id}."""
        return describe_model(request, spec)


class AzureController(Controller):
    """Azure's path, with the model as the name of a deployment; any `api-version` will do."""

    path = "/openai/deployments/{model_id:str}/embeddings"
    tags = ("skins",)

    @InferenceRoute(summary="Embed texts with the model of the path (Azure)", returns=EmbeddingResponse)
    async def azure_embeddings(
        self, request: Request[Any, Any, Any], data: JSONBody[EmbeddingRequest], spec: NamedDependency[ModelSpec]
    ) -> ASGIResponse:
        """Ignores the body's `model`, which is the deployment's or the model's own name at Azure."""
        return await answer_embeddings(request, structs.replace(data, model=spec.model_id))


async def answer_embeddings(request: Request[Any, Any, Any], wanted: EmbeddingRequest) -> ASGIResponse:
    """Answer with dense vectors, or with the other outputs that the request names. Three cases:

    1. dense vectors alone, or no outputs named and the model has dense vectors.
    2. no outputs named, and the model has no dense vectors, so that it refuses (1): all that it has.
    3. other outputs are named.
    """
    if wanted.outputs is not None and wanted.outputs != ["dense"]:
        return await answer_outputs(request, wanted, tuple(wanted.outputs), _headers)  # (3)
    try:
        return await _answer_dense(request, wanted)  # (1)
    except TaskNotSupported as refusal:
        if wanted.outputs is not None or wanted.late_chunking:
            raise
        outputs = await outputs_without_dense(request, wanted.model, refusal)
    return await answer_outputs(request, wanted, outputs, _headers)  # (2)


async def _answer_dense(request: Request[Any, Any, Any], wanted: EmbeddingRequest) -> ASGIResponse:
    answer = await embed(request, wanted)
    output = OutputFormat(
        encoding=wanted.encoding_format or "float",
        dtype=wanted.output_dtype or "float",
        calibration=answer.calibration,
    )
    body = await encode_answer(answer.embeddings, answer.model_id, output)
    return EncodedAnswer(body, _headers(answer.embeddings))


def _headers(result: BaseResult) -> dict[str, str]:
    """Return the headers of an answer, and those of OpenAI: how long it took, and the date of the API."""
    spent, headers = result.timings, headers_of(result)
    seconds = spent.load_s + spent.tokenize_s + spent.queue_s + spent.forward_s
    headers["openai-processing-ms"] = f"{seconds * 1000:.0f}"
    headers["openai-version"] = _VERSION
    return headers
