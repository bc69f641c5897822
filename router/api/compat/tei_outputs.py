"""`POST /embed_sparse` and `/embed_all` of text-embeddings-inference (TEI): sparse outputs, and vectors of tokens."""

from typing import Any, Literal

from litestar import Controller, Request
from litestar.params import JSONBody
from litestar.response.base import ASGIResponse

from engines.types import Outputs
from router.api.inference import TEI_TRUNCATION, InferenceRoute, headers_of, rename_error_params
from router.api.outputs import compute_outputs
from router.api.outputs_encoding import encode_terms, encode_token_vectors
from router.api.score_calls import tei_truncate
from router.schemas.inference import EmbeddingRequest
from router.schemas.outputs import TeiOutputsRequest, TeiTerm


class TeiOutputsController(Controller):
    """The routes of text-embeddings-inference whose answers are no dense vectors."""

    tags = ("skins",)

    @InferenceRoute(
        "/embed_sparse",
        summary="Compute sparse outputs of texts (text-embeddings-inference)",
        returns=list[list[TeiTerm]],
        description="The terms of each text; `index` rises",
    )
    async def tei_embed_sparse(
        self, request: Request[Any, Any, Any], data: JSONBody[TeiOutputsRequest]
    ) -> ASGIResponse:
        """Returns every vocabulary entry that has a weight, for a model with sparse outputs."""
        result = await _compute(request, data, "sparse")
        return await encode_terms(result, headers_of(result))

    @InferenceRoute(
        "/embed_all",
        summary="Return the vectors of all tokens (text-embeddings-inference)",
        returns=list[list[list[float]]],
        description="A vector for each token of each text, special tokens included",
    )
    async def tei_embed_all(self, request: Request[Any, Any, Any], data: JSONBody[TeiOutputsRequest]) -> ASGIResponse:
        """Returns the last hidden states, not pooled, projected or normalized, of any embedding model."""
        result = await _compute(request, data, "tokens")
        return await encode_token_vectors(result, headers_of(result))


async def _compute(
    request: Request[Any, Any, Any], data: TeiOutputsRequest, output: Literal["sparse", "tokens"]
) -> Outputs:
    wanted = EmbeddingRequest(
        input=data.inputs if isinstance(data.inputs, str) else [*data.inputs],
        model=data.model,
        input_type=data.prompt_name,
        truncate=tei_truncate(data.truncate, data.truncation_direction),
    )
    with rename_error_params(TEI_TRUNCATION, input="inputs", input_type="prompt_name", outputs="model"):
        answer = await compute_outputs(request, wanted, (output,))
    return answer.result
