"""Ollama's `POST /api/embed` and `POST /api/embeddings`, and the names by which Ollama's clients know models."""

import time
from typing import Any

import msgspec
from litestar import Controller, MediaType, Request, Response
from litestar.params import JSONBody

from engines.spec import Truncate
from router.api.encoding import encode_rows
from router.api.inference import InferenceRoute, embed, rename_error_params
from router.api.openapi import EMBEDDING, ollama_failures
from router.auth.model_access import resolve
from router.errors import answer_error
from router.registry.registry import Registry
from router.schemas.inference import EmbeddingRequest
from router.schemas.ollama import OllamaError, OllamaPrompt, OllamaRequest, OllamaResponse, OllamaVector
from router.server.state import state_of

_LATEST = ":latest"
_TRUNCATE: dict[bool | None, Truncate] = {True: "end", False: "error"}
_FAILURES = ollama_failures(*EMBEDDING)


class OllamaController(Controller):
    """The routes of Ollama's API that embed."""

    path = "/api"
    tags = ("skins",)

    @InferenceRoute("/embed", summary="Embed texts (Ollama)", returns=OllamaResponse, errors=_FAILURES)
    async def ollama_embed(self, request: Request[Any, Any, Any], data: JSONBody[OllamaRequest]) -> Response[bytes]:
        """Loads the model first if it is not in memory. Without texts it answers without vectors, as Ollama does."""
        registry = state_of(request).registry
        if not data.input:
            resolve(request, registry, model_name(data.model, registry))
            nothing = OllamaResponse(
                model=data.model, embeddings=[], total_duration=0, load_duration=0, prompt_eval_count=0
            )
            return Response(msgspec.json.encode(nothing), media_type=MediaType.JSON)
        started_at_s = time.perf_counter()
        answer = await embed(request, _to_embedding_request(data, registry))
        rows = await encode_rows(answer.embeddings)
        head = {
            "model": data.model,
            "total_duration": _nanoseconds(time.perf_counter() - started_at_s),
            "load_duration": _nanoseconds(answer.embeddings.timings.load_s),
            "prompt_eval_count": answer.num_tokens,
        }
        body = msgspec.json.encode(head)[:-1] + b',"embeddings":' + rows + b"}"
        return Response(body, media_type=MediaType.JSON, headers=answer.headers)

    @InferenceRoute(
        "/embeddings", summary="Embed one text (Ollama, older)", returns=OllamaVector, errors=_FAILURES,
        description="One vector",
    )  # fmt: skip
    async def ollama_embeddings(self, request: Request[Any, Any, Any], data: JSONBody[OllamaPrompt]) -> Response[bytes]:
        """Returns an empty vector for an empty text, as Ollama does."""
        registry = state_of(request).registry
        name = model_name(data.model, registry)
        if not data.prompt:
            resolve(request, registry, name)
            return Response(b'{"embedding":[]}', media_type=MediaType.JSON)
        wanted = EmbeddingRequest(input=data.prompt, model=name, keep_alive=_keep_alive(data.keep_alive))
        with rename_error_params(input="prompt"):
            answer = await embed(request, wanted)
        rows = await encode_rows(answer.embeddings)
        return Response(b'{"embedding":' + rows[1:-1] + b"}", media_type=MediaType.JSON, headers=answer.headers)


def answer_ollama_error(request: Request[Any, Any, Any], error: Exception) -> Response[Any]:
    """Return the error response for any exception; below `/api` its body is a string, as Ollama's clients read it."""
    response = answer_error(request, error)
    if not request.scope["path"].startswith("/api/"):
        return response
    body = OllamaError(error=response.content.error.message)
    return Response(body, status_code=response.status_code, headers=response.headers)


def model_name(name: str, registry: Registry) -> str:
    """Remove the tag `:latest`, which Ollama's clients add to names without a tag."""
    is_known = name in registry.models or name in registry.aliases
    return name if is_known else name.removesuffix(_LATEST)


def tagged_name(model_id: str) -> str:
    """Return the name that Ollama lists: with a tag, `latest` if it has none."""
    return model_id if ":" in model_id.rpartition("/")[2] else model_id + _LATEST


def _to_embedding_request(data: OllamaRequest, registry: Registry) -> EmbeddingRequest:
    assert data.input, "answered without vectors"
    return EmbeddingRequest(
        input=data.input if isinstance(data.input, str) else [*data.input],
        model=model_name(data.model, registry),
        dimensions=data.dimensions,
        truncate=_TRUNCATE.get(data.truncate),
        keep_alive=_keep_alive(data.keep_alive),
    )


def _keep_alive(given: float | str | None) -> float | str | None:
    """Translate every negative duration into -1: never unload when idle."""
    is_negative = (
        given[:1] == "-" and given[1:2].isdigit() if isinstance(given, str) else given is not None and given < 0
    )
    return -1 if is_negative else given


def _nanoseconds(seconds: float) -> int:
    return round(seconds * 1e9)
