"""Defines a request on its way through one model: its inputs as ids, their queue entries, and its rows."""

import asyncio
from collections.abc import Mapping
from typing import Any

from msgspec import Struct

from engines.batching.output import OutputSpec, Row
from engines.errors import InvalidValue
from engines.inputs.prompts import PromptTemplate, select_prompt
from engines.inputs.tokenizer import IdReading, Ids, TextReading, TokenizedRequest, Tokenizer
from engines.spec import ModelSpec, Truncate
from engines.types import Batch, TextCall

Key = tuple[bytes, int, str, type[OutputSpec]]
"""What an output depends on within one engine: the ids, how many of them are a prompt that pooling leaves out, the
callers that may learn that it exists (`Origin.circle`), and the kind of output."""


class Origin(Struct, frozen=True):
    """The caller of a request.

    An output that exists already is returned sooner, which tells a caller who guesses a text that another has asked for
    it. Outputs are therefore reused within one caller's requests only, or among all callers where the registry says so.

    Args:
        caller: empty where callers are not told apart.
        is_open: whether callers share their outputs.
        is_flex: whether the request uses only what others leave idle.
    """

    caller: str = ""
    is_open: bool = False
    is_flex: bool = False

    @property
    def circle(self) -> str:
        """Returns the part of a key that keeps callers apart; empty where they share."""
        return "" if self.is_open else self.caller


NOBODY = Origin()
"""The origin of requests on servers that do not tell callers apart."""


class PendingRequest:
    """One request.

    Attributes:
        caller: empty where callers are not told apart.
        is_flex: whether it uses only what other requests leave idle.
        keys: of each input.
        output: what it wants of each input.
        rows: one for each input, as `output.allocate` made them; the thread that has a row stores it.
        unscheduled: its own entries that are in no batch yet, the longest last.
        entries: all entries that it waits for, its own or not.
        rows_missing: the event loop counts it down.
        needs_thread: whether a thread must be told of it; false where one waits for more requests to join its batch.
        done: resolved with None when all rows are stored, or with the error.
        started_at: when the first batch that holds one of its entries began.
        batches: forward passes to be reported with its result; the scheduler's threads append to it.
    """

    def __init__(
        self,
        encoded: TokenizedRequest,
        output: OutputSpec,
        loop: asyncio.AbstractEventLoop,
        now_s: float,
        origin: Origin = NOBODY,
    ) -> None:
        self.ids = encoded.ids
        self.caller = origin.caller
        self.is_flex = origin.is_flex
        circle, kind = origin.circle, type(output)
        self.keys: list[Key] = [(ids.tobytes(), encoded.prompt_tokens, circle, kind) for ids in encoded.ids]
        self.output = output
        self.rows: Any = output.allocate(len(encoded.ids))
        self.unscheduled: list[Entry] = []
        self.entries: list[Entry] = []
        self.num_tokens = sum(map(len, encoded.ids))
        self.rows_missing = len(encoded.ids)
        self.needs_thread = True
        self.done: asyncio.Future[None] = loop.create_future()
        self.admitted_at = now_s
        self.started_at: float | None = None
        self.batches: list[Batch] = []

    def use_cached(self, cached: Mapping[int, Row]) -> None:
        """Stores the rows of the inputs (by index) that the cache had; before the request is admitted."""
        rows = self.output.finish_cached(list(cached.values()))
        for index, row in zip(cached, rows, strict=True):
            self.rows[index] = row
        self.rows_missing -= len(cached)


class RowTarget(Struct, frozen=True, eq=False):
    """One input of one request."""

    job: PendingRequest
    index: int


class Entry(Struct, eq=False):
    """One distinct input in the queue or in a batch, and all requests that want its output.

    `owner`: the request that has it among its `unscheduled`, and whose share of a batch takes it; None once one has.
    `is_flex`: it waits for, or is in a batch of, flex requests.
    """

    ids: Ids
    key: Key
    targets: list[RowTarget]
    owner: PendingRequest | None = None
    is_flex: bool = False

    @property
    def prompt_tokens(self) -> int:
        """Returns the number of leading tokens that pooling leaves out."""
        return self.key[1]

    @property
    def kind(self) -> type[OutputSpec]:
        """Returns the kind of output that it waits for."""
        return self.key[3]


MAX_FRAME_CHARS = 1 << 24
"""The most characters that prompts may add to a request: it carries a prompt once, and each input is read with it."""


def prepare_inputs(
    call: TextCall, tokenizer: Tokenizer, spec: ModelSpec, prompts: Mapping[str, str]
) -> TextReading | IdReading:
    """Returns the inputs ready for tokenization, with their prompts, to be truncated to what the model reads.

    Raises:
        InvalidRequest: they cannot be read as the call says.
    """
    if call.token_ids:
        truncate = call.truncate or spec.truncate or tokenizer.limits.truncate
        if call.max_tokens is not None:
            tokenizer = _limit(tokenizer, call.max_tokens)
        if call.input_type is not None or call.instruction is not None or call.prompt is not None:
            raise InvalidValue("token ids are taken verbatim: no prompt can be put in front of them", param="input")
        return tokenizer.read_ids(call.token_ids, truncate, must_be_framed=not spec.unframed_token_ids)
    tokenizer, frame, truncate = choose_frame(call, tokenizer, spec, prompts)
    return tokenizer.read(call.texts, frame, truncate)


def choose_frame(
    call: TextCall, tokenizer: Tokenizer, spec: ModelSpec, prompts: Mapping[str, str]
) -> tuple[Tokenizer, PromptTemplate, Truncate]:
    """Returns the tokenizer with the call's limit, the prompt around its texts, and the side that is truncated.

    Raises:
        InvalidRequest: they cannot be read as the call says.
    """
    truncate = call.truncate or spec.truncate or tokenizer.limits.truncate
    if call.max_tokens is not None:
        tokenizer = _limit(tokenizer, call.max_tokens)
    if call.instruction is not None:
        _check_frame(call, len(call.instruction))
    frame = select_prompt(call, prompts, spec.default_prompt, spec.instruction_template)
    _check_frame(call, frame.num_chars)
    return tokenizer, frame, truncate


def _limit(tokenizer: Tokenizer, max_tokens: int) -> Tokenizer:
    least = 1 + len(tokenizer.limits.prefix) + len(tokenizer.limits.suffix)
    if max_tokens < least:
        raise InvalidValue(
            f"truncate_prompt_tokens is {max_tokens}, and {least - 1} of these are special tokens: send {least} or "
            "more",
            param="truncate_prompt_tokens",
        )
    return tokenizer.limited_to(max_tokens) if max_tokens < tokenizer.max_tokens else tokenizer


def _check_frame(call: TextCall, num_chars: int) -> None:
    total = num_chars * len(call.texts)
    if total > MAX_FRAME_CHARS:
        param = "prompt" if call.prompt is not None else "instruction" if call.instruction is not None else "input_type"
        raise InvalidValue(
            f"{param} puts {num_chars} characters around each of {len(call.texts)} inputs: {total} in all, and a "
            f"request may have {MAX_FRAME_CHARS}; shorten it, or send fewer inputs",
            param=param,
        )
