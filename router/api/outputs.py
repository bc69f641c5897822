"""Runs a model for several outputs of each text: sparse weights and vectors of tokens, beside or without dense vectors.

Requests for dense vectors alone do not come here: `router/api/embeddings.py` serves them.
"""

import asyncio
import time
from collections.abc import Callable, Iterable
from typing import Any, Literal

from litestar import Request
from litestar.response.base import ASGIResponse
from msgspec import Struct, structs

from engines.errors import DimensionsNotSupported, InvalidValue, TaskNotSupported
from engines.spec import ModelSpec, Output
from engines.types import MAX_ANSWER_BYTES, BaseResult, EmbedCall, ModelInfo, Outputs, OutputsCall
from router.api.decoding import decode_token_ids, embed_call
from router.api.encoding import OutputFormat, check_ranges
from router.api.inference import admit_call, infos_of, record_result, refuse_outputs, refuse_task, run_call
from router.api.outputs_encoding import encode_outputs
from router.auth.model_access import resolve
from router.limits.limiter import permit_of
from router.schemas.inference import EmbeddingRequest
from router.server.application import while_client_stays
from router.server.state import ServerState, state_of

Wanted = Output | Literal["tokens"]

_REPORT_S = 0.1
_REPORTS = 20
"""The host of another process says within a second what a model has that it has just loaded."""


_SMALL_BYTES = 2**20
"""Answers that cannot be larger hold no memory of the limiter: as many as may run at once are 1 GiB."""

_FRAME_TOKENS = 64
MOST_TERMS = 8192
"""Entries of a sparse output at most (`engines.models.outputs.MAX_TERMS`)."""
_WIDEST = 1024
"""Numbers in a hidden state, and in a vector of a model that was not loaded yet: bge-m3's."""
_LONGEST = 8192


class OutputsAnswer(Struct, frozen=True):
    """The outputs, and the model that computed them."""

    spec: ModelSpec
    result: Outputs


async def answer_outputs(
    request: Request[Any, Any, Any],
    wanted: EmbeddingRequest,
    outputs: tuple[Output, ...],
    headers: Callable[[BaseResult], dict[str, str]],
) -> ASGIResponse:
    """Compute `outputs` of the inputs of `wanted`, and answer as `POST /v1/embeddings` does, with these headers."""
    answer = await compute_outputs(request, wanted, outputs)
    output = OutputFormat(
        encoding=wanted.encoding_format or "float",
        dtype=wanted.output_dtype or "float",
        calibration=answer.spec.calibration,
    )
    has_names = bool(wanted.return_tokens)
    return await encode_outputs(
        answer.result, answer.spec.model_id, output, headers(answer.result), has_names=has_names
    )


async def compute_outputs(
    request: Request[Any, Any, Any], wanted: EmbeddingRequest, outputs: tuple[Wanted, ...]
) -> OutputsAnswer:
    """Compute `outputs` of the inputs of `wanted`. Loads the model first if it is not in memory.

    Raises:
        InvalidValue: an output twice, or `late_chunking`.
        DimensionsNotSupported: `dimensions` without dense vectors.
        TaskNotSupported: the model lacks one of the outputs; the message names those that it has.
    """
    server_state = state_of(request)
    spec = resolve(request, server_state.registry, wanted.model)
    if spec.task is not None and spec.task != "embed":
        refuse_task(spec.model_id, spec.task, "embed")
    call = outputs_call(
        wanted, embed_call(wanted, spec.model_id, load_timeout_s=server_state.settings.load_timeout_s), outputs
    )
    call = admit_call(request, server_state, call)
    if "dense" in outputs:
        check_ranges(spec, (wanted.output_dtype,), call.num_items, wanted.normalize)
    if call.token_ids and spec.token_encoding is not None:
        texts = await decode_token_ids(spec.token_encoding, call.token_ids)
        call = structs.replace(call, texts=texts, token_ids=())
    began_s = time.perf_counter()
    size_bytes = largest_answer_bytes(call, infos_of(server_state, spec.model_id))
    if size_bytes > _SMALL_BYTES:
        async with while_client_stays(request):
            await permit_of(request).reserve_answer(size_bytes)
    try:
        result = await run_call(request, server_state, spec, call)
    except TaskNotSupported:
        await _refuse(server_state, spec.model_id, outputs)
        raise
    assert isinstance(result, Outputs), "an OutputsCall is answered by Outputs"
    record_result(request, result, began_s)
    return OutputsAnswer(spec, result)


