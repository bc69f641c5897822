"""Embeds on hosts in this process, with the vectors that `embedyard serve` gives on this machine."""

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
from msgspec import structs

from engines.affinity import num_usable_cores
from engines.errors import (
    Busy,
    EngineError,
    InvalidRequest,
    InvalidTokenId,
    LoadFailed,
    NonFiniteEmbedding,
    Unavailable,
)
from engines.host import Host
from engines.spec import NEVER_IDLE, ModelSpec
from engines.types import EmbedCall, Embeddings, Outputs, OutputsCall
from router.backends.worker_config import MemoryRules, machine_config
from router.bulk.records import BulkError, BulkStopped, EmbedOptions, Refusal, Vectors, VectorWidths, WindowAnswer
from router.config.settings import Settings
from router.quantization import quantize

_TRIES = 5
_CHECK_S = 1.0
_GRACE_S = 10.0
_PROBE = "text"


class LocalEmbedder:
    """Runs one window at a time on each device.

    A window is one call, and nothing else runs, so its batches are the same whenever it is run again.

    Args:
        hosts: one for each device, not started.
        spec: the model.
        options: as they were asked for.
        on_close: called when all hosts are closed.
    """

    def __init__(
        self, hosts: Sequence[Host], spec: ModelSpec, options: EmbedOptions, on_close: Any = lambda: None
    ) -> None:
        self.lanes = len(hosts)
        self._hosts, self._spec, self._options, self._on_close = hosts, spec, options, on_close
        self._free: asyncio.Queue[Host] = asyncio.Queue()
        self._watch: asyncio.Task[None] | None = None
        self._refuses_long = (options.truncate or spec.truncate) == "error"
        self._max_tokens = 0

    async def open(self) -> tuple[VectorWidths, Mapping[str, Any]]:
        """See `Embedder`."""
        check_ranges(self._spec, self._options)
        for host in self._hosts:
            await host.start()
            self._free.put_nowait(host)
        self._watch = asyncio.create_task(self._check_hosts())
        answer = await self._run(self._hosts[0], [_PROBE])
        if answer.refusals:
            raise BulkError(answer.refusals[0].message)
        status = self._hosts[0].status(self._spec.model_id)
        info = status.info
        assert info is not None, "it has just answered"
        self._max_tokens = info.max_tokens
        vectors = answer.vectors
        widths = VectorWidths(
            0 if vectors.dense is None else vectors.dense.shape[1],
            0 if vectors.tokens is None else vectors.tokens[0].shape[1],
        )
        model = {"id": self._spec.model_id, "source": self._spec.source, "dtype": info.dtype, "path": info.path}
        return widths, model | {"revision": status.revision, "prompts": info.prompts}

    async def embed(self, texts: list[str]) -> WindowAnswer:
        """See `Embedder`."""
        host = await self._free.get()
        try:
            return await self._run(host, texts)
        finally:
            self._free.put_nowait(host)

    async def close(self) -> None:
        """See `Embedder`."""
        if self._watch is not None:
            self._watch.cancel()
            with suppress(asyncio.CancelledError):
                await self._watch
        for host in self._hosts:
            await host.aclose(grace_s=_GRACE_S)
        self._on_close()

    async def _run(self, host: Host, texts: list[str]) -> WindowAnswer:
        """Run a window; a text that the model cannot read, or whose vector is not finite, is refused, and the others
        are run again without it."""
        refusals: dict[int, Refusal] = {}
        while True:
            left = [index for index in range(len(texts)) if index not in refusals]
            if not left:
                return WindowAnswer(vectors=Vectors(), refusals=refusals)
            try:
                result = await self._call(host, tuple(texts[index] for index in left))
            except NonFiniteEmbedding as error:
                refusals[left[error.index]] = Refusal("non_finite_embedding", "the model's vector is not finite")
                continue
            except InvalidRequest as error:
                unreadable = await self._unreadable(host, texts, left, error)
                if not unreadable:
                    return await self._in_halves(host, texts, left, refusals)
                refusals |= unreadable
                continue
            kept = list(range(len(left)))
            if self._refuses_long:
                message = f"the text has more than {self._max_tokens} tokens, which is what the model reads"
                refusals |= {left[row]: Refusal("context_length_exceeded", message) for row in result.truncated}
                kept = [row for row in kept if row not in set(result.truncated)]
            vectors = pick_rows(self._vectors(result), kept)
            return WindowAnswer(vectors=vectors, refusals=refusals, num_tokens=sum(result.token_counts))

    async def _in_halves(
        self, host: Host, texts: Sequence[str], left: Sequence[int], refusals: Mapping[int, Refusal]
    ) -> WindowAnswer:
        """Run a window whose halves are accepted: together their outputs take too many bytes."""
        half = len(left) // 2
        groups = [left[:half], left[half:]]
        answers = [await self._run(host, [texts[index] for index in group]) for group in groups]
        refused = WindowAnswer(vectors=Vectors(), refusals=dict(enumerate(refusals.values())))
        return join_answers(len(texts), [*groups, list(refusals)], [*answers, refused])

    async def _unreadable(
        self, host: Host, texts: Sequence[str], indexes: Sequence[int], error: InvalidRequest
    ) -> dict[int, Refusal]:
        """Return the refusals of the texts for which a call of these `indexes` was refused: it is halved until each is
        alone."""
        if len(indexes) == 1:
            return {indexes[0]: Refusal(_code_of(error), of_one_text(str(error)))}
        half, found = len(indexes) // 2, dict[int, Refusal]()
        for part in (indexes[:half], indexes[half:]):
            try:
                await self._call(host, tuple(texts[index] for index in part))
            except NonFiniteEmbedding:
                continue
            except InvalidRequest as refused:
                found |= await self._unreadable(host, texts, part, refused)
        return found

    async def _call(self, host: Host, texts: tuple[str, ...]) -> Embeddings | Outputs:
        """Run one call; what a device cannot do for the moment is tried again.

        Raises:
            InvalidRequest: it is about one of the texts.
            NonFiniteEmbedding.
            BulkError, BulkStopped: for the whole job.
        """
        options = self._options
        fields: dict[str, Any] = {
            "model_id": self._spec.model_id, "texts": texts, "input_type": options.input_type, "prompt": options.prompt,
            "truncate": "end" if self._refuses_long else options.truncate, "dimensions": options.dimensions,
            "load_timeout_s": 3600.0,
        }  # fmt: skip
        is_dense = options.outputs == ("dense",)
        call = EmbedCall(**fields) if is_dense else OutputsCall(outputs=options.outputs, **fields)
        for attempt in range(_TRIES):
            try:
                result = await host.run(call)
            except EngineError as error:
                if _is_of_one_text(error):
                    raise
                if isinstance(error, LoadFailed) or not isinstance(error, Busy | Unavailable):
                    raise BulkError(str(error)) from error
                if attempt == _TRIES - 1:
                    raise BulkStopped(str(error)) from error
                await asyncio.sleep(min(error.retry_after_s, 30.0))
            else:
                assert isinstance(result, Embeddings | Outputs), "the answers of these calls"
                return result
        raise AssertionError("the last attempt returns or raises")

    def _vectors(self, result: Embeddings | Outputs) -> Vectors:
        dtype, calibration = self._options.dtype, self._spec.calibration
        has_dense = "dense" in self._options.outputs
        dense = quantize(result.array(), dtype, calibration) if has_dense else None
        if isinstance(result, Embeddings):
            return Vectors(dense=dense)
        sparse = tokens = None
        if "sparse" in self._options.outputs:
            entries, weights = result.terms()
            sparse = list(zip(_split(entries, result.num_terms), _split(weights, result.num_terms), strict=True))
        if "multi_vector" in self._options.outputs:
            tokens = _split(quantize(result.vectors(), dtype), result.num_vectors)
        return Vectors(dense=dense, sparse=sparse, tokens=tokens)

    async def _check_hosts(self) -> None:
        """Fail the calls of a device that does not respond, as the server does."""
        while True:
            await asyncio.sleep(_CHECK_S)
            for host in self._hosts:
                host.check()


