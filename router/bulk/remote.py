"""Embeds by a running server's `POST /v1/embeddings`: several requests in flight, refusals obeyed."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

import httpx2
import msgspec
import numpy as np
from msgspec import Struct

from router.bulk.local import join_answers, of_one_text
from router.bulk.records import BulkError, BulkStopped, EmbedOptions, Refusal, Vectors, VectorWidths, WindowAnswer
from router.bulk.writers import NUMBERS
from router.config.setting_values import is_loopback
from router.quantization import Matrix

REQUEST_TOKENS = 16_384
"""About so many tokens in a request: on two cores two seconds of a small model."""

_MAX_TEXTS = 256
_CHARS_PER_TOKEN = 4
_TRIES = 10
_LONGEST_WAIT_S = 60.0
_TIMEOUT_S = 900.0
_OF_ONE_TEXT = frozenset({"context_length_exceeded", "non_finite_embedding", "empty_input"})
"""Codes that are about a text, and not about the job."""

_OF_INPUT = frozenset({"invalid_value", "invalid_token_id"})
"""Codes that are about a text where they name `input`: its tokenizer cannot read it."""

_SPACE, _EXPECT_SPACE = "x-embedding-space", "x-expect-space"
_SERVER_TIMES = "server-timing"
"""A header of all answers of an Embedyard server."""

_SPACE_TRIES = 30
"""Probes, one a second, until a server that has just loaded the model knows its space: it hashes weights then."""


class _Sparse(Struct, frozen=True):
    indices: list[int]
    values: list[float]


class _Array(Struct, frozen=True):
    shape: tuple[int, int]
    data: bytes


class _Item(Struct, frozen=True):
    index: int
    embedding: bytes | None = None
    sparse_embedding: _Sparse | None = None
    multi_vector_embedding: _Array | None = None


class _Usage(Struct, frozen=True):
    prompt_tokens: int = 0


class _Answer(Struct, frozen=True):
    data: list[_Item]
    model: str = ""
    usage: _Usage = _Usage()


class _Detail(Struct, frozen=True):
    message: str
    code: str | None = None
    param: str | None = None


class _Envelope(Struct, frozen=True):
    error: _Detail


class _Refused(Exception):
    """The server refused a request for what it says."""

    def __init__(self, status: int, detail: _Detail) -> None:
        super().__init__(detail.message)
        self.status, self.detail = status, detail


class RemoteEmbedder:
    """Sends windows to a server, in requests of texts of about equal length.

    Args:
        url: of the server, with or without `/v1`.
        model: a name that it knows.
        options: as they were asked for.
        key: the API key.
        concurrency: requests in flight.
        sleep: waits.
        transport: of httpx2; None is the network.
    """

    lanes = 2
    """The next window's requests follow while the last ones of a window are answered."""

    def __init__(  # noqa: PLR0913  # everything that differs from server to server; named where it is called
        self,
        url: str,
        model: str,
        options: EmbedOptions,
        *,
        key: str | None = None,
        concurrency: int = 4,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        transport: httpx2.AsyncBaseTransport | None = None,
    ) -> None:
        self._url = f"{url.rstrip('/').removesuffix('/v1')}/v1/embeddings"
        self._model, self._options = model, options
        self._sleep = sleep
        self._permits = asyncio.Semaphore(concurrency)
        self._space = ""
        self._client = httpx2.AsyncClient(
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=_TIMEOUT_S,
            transport=transport,
            trust_env=not is_loopback(urlsplit(url).hostname or ""),
        )

    async def open(self) -> tuple[VectorWidths, Mapping[str, Any]]:
        """See `Embedder`; one text tells the widths, the space, and whether int8 has ranges of the model's own."""
        try:
            answer = await self._probe()
        except _Refused as error:
            if error.detail.param == "output_dtype" or "at least 2 inputs" in error.detail.message:
                raise BulkError(
                    f"--dtype {self._options.dtype}: {self._model} has no calibration on that server, so each request "
                    "would have ranges of its own: calibrate it (embedyard calibrate), or use binary or ubinary"
                ) from None
            raise self._stop(error) from None
        vectors = self._vectors(answer, 1)
        widths = VectorWidths(
            0 if vectors.dense is None else vectors.dense.shape[1],
            0 if vectors.tokens is None else vectors.tokens[0].shape[1],
        )
        return widths, {"id": answer.model, "url": self._url, "space": self._space}

    async def _probe(self) -> _Answer:
        """Embed one text; again while the server does not know the space of its vectors yet."""
        for _ in range(_SPACE_TRIES):
            answer, headers = await self._post(["text"])
            self._space = headers.get(_SPACE, "")
            if self._space or _SERVER_TIMES not in headers:
                break
            await self._sleep(1.0)
        return answer

    async def embed(self, texts: list[str]) -> WindowAnswer:
        """See `Embedder`."""
        groups = group_by_length(texts)
        running = [asyncio.create_task(self._answer([texts[index] for index in group])) for group in groups]
        try:
            return join_answers(len(texts), groups, await asyncio.gather(*running))
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)

    async def close(self) -> None:
        """See `Embedder`."""
        await self._client.aclose()

    async def _answer(self, texts: list[str]) -> WindowAnswer:
        """Return the outputs of a request's texts; one that is refused for a text is halved until that is alone."""
        try:
            async with self._permits:
                answer, _ = await self._post(texts)
        except _Refused as error:
            if not _is_of_one_text(error.detail):
                raise self._stop(error) from None
            if len(texts) > 1:
                half = len(texts) // 2
                halves = [await self._answer(texts[:half]), await self._answer(texts[half:])]
                groups = [list(range(half)), list(range(half, len(texts)))]
                return join_answers(len(texts), groups, halves)
            refusal = Refusal(error.detail.code or "invalid_value", of_one_text(error.detail.message))
            return WindowAnswer(vectors=Vectors(), refusals={0: refusal})
        return WindowAnswer(vectors=self._vectors(answer, len(texts)), num_tokens=answer.usage.prompt_tokens)

    async def _post(self, texts: list[str]) -> tuple[_Answer, Mapping[str, str]]:
        """Send a request until it is answered or refused for good; return the answer and its headers.

        Once the space is known, a server whose model is another one by now refuses: half of OUT would be of each.
        """
        body = msgspec.json.encode({"input": texts, **self._fields()})
        headers = {"Content-Type": "application/json"} | ({_EXPECT_SPACE: self._space} if self._space else {})
        failure = ""
        for attempt in range(_TRIES):
            try:
                response = await self._client.post(self._url, content=body, headers=headers)
            except httpx2.TransportError as error:
                failure, wait_s = f"no server answers at {self._url} ({type(error).__name__})", _backoff_s(attempt)
            else:
                if response.status_code == 200:
                    return _decode(response.content, self._url), response.headers
                refused = _refusal(response)
                if not _may_retry(response):
                    raise refused
                failure, wait_s = str(refused), _wait_s(response, attempt)
            if attempt < _TRIES - 1:
                await self._sleep(wait_s)
        raise BulkStopped(f"{failure}; tried {_TRIES} times")

    def _fields(self) -> dict[str, Any]:
        options = self._options
        given = {
            "dimensions": options.dimensions, "input_type": options.input_type, "prompt": options.prompt,
            "truncate": options.truncate, "output_dtype": None if options.dtype == "float" else options.dtype,
            "outputs": None if options.outputs == ("dense",) else options.outputs,
        }  # fmt: skip
        return {"model": self._model, "encoding_format": "base64"} | {k: v for k, v in given.items() if v is not None}

    def _vectors(self, answer: _Answer, num_texts: int) -> Vectors:
        items = sorted(answer.data, key=lambda item: item.index)
        outputs, number = self._options.outputs, NUMBERS[self._options.dtype]
        try:
            if [item.index for item in items] != list(range(num_texts)):
                raise ValueError
            dense: Any = None
            if "dense" in outputs:
                dense = np.stack([_array(item.embedding, number) for item in items])
            sparse = [_terms(item.sparse_embedding) for item in items] if "sparse" in outputs else None
            tokens = None
            if "multi_vector" in outputs:
                tokens = [_matrix(item.multi_vector_embedding, number) for item in items]
        except (ValueError, TypeError):
            raise BulkError(f"{self._url} did not answer {' and '.join(outputs)} for each text") from None
        return Vectors(dense=dense, sparse=sparse, tokens=tokens)

    def _stop(self, error: _Refused) -> BulkError | BulkStopped:
        if error.status >= 500:
            return BulkStopped(str(error))
        if error.detail.code == "space_mismatch":
            return BulkError(
                f"the model on the server is not the one that this job began with: {error}. Serve that one again, or "
                "begin anew with --overwrite"
            )
        hint = "; see --api-key" if error.status in (401, 403) else ""
        return BulkError(f"{error}{hint}")


