"""Cohere's `POST /v2/embed` and `POST /v1/embed`."""

import asyncio
import uuid
from collections.abc import Sequence
from typing import Any, Literal

import msgspec
from litestar import Controller, MediaType, Request, Response
from litestar.params import JSONBody
from msgspec import structs

from engines.errors import InvalidValue, PromptNotFound
from engines.spec import Truncate
from router.api.encoding import OutputFormat, encode_rows, is_scalar
from router.api.inference import Answer, InferenceRoute, embed, rename_error_params
from router.schemas.compat import (
    CohereFloats,
    CohereMeta,
    CohereRequest,
    CohereResponse,
    CohereType,
    CohereUnits,
    CohereV1Request,
    CohereVersion,
)
from router.schemas.inference import EmbeddingRequest

_INLINE_CHARS = 2**16
"""The answer repeats the texts; longer ones are encoded on a thread, as 58 MiB would block the event loop for 0.1 s."""
_BASE64 = OutputFormat(encoding="base64")
_TRUNCATE: dict[str | None, Truncate] = {"NONE": "error", "START": "start", "END": "end"}
_TASKS = ("classification", "clustering")
"""Input types that few models have a prompt for; the texts go to the others without one."""


class CohereController(Controller):
    """The API of Cohere, versions 1 and 2."""

    tags = ("skins",)

    @InferenceRoute("/v2/embed", summary="Embed texts (Cohere)", returns=CohereResponse, description="Vectors by type")
    async def cohere_embed(self, request: Request[Any, Any, Any], data: JSONBody[CohereRequest]) -> Response[bytes]:
        """Computes the vectors once and returns them in each requested type."""
        kinds: list[CohereType] = list(dict.fromkeys(data.embedding_types or ("float",)))
        return await _answer(request, data, kinds, "2")

    @InferenceRoute(
        "/v1/embed",
        summary="Embed texts (Cohere, version 1)",
        returns=CohereFloats | CohereResponse,
        description="A list of vectors, or vectors by type if the request has `embedding_types`",
    )
    async def cohere_v1_embed(
        self, request: Request[Any, Any, Any], data: JSONBody[CohereV1Request]
    ) -> Response[bytes]:
        """Answers as /v2/embed, but with a plain list of vectors unless types are named."""
        kinds: list[CohereType] = list(dict.fromkeys(data.embedding_types or ()))
        return await _answer(request, data, kinds, "1")


async def _answer(
    request: Request[Any, Any, Any], data: CohereRequest, kinds: Sequence[CohereType], version: Literal["1", "2"]
) -> Response[bytes]:
    """Embed the texts; encode the vectors in each of `kinds`, or without one as a plain list."""
    field, texts = _texts(data)
    with rename_error_params(input=field, dimensions="output_dimension", output_dtype="embedding_types"):
        answer = await _embed(request, _to_embedding_request(data, texts, kinds))
        vectors = await (_by_type(kinds, answer) if kinds else encode_rows(answer.embeddings))
    units = CohereUnits(input_tokens=answer.num_tokens)
    head = {
        "id": str(uuid.uuid4()),
        "response_type": "embeddings_by_type" if kinds else "embeddings_floats",
        "texts": texts,
        "meta": CohereMeta(api_version=CohereVersion(version=version), billed_units=units),
    }
    encode = msgspec.json.encode
    encoded_head = await asyncio.to_thread(encode, head) if _is_large(texts) else encode(head)
    body = encoded_head[:-1] + b',"embeddings":' + vectors + b"}"
    return Response(body, media_type=MediaType.JSON, headers=answer.headers)


def _texts(data: CohereRequest) -> tuple[str, list[str]]:
    """Return the field that holds the texts, and the texts."""
    if data.texts is not None and data.inputs is not None:
        raise InvalidValue("texts cannot be combined with inputs: send one of them", param="inputs")
    if data.inputs is not None:
        return "inputs", [each.content[0].text for each in data.inputs]
    if data.texts is None:
        raise InvalidValue("texts is required (or inputs)", param="texts")
    return "texts", data.texts


async def _embed(request: Request[Any, Any, Any], wanted: EmbeddingRequest) -> Answer:
    """Embed; if the model has no prompt for a task of Cohere's, without one: the first try has computed nothing."""
    try:
        return await embed(request, wanted)
    except PromptNotFound:
        if wanted.input_type not in _TASKS:
            raise
        return await embed(request, structs.replace(wanted, input_type=None))


def _to_embedding_request(data: CohereRequest, texts: list[str], kinds: Sequence[CohereType]) -> EmbeddingRequest:
    """Translate the request, with the strictest of the requested types: int8 and uint8 need ranges."""
    return EmbeddingRequest(
        input=[*texts],
        model=data.model,
        dimensions=data.output_dimension,
        input_type=data.input_type,
        truncate=_TRUNCATE.get(data.truncate),
        output_dtype=next(filter(is_scalar, kinds), None),
    )


def _is_large(texts: Sequence[str]) -> bool:
    return sum(map(len, texts)) > _INLINE_CHARS


async def _by_type(kinds: Sequence[CohereType], answer: Answer) -> bytes:
    parts = []
    for kind in kinds:
        output = _BASE64 if kind == "base64" else OutputFormat(dtype=kind, calibration=answer.calibration)
        rows = await encode_rows(answer.embeddings, output)
        parts.append(b'"' + kind.encode() + b'":' + rows)
    return b"{" + b",".join(parts) + b"}"
