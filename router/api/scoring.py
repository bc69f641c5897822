"""Scores pairs and texts for a request: the path that all rerank, score, classify and predict routes share.

An embedding model may rerank too: its score is the cosine of the vectors of query and document, or MaxSim of the
vectors of their tokens, and the answer says which.
"""

import asyncio
import time
from collections.abc import Sequence
from typing import Any, Literal, cast

import numpy as np
from litestar import Request
from msgspec import Struct, structs
from numpy.typing import NDArray

from engines.errors import ContextLengthExceeded, InvalidRequest, InvalidValue, NonFiniteEmbedding, TaskNotSupported
from engines.spec import ModelSpec, Output, Task
from engines.types import SIMILARITIES, BaseResult, EmbedCall, Embeddings, ScoreCall, Scores, Timings
from router.api.embeddings import UNNAMED_MODEL
from router.api.inference import (
    admit_call,
    headers_of,
    infos_of,
    record_result,
    refuse_outputs,
    refuse_task,
    rename_error_params,
    run_call,
)
from router.auth.model_access import resolve
from router.schemas.scoring import Method, UsedMethod
from router.server.state import ServerState, state_of

Use = Literal["rerank", "classify", "predict"]

_TASKS: dict[Use, frozenset[Task]] = {
    "rerank": frozenset({"rerank"}),
    "classify": frozenset({"classify"}),
    "predict": frozenset({"rerank", "classify"}),
}
"""The tasks of the models that can serve each use."""
METHODS: tuple[Method, ...] = ("cosine", "maxsim")
"""How embedding models score pairs: by the first of these that they have the output for."""
_OUTPUT_OF: dict[Method, Output] = {"cosine": "dense", "maxsim": "multi_vector"}
_INLINE_COMPONENTS = 2**17
"""More components of vectors are multiplied on a thread: 0.2 ms on the event loop for so many."""