def _is_of_one_text(detail: _Detail) -> bool:
    return detail.code in _OF_ONE_TEXT or (detail.code in _OF_INPUT and detail.param == "input")


def group_by_length(texts: Sequence[str]) -> list[list[int]]:
    """Return the indexes of texts in groups for one request each, the longest first."""
    groups: list[list[int]] = []
    tokens = 0
    for index in sorted(range(len(texts)), key=lambda index: (-len(texts[index]), index)):
        size = len(texts[index]) // _CHARS_PER_TOKEN + 1
        if not groups or tokens + size > REQUEST_TOKENS or len(groups[-1]) == _MAX_TEXTS:
            groups.append([])
            tokens = 0
        groups[-1].append(index)
        tokens += size
    return groups


def _decode(content: bytes, url: str) -> _Answer:
    try:
        return msgspec.json.decode(content, type=_Answer)
    except msgspec.DecodeError:
        raise BulkError(f"{url} did not answer as OpenAI's API does with encoding_format base64") from None


def _refusal(response: httpx2.Response) -> _Refused:
    try:
        detail = msgspec.json.decode(response.content, type=_Envelope).error
    except msgspec.DecodeError:
        detail = _Detail(f"{response.url} answered {response.status_code}")
    return _Refused(response.status_code, detail)


def _may_retry(response: httpx2.Response) -> bool:
    if response.headers.get("x-should-retry") == "false":
        return False
    return response.status_code in (408, 409, 429) or response.status_code >= 500


def _wait_s(response: httpx2.Response, attempt: int) -> float:
    """Return the wait that a refusal tells: `retry-after-ms`, or `Retry-After` in seconds; else a growing one."""
    for name, scale in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        try:
            return max(0.0, float(response.headers[name]) * scale)
        except (KeyError, ValueError):
            continue
    return _backoff_s(attempt)


def _backoff_s(attempt: int) -> float:
    return min(0.5 * 2.0**attempt, _LONGEST_WAIT_S)


def _array(data: bytes | None, number: "np.dtype[Any]") -> Matrix:
    if data is None:
        raise ValueError("no embedding")
    found: Matrix = np.frombuffer(data, number)
    return found


def _terms(sparse: _Sparse | None) -> tuple[Any, Any]:
    if sparse is None:
        raise ValueError("no sparse embedding")
    return np.array(sparse.indices, np.int32), np.array(sparse.values, np.float32)


def _matrix(array: _Array | None, number: "np.dtype[Any]") -> Matrix:
    if array is None:
        raise ValueError("no vectors of tokens")
    found: Matrix = np.frombuffer(array.data, number).reshape(array.shape)
    return found