def open_local(
    settings: Settings, memory: MemoryRules, spec: ModelSpec, options: EmbedOptions, *, cores: int | None = None
) -> LocalEmbedder:
    """Create the hosts of this machine, as `embedyard serve` does, for one model.

    Args:
        settings: of the machine.
        memory: what the model may use.
        spec: the model.
        options: as they were asked for.
        cores: None takes all that this process may use.

    Raises:
        InvalidValue: a requested device does not exist.
    """
    from engines.machine import Machine  # late: torch takes seconds to import

    config = machine_config(settings, memory, settings.device, cores or num_usable_cores())
    config = structs.replace(
        config, loader=structs.replace(config.loader, even_batches=True, max_queue_requests=None, batch_timeout_s=0.0)
    )
    # The cache would leave texts out of batches.
    own = structs.replace(spec, cache_bytes=0, preload=False, keep_alive_s=NEVER_IDLE, replicas=1)
    machine = Machine(config, {own.model_id: own})
    hosts = [host for host in machine.hosts if host.state(own.model_id) is not None]
    if not hosts:
        machine.close()
        raise BulkError(f"{own.model_id} is for device {own.device}, which this machine does not have")
    return LocalEmbedder(hosts, own, options, machine.close)


def join_answers(num_texts: int, groups: Sequence[Sequence[int]], answers: Sequence[WindowAnswer]) -> WindowAnswer:
    """Return the answers of groups as one, in the order of the texts."""
    refusals = {
        group[row]: refusal
        for group, answer in zip(groups, answers, strict=True)
        for row, refusal in answer.refusals.items()
    }
    places: list[int] = []
    parts: list[Vectors] = []
    for group, answer in zip(groups, answers, strict=True):
        found = [index for row, index in enumerate(group) if row not in answer.refusals]
        if found:
            places += found
            parts.append(answer.vectors)
    joined = Vectors()
    if parts:
        dense: list[Any] = [part.dense for part in parts if part.dense is not None]
        sparse = [row for part in parts for row in part.sparse or ()]
        tokens = [row for part in parts for row in part.tokens or ()]
        order = np.argsort(places, kind="stable")
        joined = Vectors(dense=np.concatenate(dense) if dense else None, sparse=sparse or None, tokens=tokens or None)
        joined = pick_rows(joined, [int(row) for row in order])
    assert len(places) + len(refusals) == num_texts, "each text has one outcome"
    return WindowAnswer(vectors=joined, refusals=refusals, num_tokens=sum(answer.num_tokens for answer in answers))


