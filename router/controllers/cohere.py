"""Cohere's `POST /v2/embed`, over the same core."""

import uuid
from typing import Any

import msgspec
from litestar import Controller, MediaType, Request, Response, post
from litestar.di import NamedDependency
from litestar.openapi import ResponseSpec
from litestar.params import JSONBody

from engines.errors import InvalidValue
from engines.spec import Truncate
from router.auth import requires
from router.controllers.embeddings import HEADERS
from router.decode import StrictRequest
from router.embedding import Answer, embed, spelt
from router.encode import encode_rows
from router.limits import at_the_door
from router.openapi import BEARER, EMBEDDING, failures
from router.schema import EmbeddingRequest, OutputDtype
from router.skin_schema import CohereMeta, CohereRequest, CohereResponse, CohereType, CohereUnits, CohereVersion
from router.yard import Yard

_TRUNCATE: dict[str | None, Truncate] = {"NONE": "error", "START": "start", "END": "end"}


class CohereController(Controller):
    """For clients of Cohere."""

    tags = ("skins",)
    guards = (requires("embed"),)
    security = BEARER

    @post(
        "/v2/embed",
        status_code=200,
        guards=(at_the_door,),
        request_class=StrictRequest,
        response_headers=HEADERS,
        summary="Embed texts (Cohere)",
        responses={200: ResponseSpec(CohereResponse, generate_examples=False, description="Vectors by type")}
        | failures(*EMBEDDING),
    )
    async def cohere_embed(
        self, request: Request[Any, Any, Any], data: JSONBody[CohereRequest], yard: NamedDependency[Yard]
    ) -> Response[bytes]:
        """Several types of one forward pass."""
        kinds: list[CohereType] = list(dict.fromkeys(data.embedding_types or ("float",)))
        _check_ranges(data.texts, kinds)
        with spelt(input="texts", dimensions="output_dimension"):
            answer = await embed(request, yard, _in_our_words(data))
        return Response(await _encode(data, kinds, answer), media_type=MediaType.JSON, headers=answer.headers)


def _check_ranges(texts: list[str], kinds: list[CohereType]) -> None:
    """Refused before any work, and in the names of this API."""
    scalar = [kind for kind in kinds if kind in ("int8", "uint8")]
    if scalar and len(texts) == 1:
        raise InvalidValue(
            f"embedding_types {scalar[0]} takes its ranges from the vectors of the request: 1 text was sent, at least "
            "2 are needed; ask for binary or ubinary, or quantise float vectors with ranges of your own",
            param="embedding_types",
        )


def _in_our_words(data: CohereRequest) -> EmbeddingRequest:
    return EmbeddingRequest(
        input=[*data.texts],
        model=data.model,
        dimensions=data.output_dimension,
        input_type=data.input_type,
        truncate=_TRUNCATE.get(data.truncate),
    )


async def _encode(data: CohereRequest, kinds: list[CohereType], answer: Answer) -> bytes:
    parts = []
    for kind in kinds:
        dtype: OutputDtype = "float" if kind == "base64" else kind
        rows = await encode_rows(answer.embeddings, dtype, "base64" if kind == "base64" else "float")
        parts.append(b'"' + kind.encode() + b'":' + rows)
    meta = CohereMeta(api_version=CohereVersion(), billed_units=CohereUnits(input_tokens=answer.num_tokens))
    head = {"id": str(uuid.uuid4()), "response_type": "embeddings_by_type", "texts": data.texts, "meta": meta}
    return msgspec.json.encode(head)[:-1] + b',"embeddings":{' + b",".join(parts) + b"}}"
