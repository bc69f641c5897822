"""`POST /v1/embeddings`, and `/m/{model}/v1/embeddings` beside it: decode, embed, encode."""

from typing import Any

from litestar import Controller, Request
from litestar.datastructures import ResponseHeader
from litestar.di import NamedDependency
from litestar.openapi import ResponseSpec
from litestar.params import JSONBody
from litestar.response.base import ASGIResponse
from msgspec import structs

from engines.spec import ModelSpec
from router.api.decoding import StrictRequest
from router.api.encoding import OutputFormat, encode_answer
from router.api.inference import embed
from router.api.openapi import BEARER, EMBEDDING, failures
from router.auth.guards import requires
from router.limits.limiter import RATE_HEADERS, InferenceRoute, acquire_permit
from router.schemas.inference import EmbeddingRequest, EmbeddingResponse
from router.server.state import ServerState, provide_state

HEADERS = (
    ResponseHeader(
        name="Server-Timing",
        description="Where the time went: load, tokenize, queue, forward, in milliseconds.",
        documentation_only=True,
    ),
    ResponseHeader(
        name="x-embed-truncated",
        description="Indexes of the inputs that were cut; absent when none was.",
        documentation_only=True,
    ),
    *(ResponseHeader(name=name, description=words, documentation_only=True) for name, words in RATE_HEADERS.items()),
)
_RESPONSES = {
    200: ResponseSpec(EmbeddingResponse, generate_examples=False, description="Vectors in input order")
} | failures(*EMBEDDING)


class EmbeddingsController(Controller):
    """OpenAI's route."""

    path = "/v1/embeddings"
    tags = ("embeddings",)
    guards = (requires("embed"),)
    security = BEARER

    @InferenceRoute(
        http_method="POST",
        status_code=200,
        guards=(acquire_permit,),
        request_class=StrictRequest,
        response_headers=HEADERS,
        summary="Embed texts",
        responses=_RESPONSES,
    )
    async def create_embeddings(
        self, request: Request[Any, Any, Any], data: JSONBody[EmbeddingRequest]
    ) -> ASGIResponse:
        """A model that is not in memory is loaded first, and the request held as long."""
        return await _answer(request, provide_state(request), data)  # asked for by name, it would cost 20 µs


class PathController(Controller):
    """The same with the model in the path, so that any load balancer can keep a model on one server."""

    path = "/m/{model_id:str}/v1/embeddings"
    tags = ("skins",)
    guards = (requires("embed"),)
    security = BEARER

    @InferenceRoute(
        http_method="POST",
        status_code=200,
        guards=(acquire_permit,),
        request_class=StrictRequest,
        response_headers=HEADERS,
        summary="Embed texts with the model of the path",
        responses=_RESPONSES,
    )
    async def create_embeddings_of_model(
        self,
        request: Request[Any, Any, Any],
        data: JSONBody[EmbeddingRequest],
        server_state: NamedDependency[ServerState],
        spec: NamedDependency[ModelSpec],
    ) -> ASGIResponse:
        """The body's `model`, which OpenAI's clients always send, does not count here."""
        return await _answer(request, server_state, structs.replace(data, model=spec.model_id))


async def _answer(request: Request[Any, Any, Any], server_state: ServerState, wanted: EmbeddingRequest) -> ASGIResponse:
    answer = await embed(request, server_state, wanted)
    form = OutputFormat(
        encoding=wanted.encoding_format or "float",
        dtype=wanted.output_dtype or "float",
        calibration=answer.calibration,
    )
    body = await encode_answer(answer.embeddings, answer.model_id, form)
    return ASGIResponse(body=body, headers=answer.headers)
