"""The API of text-embeddings-inference (TEI): `POST /`, `/embed`, `/tokenize`, `/predict`, and `GET /info`."""

import asyncio
from collections.abc import Sequence
from itertools import islice
from typing import Any

import msgspec
from litestar import Controller, MediaType, Request, Response, get
from litestar.params import JSONBody
from msgspec import structs

from engines.spec import ModelSpec
from engines.types import ModelInfo, TokenizeCall, Tokens
from router.api.dashboard import DashboardController
from router.api.encoding import encode_rows
from router.api.inference import (
    TEI_TRUNCATION,
    InferenceRoute,
    embed,
    headers_of,
    infos_of,
    rename_error_params,
)
from router.api.models import slots_by_model
from router.api.openapi import BEARER, GUARDED, LOADING, failures
from router.api.score_calls import checked, predict_call, tei_truncate
from router.api.score_encoding import encode_predictions
from router.api.scoring import score
from router.auth.guards import requires
from router.auth.model_access import resolve
from router.schemas.compat import (
    TeiEmbeddingType,
    TeiInfo,
    TeiLabels,
    TeiModelType,
    TeiRequest,
    TeiToken,
    TeiTokenizeRequest,
)
from router.schemas.inference import MAX_IDS, MAX_IDS_OF_TEXT, MAX_INPUTS, EmbeddingRequest
from router.schemas.scoring import Prediction, PredictRequest
from router.server.application import while_client_stays
from router.server.state import state_of
from router.version import embedyard_version


class TeiController(Controller):
    """The API of text-embeddings-inference. Its clients name no model, so they get the default model."""

    tags = ("skins",)

    @InferenceRoute("/embed", summary="Embed texts (text-embeddings-inference)", returns=list[list[float]])
    async def tei_embed(self, request: Request[Any, Any, Any], data: JSONBody[TeiRequest]) -> Response[bytes]:
        """Returns only the vectors, as numbers."""
        return await _embed(request, data)

    @InferenceRoute(
        "/tokenize",
        summary="List the tokens of texts (text-embeddings-inference)",
        returns=list[list[TeiToken]],
        description="A list of tokens for each text, not truncated; `start` and `stop` count characters",
    )
    async def tei_tokenize(
        self, request: Request[Any, Any, Any], data: JSONBody[TeiTokenizeRequest]
    ) -> Response[bytes]:
        """Loads the model first if it is not in memory."""
        spec = resolve(request, state_of(request).registry, data.model)
        with rename_error_params(TEI_TRUNCATION, input="inputs", input_type="prompt_name"):
            call = TokenizeCall(
                model_id=spec.model_id,
                texts=checked(data.inputs, "inputs"),
                input_type=data.prompt_name,
                add_special_tokens=data.add_special_tokens is not False,
            )
            tokens = await _tokenize(request, call)
        body = await asyncio.to_thread(_encode_tokens, tokens, call.texts)
        return Response(body, media_type=MediaType.JSON, headers=headers_of(tokens))

    @InferenceRoute(
        "/predict",
        summary="Label texts or pairs (text-embeddings-inference)",
        returns=list[Prediction] | list[list[Prediction]],
        description="Labels, best first; a list of such lists for a list of inputs",
    )
    async def tei_predict(self, request: Request[Any, Any, Any], data: JSONBody[PredictRequest]) -> Response[bytes]:
        """Returns the probability of each label."""
        call, is_batch = predict_call(data)
        with rename_error_params(TEI_TRUNCATION, documents="inputs", query="inputs", input="inputs"):
            scored = await score(request, data.model, call, "predict")
        return Response(
            await encode_predictions(scored, is_batch=is_batch), media_type=MediaType.JSON, headers=scored.headers
        )

    @get(
        "/info",
        guards=(requires("embed"),),
        security=BEARER,
        responses=failures(*GUARDED, *LOADING, "queue_full"),
        summary="Show the default model (text-embeddings-inference)",
    )
    async def tei_info(self, request: Request[Any, Any, Any]) -> TeiInfo:
        """Shows the default model and the limits of the server. Loads the model if it has never been in memory."""
        server_state = state_of(request)
        spec = resolve(request, server_state.registry, None)
        if next(infos_of(server_state, spec.model_id), None) is None:
            await _tokenize(request, TokenizeCall(model_id=spec.model_id, texts=("a",)))
        nearest = slots_by_model(server_state)[spec.model_id][0]
        info, settings = nearest.info, server_state.settings
        max_tokens = info.max_tokens if info else spec.max_tokens
        return TeiInfo(
            model_id=spec.model_id,
            served_model_name=spec.model_id,
            model_sha=nearest.revision or spec.revision,
            model_dtype=info.dtype if info else spec.dtype,
            model_type=_model_type(spec, info),
            max_input_length=max_tokens or MAX_IDS_OF_TEXT,
            max_concurrent_requests=settings.max_concurrent_requests,
            max_batch_tokens=spec.max_batch_tokens or settings.max_batch_tokens or MAX_IDS,
            max_client_batch_size=MAX_INPUTS,
            auto_truncate=spec.truncate != "error",
            tokenization_workers=settings.thread_pool_size,
            version=embedyard_version(),
        )


class TeiRootController(DashboardController):
    """The page and TEI's route at the root: Litestar wants all handlers of a path in one controller."""

    tags = ("skins",)

    @InferenceRoute("/", summary="Embed texts (text-embeddings-inference, at the root)", returns=list[list[float]])
    async def tei_embed_at_root(self, request: Request[Any, Any, Any], data: JSONBody[TeiRequest]) -> Response[bytes]:
        """Does the same as POST /embed: the hub's clients send requests to the address itself."""
        return await _embed(request, data)


async def _embed(request: Request[Any, Any, Any], data: TeiRequest) -> Response[bytes]:
    with rename_error_params(TEI_TRUNCATION, input="inputs", input_type="prompt_name"):
        answer = await embed(request, _to_embedding_request(data))
    body = await encode_rows(answer.embeddings)
    return Response(body, media_type=MediaType.JSON, headers=answer.headers)


async def _tokenize(request: Request[Any, Any, Any], call: TokenizeCall) -> Tokens:
    """Run a call that needs the model's tokenizer. It costs no token of a limit, because no model reads them."""
    server_state = state_of(request)
    call = structs.replace(call, load_timeout_s=server_state.settings.load_timeout_s)
    async with while_client_stays(request):
        tokens = await server_state.backend.run(call)
    assert isinstance(tokens, Tokens), "a TokenizeCall is answered by Tokens"
    return tokens


def _encode_tokens(tokens: Tokens, texts: Sequence[str]) -> bytes:
    """Encode the tokens as JSON, one text after the other. Runs on a thread."""
    rows = iter(tokens.array().tolist())
    counted = zip(texts, tokens.token_counts, strict=True)
    parts = [
        msgspec.json.encode(
            [_token(tokens, f"{tokens.before}{text}{tokens.behind}", *row) for row in islice(rows, count)]
        )
        for text, count in counted
    ]
    return b"[" + b",".join(parts) + b"]"


def _token(tokens: Tokens, text: str, token_id: int, start: int, stop: int) -> TeiToken:
    if start < 0:
        return TeiToken(token_id, tokens.specials[token_id], special=True, start=None, stop=None)
    return TeiToken(token_id, text[start:stop], special=False, start=start, stop=stop)


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