def largest_answer_bytes(call: OutputsCall, infos: Iterable[ModelInfo]) -> int:
    """Return the bytes that the outputs of a call may take, from the characters of its texts.

    Tokenizers give at most about one token for a character. The engine counts the tokens and refuses what is larger.

    Args:
        infos: what the hosts know of the model; its widths and its longest input.
    """
    info = next(iter(infos), None)
    longest = _LONGEST if info is None else info.max_tokens
    frame = _FRAME_TOKENS + len(call.prompt or "") + len(call.instruction or "")
    size_bytes = 0
    if "dense" in call.outputs:
        size_bytes += 4 * call.num_items * (_WIDEST if info is None else info.dimensions)
    if "sparse" in call.outputs:
        most = MOST_TERMS if info is None else min(info.vocab_size, MOST_TERMS)
        size_bytes += 8 * call.num_items * min(call.sparse_top_k or most, most)
    if {"multi_vector", "tokens"} & {*call.outputs}:
        tokens = sum(min(frame + len(text), longest) for text in call.texts or call.token_ids)
        size_bytes += 4 * tokens * (_WIDEST if info is None or "tokens" in call.outputs else info.vector_width)
    return min(size_bytes, MAX_ANSWER_BYTES)


def outputs_call(wanted: EmbeddingRequest, call: EmbedCall, outputs: tuple[Wanted, ...]) -> OutputsCall:
    """Build the engine's call for `outputs`, from the call for dense vectors of the same request.

    Raises:
        InvalidValue, DimensionsNotSupported: as for `compute_outputs`.
    """
    twice = next((output for index, output in enumerate(outputs) if output in outputs[:index]), None)
    if twice is not None:
        raise InvalidValue(f"outputs has {twice} twice: name each output once", param="outputs")
    if wanted.late_chunking:
        raise InvalidValue(
            f"late_chunking gives dense vectors, and the outputs are {' and '.join(outputs)}: omit one of the two",
            param="late_chunking",
        )
    if call.dimensions is not None and "dense" not in outputs:
        raise DimensionsNotSupported(
            f"dimensions applies to dense vectors, and the outputs are {' and '.join(outputs)}: omit it",
            param="dimensions",
        )
    common = {name: getattr(call, name) for name in EmbedCall.__struct_fields__}
    return OutputsCall(
        **common,
        outputs=outputs,
        sparse_top_k=wanted.sparse_top_k,
        sparse_min_weight=wanted.sparse_min_weight or 0.0,
        pool_factor=wanted.pool_factor or 1,
        names_terms=bool(wanted.return_tokens) and "sparse" in outputs,
    )


async def outputs_without_dense(
    request: Request[Any, Any, Any], model: str | None, refusal: TaskNotSupported
) -> tuple[Output, ...]:
    """Return all outputs of a model that has just refused to compute dense vectors.

    Raises:
        TaskNotSupported: `refusal`, if the model does not embed.
    """
    server_state = state_of(request)
    spec = resolve(request, server_state.registry, model)
    info = None if spec.task not in (None, "embed") else await _info(server_state, spec.model_id)
    if info is None or info.task != "embed" or not info.outputs or "dense" in info.outputs:
        raise refusal
    return info.outputs


async def _refuse(server_state: ServerState, model_id: str, outputs: tuple[Wanted, ...]) -> None:
    """Raise what the model lacks and what it has instead; nothing if it is not known."""
    info = await _info(server_state, model_id)
    if info is not None and info.task == "embed" and not {*outputs} <= {*info.outputs, "tokens"}:
        refuse_outputs(model_id, info.outputs, outputs, "outputs")


async def _info(server_state: ServerState, model_id: str) -> ModelInfo | None:
    """Return what is known of a model that has just answered; None if its host does not say."""
    for _ in range(_REPORTS):
        info = next(infos_of(server_state, model_id), None)
        if info is not None:
            return info
        await asyncio.sleep(_REPORT_S)
    return None
