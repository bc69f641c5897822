"""What a request asks of one model: its texts as ids, and the width and length of its vectors; or a refusal."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from engines.errors import DimensionsNotSupported, InvalidValue
from engines.inputs.prompts import select_prompt
from engines.inputs.tokenizer import IdReading, Ids, TextReading, TokenizedRequest, Tokenizer
from engines.spec import ModelSpec
from engines.types import Batch, EmbedCall, ModelInfo

Key = tuple[bytes, int, str]
"""What a vector depends on, within one engine: the ids, and how many of them are a prompt that pooling leaves out; and
who may know that it is there (`Origin.circle`)."""


class OutputSpec(Struct, frozen=True):
    """What a request wants of each vector; inputs that want the same are finished together."""

    dimensions: int
    normalized: bool
    pre_norm: bool


class Origin(Struct, frozen=True):
    """Whom a request is for.

    Vectors that are there already are had sooner, and so tell whoever guesses a text that somebody has asked for it.
    They are therefore reused within a circle of callers only: one, or all of them where the registry says so.

    Args:
        caller: empty where nobody is told apart.
        is_open: whether callers share their vectors.
    """

    caller: str = ""
    is_open: bool = False

    @property
    def circle(self) -> str:
        """What the keys of its texts hold."""
        return "" if self.is_open else self.caller


NOBODY = Origin()


class PendingRequest:
    """One request.

    Attributes:
        caller: whom it is for; empty where nobody is told apart.
        keys: of each input.
        rows: float32 `[n, dimensions]`, filled row by row by whoever has the vectors.
        pending: its own texts that are not yet cut, the longest last.
        wanted: all texts that it waits for, its own or not.
        left: rows still missing; the event loop counts it down.
        done: resolved with None when all rows are there, or with the error.
        started_at: when the first batch that holds one of its texts began.
        batches: forward passes that its answer tells about; the lane's threads add to it.
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
        self.keys: list[Key] = [(ids.tobytes(), encoded.prompt_tokens, origin.circle) for ids in encoded.ids]
        self.output = output
        self.rows: NDArray[np.float32] = np.empty((len(encoded.ids), output.dimensions), dtype=np.float32)
        self.unscheduled: list[Entry] = []
        self.entries: list[Entry] = []
        self.num_tokens = sum(len(ids) for ids in encoded.ids)
        self.rows_missing = len(encoded.ids)
        self.done: asyncio.Future[None] = loop.create_future()
        self.admitted_at = now_s
        self.started_at: float | None = None
        self.batches: list[Batch] = []


@dataclass(frozen=True)
class RowTarget:
    """One input of one job."""

    job: PendingRequest
    index: int


@dataclass(eq=False)
class Entry:
    """One distinct input under way, and all who want its vector.

    `owner`: who has it among its `pending`, and whose share of a batch takes it; None once one has.
    """

    ids: Ids
    key: Key
    targets: list[RowTarget]
    owner: PendingRequest | None = None

    @property
    def prompt_tokens(self) -> int:
        """Leading tokens that pooling leaves out."""
        return self.key[1]


MAX_FRAME_CHARS = 1 << 24
"""The most characters that prompts may add to a request, which carries them once and has them read with each input."""


def prepare_inputs(
    call: EmbedCall, tokenizer: Tokenizer, spec: ModelSpec, prompts: Mapping[str, str]
) -> TextReading | IdReading:
    """The inputs on their way to ids, prompts in front, to be cut to what the model reads.

    Raises:
        InvalidRequest: they cannot be read as the call says.
    """
    truncate = call.truncate or spec.truncate or tokenizer.limits.truncate
    if call.token_ids:
        if call.input_type is not None or call.instruction is not None or call.prompt is not None:
            raise InvalidValue("token ids are taken verbatim: no prompt can be put in front of them", param="input")
        return tokenizer.read_ids(call.token_ids, truncate, must_be_framed=not spec.unframed_token_ids)
    if call.instruction is not None:
        _check_frame(call, len(call.instruction))
    frame = select_prompt(call, prompts, spec.default_prompt, spec.instruction_template)
    _check_frame(call, frame.num_chars)
    return tokenizer.read(call.texts, frame, truncate)


def _check_frame(call: EmbedCall, num_chars: int) -> None:
    total = num_chars * len(call.texts)
    if total > MAX_FRAME_CHARS:
        param = "prompt" if call.prompt is not None else "instruction" if call.instruction is not None else "input_type"
        raise InvalidValue(
            f"{param} puts {num_chars} characters around each of {len(call.texts)} inputs: {total} in all, and a "
            f"request may have {MAX_FRAME_CHARS}; shorten it, or send fewer inputs",
            param=param,
        )


def output_spec(call: EmbedCall, info: ModelInfo, *, normalize: bool, target_dim: int | None) -> OutputSpec:
    """Width and length of the vectors; `normalize` and `target_dim` where the call says nothing.

    Raises:
        DimensionsNotSupported: naming the widths that the model gives.
    """
    native, allowed = info.dimensions, info.matryoshka
    width = call.dimensions
    if width is None:
        width = target_dim if target_dim is not None and target_dim <= native else native
        width = width if allowed.allows(width, native) else native
    elif not allowed.allows(width, native):
        raise DimensionsNotSupported(
            f"dimensions is {width}, but {call.model_id} gives {allowed.describe(native)}", param="dimensions"
        )
    return OutputSpec(width, normalize if call.normalize is None else call.normalize, allowed.layer_norm)