class Scored(Struct, frozen=True):
    """Scores of pairs or texts.

    Attributes:
        model_id: of the model that computed them; never an alias.
        values: float32 `[n, labels]`.
        labels: names of the columns.
        result: tokens, truncated inputs and timings.
        method: how an embedding model has compared its vectors; None for scores of the model itself.
    """

    model_id: str
    values: NDArray[np.float32]
    labels: tuple[str, ...]
    result: BaseResult
    method: UsedMethod | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens run through the model, special tokens included."""
        return sum(self.result.token_counts)

    @property
    def headers(self) -> dict[str, str]:
        """See `headers_of`."""
        return headers_of(self.result)


async def score(
    request: Request[Any, Any, Any],
    model: str | None,
    call: ScoreCall,
    use: Use,
    *,
    methods: Sequence[Method] = (),
    method: Method | None = None,
) -> Scored:
    """Score the pairs or texts of `call`, which names no model yet. Loads the model first if it is not in memory.

    The model's task is that of the registry, else that of its files, which are known once it is loaded. Four cases:

    1. a reranker or classifier that can serve the use: its scores.
    2. an embedding model: by the first of `methods` that it has the output for.
    3. unknown: as in (2), and a reranker is not refused.
    4. anything else: refused, without a load where the task is known.

    Args:
        methods: how an embedding model may score, the preferred first; none: it is refused.
        method: the one of them that the request demands.

    Raises:
        TaskNotSupported: the model computes something else.
    """
    server_state = state_of(request)
    spec = resolve(request, server_state.registry, None if model == UNNAMED_MODEL else model)
    timeout_s = server_state.settings.load_timeout_s
    call = admit_call(request, server_state, structs.replace(call, model_id=spec.model_id, load_timeout_s=timeout_s))
    began_s = time.perf_counter()
    task = _task_of(server_state, spec)
    if task in (None, "embed") and methods:  # (2), (3)
        scored = await _score_by_vectors(request, spec, call, methods if method is None else (method,))
    else:
        _check_task(spec, task, use)  # (4)
        _check_method(spec, method, task)
        scored = await _score_known(request, spec, call, use)  # (1), (3)
    if scored.method is None:
        _check_task(spec, _task_of(server_state, spec), use)
        _check_method(spec, method, _task_of(server_state, spec) or "rerank")
    elif not methods:
        refuse_task(spec.model_id, "embed", use)
    _check_finite(scored.values)
    record_result(request, scored.result, began_s)
    if use == "rerank" and scored.values.shape[1] != 1:
        raise TaskNotSupported(
            f"{spec.model_id} cannot rerank: it has {scored.values.shape[1]} labels, and a reranker has one; "
            "POST /v1/classify and /predict return them",
            param="model",
        )
    return scored


def _task_of(server_state: ServerState, spec: ModelSpec) -> Task | None:
    return spec.task or next((info.task for info in infos_of(server_state, spec.model_id)), None)


def _check_task(spec: ModelSpec, task: Task | None, use: Use) -> None:
    if task is not None and task not in _TASKS[use]:
        refuse_task(spec.model_id, task, use)


def _check_method(spec: ModelSpec, method: Method | None, task: Task | None) -> None:
    if method is not None and task is not None:
        raise TaskNotSupported(
            f"{spec.model_id} cannot score by {method}: it can {task}, and the method is that of embedding models; "
            "omit method",
            param="method",
        )


async def _score_by_vectors(
    request: Request[Any, Any, Any], spec: ModelSpec, call: ScoreCall, methods: Sequence[Method]
) -> Scored:
    """Score by the first of `methods` that the model does not refuse; those that it is known to lack are not tried."""
    outputs = _outputs_of(request, spec)
    refusal: TaskNotSupported | None = None
    for method in methods:
        if outputs and _OUTPUT_OF[method] not in outputs:
            continue
        try:
            return await (_score_by_cosine if method == "cosine" else _score)(request, spec, call)
        except TaskNotSupported as error:
            refusal = error
    outputs = _outputs_of(request, spec)
    if outputs or refusal is None:
        refuse_outputs(spec.model_id, outputs, [_OUTPUT_OF[method] for method in methods], "model")
    raise refusal


def _outputs_of(request: Request[Any, Any, Any], spec: ModelSpec) -> tuple[Output, ...]:
    """Return the outputs of an embedding model; none if it is not one, or not known yet."""
    return next((info.outputs for info in infos_of(state_of(request), spec.model_id) if info.task == "embed"), ())


async def _score_known(request: Request[Any, Any, Any], spec: ModelSpec, call: ScoreCall, use: Use) -> Scored:
    """Ask the model for scores; if it turns out to be one of another task, that is the error."""
    try:
        return await _score(request, spec, call)
    except InvalidRequest:
        _check_task(spec, _task_of(state_of(request), spec), use)
        raise


async def _score(request: Request[Any, Any, Any], spec: ModelSpec, call: ScoreCall) -> Scored:
    """Ask the model for scores, which are MaxSim if it has vectors of tokens."""
    server_state = state_of(request)
    scores = await run_call(request, server_state, spec, call)
    assert isinstance(scores, Scores), "a ScoreCall is answered by Scores"
    similarity = cast(UsedMethod, scores.labels[0]) if scores.labels in SIMILARITIES else None
    return Scored(spec.model_id, scores.array(), _labels(server_state, spec, scores), scores, similarity)


def _labels(server_state: ServerState, spec: ModelSpec, scores: Scores) -> tuple[str, ...]:
    """Return the names of the columns; for a model whose files name none, as transformers names them."""
    known = [scores.labels, *(info.labels for info in infos_of(server_state, spec.model_id))]
    unnamed = tuple(f"LABEL_{index}" for index in range(scores.num_labels))
    return next((labels for labels in known if len(labels) == scores.num_labels), unnamed)


async def _score_by_cosine(request: Request[Any, Any, Any], spec: ModelSpec, call: ScoreCall) -> Scored:
    """Embed the queries, then the documents, each with its prompt.

    A query that is too long is refused, as it is never cut.

    Raises:
        InvalidValue: `max_text_tokens` would cut a document, which an embedding model cannot.
    """
    queries = EmbedCall(
        model_id=call.model_id,
        texts=call.queries,
        input_type=None if call.instruction is not None else "query",
        instruction=call.instruction,
        truncate="error",
        normalize=True,
        load_timeout_s=call.load_timeout_s,
        caller=call.caller,
        is_flex=call.is_flex,
    )
    documents = structs.replace(
        queries,
        texts=call.texts,
        input_type="document",
        instruction=None,
        truncate=call.truncate,
        keep_alive_s=call.keep_alive_s,
    )
    try:
        with rename_error_params(input="query"):
            first = await _embed(request, spec, queries)
    except ContextLengthExceeded as error:
        what = str(error).partition(": ")[0].replace("input", "query", 1)
        raise ContextLengthExceeded(f"{what}: shorten it, queries are not truncated", param=error.param) from None
    with rename_error_params(input="documents"):
        second = await _embed(request, spec, documents)
    _check_lengths(second, call.max_text_tokens)
    is_large = len(second.token_counts) * second.dimensions > _INLINE_COMPONENTS
    args = first.array(), second.array()
    values = await asyncio.to_thread(cosines, *args) if is_large else cosines(*args)
    return Scored(spec.model_id, values[:, np.newaxis], ("cosine",), _merge(first, second), "cosine")


async def _embed(request: Request[Any, Any, Any], spec: ModelSpec, call: EmbedCall) -> Embeddings:
    embeddings = await run_call(request, state_of(request), spec, call)
    assert isinstance(embeddings, Embeddings), "an EmbedCall is answered by Embeddings"
    return embeddings


def _check_lengths(documents: Embeddings, max_tokens: int | None) -> None:
    if max_tokens is None:
        return
    for index, count in enumerate(documents.token_counts):
        if count > max_tokens:
            raise InvalidValue(
                f"document {index} has {count} tokens, more than {max_tokens}, and an embedding model reads documents "
                "whole: omit the limit, or use a reranker",
                param="max_tokens_per_doc",
            )


def cosines(queries: NDArray[np.float32], texts: NDArray[np.float32]) -> NDArray[np.float32]:
    """Compute the cosine similarity of each text, `[n, width]`, to its query, `[n, width]` or one for all `[1, width]`.

    Summed in float64, row by row, so that a pair's score does not depend on the other pairs. 0 for a vector of zeros.
    """
    paired = np.broadcast_to(queries, texts.shape)
    products = np.einsum("ij,ij->i", paired, texts, dtype=np.float64)
    lengths = np.sqrt(
        np.einsum("ij,ij->i", paired, paired, dtype=np.float64) * np.einsum("ij,ij->i", texts, texts, dtype=np.float64)
    )
    found: NDArray[np.float32] = np.divide(products, lengths, out=np.zeros_like(products), where=lengths > 0).astype(
        np.float32
    )
    return found


def _merge(queries: Embeddings, documents: Embeddings) -> BaseResult:
    """Return the counts of both calls; the indexes of truncated inputs are those of documents."""
    first, second = queries.timings, documents.timings
    return BaseResult(
        token_counts=queries.token_counts + documents.token_counts,
        truncated=documents.truncated,
        timings=Timings(
            load_s=first.load_s + second.load_s,
            tokenize_s=first.tokenize_s + second.tokenize_s,
            queue_s=first.queue_s + second.queue_s,
            forward_s=first.forward_s + second.forward_s,
        ),
        batches=queries.batches + documents.batches,
        deduplicated=queries.deduplicated + documents.deduplicated,
        cache_hits=queries.cache_hits + documents.cache_hits,
    )


def _check_finite(values: NDArray[np.float32]) -> None:
    """Refuse scores that JSON cannot express; an engine checks its own."""
    is_finite = np.isfinite(values).all(axis=1)
    if not is_finite.all():
        index = int(np.argmin(is_finite))
        raise NonFiniteEmbedding(
            f"the score of text {index} is not finite: the model's dtype overflows on this text. Serve the model "
            "with `dtype: float32` or `bfloat16`",
            index=index,
        )
