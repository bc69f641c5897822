"""The `POST /embed`, `POST /predict` and `GET /info` of text-embeddings-inference (TEI)."""

from typing import Any

from litestar import Controller, MediaType, Request, Response, get
from litestar.params import JSONBody

from engines.spec import ModelSpec
from engines.types import ModelInfo
from router.api.encoding import encode_rows
from router.api.inference import InferenceRoute, embed, rename_error_params
from router.api.models import slots_by_model
from router.api.openapi import BEARER, GUARDED, failures
from router.api.score_calls import predict_call, tei_truncate
from router.api.score_encoding import encode_predictions
from router.api.scoring import score
from router.auth.guards import requires
from router.auth.model_access import resolve
from router.schemas.compat import TeiEmbeddingType, TeiInfo, TeiLabels, TeiModelType, TeiRequest
from router.schemas.inference import MAX_INPUTS, EmbeddingRequest
from router.schemas.scoring import Prediction, PredictRequest
from router.server.state import state_of
from router.version import embedyard_version


class TeiController(Controller):
    """The API of text-embeddings-inference. Its clients name no model, so they get the default model."""

    tags = ("skins",)

    @InferenceRoute("/embed", summary="Embed texts (text-embeddings-inference)", returns=list[list[float]])
    async def tei_embed(self, request: Request[Any, Any, Any], data: JSONBody[TeiRequest]) -> Response[bytes]:
        """Returns only the vectors, as numbers."""
        with rename_error_params(input="inputs", input_type="prompt_name"):
            answer = await embed(request, _to_embedding_request(data))
        body = await encode_rows(answer.embeddings)
        return Response(body, media_type=MediaType.JSON, headers=answer.headers)

    @InferenceRoute(
        "/predict",
        summary="Label texts or pairs (text-embeddings-inference)",
        returns=list[Prediction] | list[list[Prediction]],
        description="Labels, best first; a list of such lists for a list of inputs",
    )
    async def tei_predict(self, request: Request[Any, Any, Any], data: JSONBody[PredictRequest]) -> Response[bytes]:
        """Returns the probability of each label."""
        call, is_batch = predict_call(data)
        with rename_error_params(documents="inputs", query="inputs", input="inputs"):
            scored = await score(request, data.model, call, "predict")
        return Response(
            await encode_predictions(scored, is_batch=is_batch), media_type=MediaType.JSON, headers=scored.headers
        )

    @get(
        "/info",
        guards=(requires("embed"),),
        security=BEARER,
        responses=failures(*GUARDED),
        summary="Show the default model (text-embeddings-inference)",
    )
    async def tei_info(self, request: Request[Any, Any, Any]) -> TeiInfo:
        """Shows the default model and the limits of the server."""
        server_state = state_of(request)
        spec = resolve(request, server_state.registry, None)
        nearest = slots_by_model(server_state)[spec.model_id][0]
        info, settings = nearest.info, server_state.settings
        return TeiInfo(
            model_id=spec.model_id,
            model_sha=nearest.revision or spec.revision,
            model_dtype=info.dtype if info else spec.dtype,
            model_type=_model_type(spec, info),
            max_input_length=info.max_tokens if info else spec.max_tokens,
            max_concurrent_requests=settings.max_concurrent_requests,
            max_batch_tokens=spec.max_batch_tokens or settings.max_batch_tokens,
            max_client_batch_size=MAX_INPUTS,
            auto_truncate=spec.truncate != "error",
            tokenization_workers=settings.thread_pool_size,
            version=embedyard_version(),
        )


def _to_embedding_request(data: TeiRequest) -> EmbeddingRequest:
    return EmbeddingRequest(
        input=data.inputs if isinstance(data.inputs, str) else [*data.inputs],
        model=data.model,
        dimensions=data.dimensions,
        input_type=data.prompt_name,
        normalize=data.normalize,
        truncate=tei_truncate(data.truncate, data.truncation_direction),
    )


def _model_type(spec: ModelSpec, info: ModelInfo | None) -> TeiModelType:
    """Return what the model computes; the names of labels are unknown until it is loaded."""
    task = info.task if info else spec.task
    if task in (None, "embed"):
        return TeiModelType(embedding=TeiEmbeddingType(pooling="+".join(spec.pooling) if spec.pooling else None))
    names = info.labels if info else ()
    labels = TeiLabels(
        id2label={str(index): name for index, name in enumerate(names)},
        label2id={name: index for index, name in enumerate(names)},
    )
    return TeiModelType(reranker=labels) if task == "rerank" else TeiModelType(classifier=labels)