def of_one_text(message: str) -> str:
    """Return the message of a refusal for the one text of a call, which the file of errors names by its line."""
    return message.replace("input[0]", "the text", 1)


def _is_of_one_text(error: EngineError) -> bool:
    return isinstance(error, NonFiniteEmbedding) or (isinstance(error, InvalidRequest) and error.param == "input")


def _code_of(error: InvalidRequest) -> str:
    return "invalid_token_id" if isinstance(error, InvalidTokenId) else "invalid_value"


def check_ranges(spec: ModelSpec, options: EmbedOptions) -> None:
    """Check that int8 and uint8 have ranges that are the same for all texts.

    Raises:
        BulkError: the model has no calibration, or vectors of tokens are asked for.
    """
    if options.dtype not in ("int8", "uint8"):
        return
    if spec.calibration is None:
        raise BulkError(
            f"--dtype {options.dtype} needs a calibration of {spec.model_id} in the registry (embedyard calibrate): "
            "without it each part of OUT would have ranges of its own; or use binary or ubinary"
        )
    if "multi_vector" in options.outputs:
        raise BulkError(f"--dtype {options.dtype} is for dense vectors: use float, binary or ubinary for multi_vector")


def pick_rows(vectors: Vectors, rows: Sequence[int]) -> Vectors:
    """Return the outputs of some texts."""
    return Vectors(
        dense=None if vectors.dense is None else vectors.dense[list(rows)],
        sparse=None if vectors.sparse is None else [vectors.sparse[row] for row in rows],
        tokens=None if vectors.tokens is None else [vectors.tokens[row] for row in rows],
    )


def _split(matrix: Any, counts: Sequence[int]) -> list[Any]:
    found, start = [], 0
    for count in counts:
        found.append(matrix[start : start + count])
        start += count
    return found
