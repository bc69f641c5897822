"""Cohere's `POST /v2/embed`."""

import asyncio
import uuid
from collections.abc import Sequence
from typing import Any

import msgspec
from litestar import Controller, MediaType, Request, Response
from litestar.params import JSONBody

from engines.spec import Truncate
from router.api.encoding import OutputFormat, encode_rows, is_scalar
from router.api.inference import Answer, InferenceRoute, embed, rename_error_params
from router.schemas.compat import CohereMeta, CohereRequest, CohereResponse, CohereType, CohereUnits, CohereVersion
from router.schemas.inference import EmbeddingRequest

_INLINE_CHARS = 2**16
"""The answer repeats the texts; longer ones are encoded on a thread, as 58 MiB would block the event loop for 0.1 s."""
_BASE64 = OutputFormat(encoding="base64")
_TRUNCATE: dict[str | None, Truncate] = {"NONE": "error", "START": "start", "END": "end"}


class CohereController(Controller):
    """The API of Cohere, version 2."""

    tags = ("skins",)

    @InferenceRoute("/v2/embed", summary="Embed texts (Cohere)", returns=CohereResponse, description="Vectors by type")
    async def cohere_embed(self, request: Request[Any, Any, Any], data: JSONBody[CohereRequest]) -> Response[bytes]:
        """Computes the vectors once and returns them in each requested type."""
        kinds: list[CohereType] = list(dict.fromkeys(data.embedding_types or ("float",)))
        with rename_error_params(input="texts", dimensions="output_dimension", output_dtype="embedding_types"):
            answer = await embed(request, _to_embedding_request(data, kinds))
            body = await _encode(data, kinds, answer)
        return Response(body, media_type=MediaType.JSON, headers=answer.headers)


def _to_embedding_request(data: CohereRequest, kinds: Sequence[CohereType]) -> EmbeddingRequest:
    """Translate the request, with the strictest of the requested types: int8 and uint8 need ranges."""
    return EmbeddingRequest(
        input=[*data.texts],
        model=data.model,
        dimensions=data.output_dimension,
        input_type=data.input_type,
        truncate=_TRUNCATE.get(data.truncate),
        output_dtype=next(filter(is_scalar, kinds), None),
    )


def _is_large(data: CohereRequest) -> bool:
    return sum(map(len, data.texts)) > _INLINE_CHARS


async def _encode(data: CohereRequest, kinds: list[CohereType], answer: Answer) -> bytes:
    parts = []
    for kind in kinds:
        output = _BASE64 if kind == "base64" else OutputFormat(dtype=kind, calibration=answer.calibration)
        rows = await encode_rows(answer.embeddings, output)
        parts.append(b'"' + kind.encode() + b'":' + rows)
    meta = CohereMeta(api_version=CohereVersion(), billed_units=CohereUnits(input_tokens=answer.num_tokens))
    head = {"id": str(uuid.uuid4()), "response_type": "embeddings_by_type", "texts": data.texts, "meta": meta}
    encoded_head = await asyncio.to_thread(msgspec.json.encode, head) if _is_large(data) else msgspec.json.encode(head)
    return encoded_head[:-1] + b',"embeddings":{' + b",".join(parts) + b"}}"
