"""Defines what an engine runs: token ids to vectors with one model on one device; and what the check at load needs."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, Protocol

import torch
from msgspec import Struct
from torch import Tensor

from engines.inputs.tokenizer import Ids
from engines.models.adapters import storage_bytes
from engines.models.placement import PlacedModel
from engines.models.weight_forms import WeightForm
from engines.protocols import Clock, Placement

PART_TOKENS = 64
"""Tokens of the smallest part that is cut for a thread of its own, where few tokens cost nearly as much as these."""

Attention = Literal["packed", "padded", "unpadded"]
ForwardPath = Literal["graphed", "prepacked", "fused", "packed", "padded", "unpadded"]


def attention_of(path: ForwardPath) -> Attention:
    """Returns how texts share a pass on a path."""
    return path if path in ("padded", "unpadded") else "packed"


class Size(NamedTuple):
    """How many tokens a row of a fixed size holds, and of how many texts at the most."""

    tokens: int
    texts: int


class ForwardPathFailed(Exception):
    """A path failed where its check did not. The texts are to be run again: the next pass takes the plainest path."""


class _Recording(threading.local):
    """Tells whether this thread records passes."""

    is_on = False


_RECORDING = _Recording()


def is_recording() -> bool:
    """Tells whether this thread records passes, so that nothing else may run on it: it would be recorded too."""
    return _RECORDING.is_on


@contextmanager
def recording() -> Iterator[None]:
    """Makes `is_recording` true inside the block."""
    _RECORDING.is_on = True
    try:
        yield
    finally:
        _RECORDING.is_on = False


class PathForm(NamedTuple):
    """Vectors `[len(rows), D]` of some of the texts that a path was asked for, by one of the forms that it has.

    `rows`: indexes of these texts. `where`: follows the path's name in messages; empty for passes of any size.
    """

    rows: Sequence[int]
    vectors: Tensor
    where: str = ""


class ForwardPaths(Protocol):
    """The paths by which one model can run, as the check at load sees them. Nothing else may run meanwhile.

    Attributes:
        dimensions: width of the vectors.
        window: tokens that sliding attention reaches, None without it.
        notes: why a faster path is not worth trying.
    """

    dimensions: int
    window: int | None
    notes: tuple[str, ...]

    @property
    def path(self) -> ForwardPath:
        """Returns the path in use."""

    def candidate_paths(self) -> tuple[ForwardPath, ...]:
        """Returns the paths worth trying, the fastest first; the last is the one that must be right."""

    def switch_to(self, path: ForwardPath) -> None:
        """Makes this the path in use."""

    def forms(self, texts: Sequence[Ids]) -> Iterator[PathForm]:
        """Runs texts, sorted by length, in every form that the path in use has; first all of them in one batch.

        Forms differ by how many texts share a pass, by kernel, and by the size of the row. Those with the same `where`
        come one after the other.
        """

    def reference(self, texts: Sequence[Ids]) -> Tensor:
        """Returns the vectors `[n, D]` by the plain forward pass, no text in a pass with one of another length."""


class Encoder(Protocol):
    """What a runner needs. Texts come sorted by length, and vectors leave in the same order.

    Attributes:
        part_tokens: of the smallest pass that is worth a thread of its own.
    """

    dimensions: int
    part_tokens: int

    @property
    def attention(self) -> Attention:
        """Returns how texts share a pass."""

    @property
    def path(self) -> ForwardPath:
        """Returns the path in use."""

    @property
    def fallback(self) -> str:
        """Returns why the path that was chosen at load is not in use now; empty while it is."""

    @property
    def is_reentrant(self) -> bool:
        """Tells whether several threads may call at once."""

    def __call__(self, texts: Sequence[Ids], prompt_tokens: Sequence[int] | None = None) -> Tensor:
        """Returns float32 vectors `[n, dimensions]` on the device, as the model's own modules leave them.

        Raises:
            ForwardPathFailed: run the texts again.
        """


class LoadedEncoder(Encoder, Protocol):
    """What a loader needs besides.

    Attributes:
        num_layers: a pass can be preempted between so many parts of about equal length.
    """

    num_layers: int

    @property
    def paths(self) -> ForwardPaths:
        """Returns the paths to be checked before the encoder serves."""

    def tensors(self) -> list[Tensor]:
        """Returns all weights and buffers."""

    def token_bytes(self) -> int:
        """Returns the memory that one token of a batch needs while it runs, an upper estimate."""

    def extra_bytes(self) -> int:
        """Returns the bytes that the path in use keeps in addition to `tensors`, an upper estimate."""


def _no_preemption() -> None:
    """Does nothing."""


def _never_checked(paths: ForwardPaths) -> None:
    raise NotImplementedError("a path that was not checked at load has nothing to be compared with")


class EncoderConfig(Struct, frozen=True, kw_only=True):
    """How an encoder runs, given once at construction.

    Args:
        device: where it runs.
        num_threads: that may run one pass together.
        max_prepacked_bytes: bytes that a path may hold in second copies of weights.
        preemption_point: called before each layer; it may run other texts through the same encoder, if that is
            reentrant.
        recheck: called before a path that failed is used again; raises where its vectors are not right.
        weight_form: of the model's products; None leaves them as they were read.
        placement: of a model that is split over devices; `placed`: that model, once it is built.
    """

    device: torch.device = torch.device("cpu")
    num_threads: int = 1
    max_prepacked_bytes: int = 0
    preemption_point: Callable[[], None] = _no_preemption
    recheck: Callable[[ForwardPaths], None] = _never_checked
    weight_form: WeightForm | None = None
    placement: Placement | None = None
    placed: PlacedModel | None = None


class SinglePathEncoder:
    """Base of encoders that have one path and one form of it.

    A subclass sets `dimensions` and defines `__call__`, `tensors` and `token_bytes`.
    """

    attention: Attention = "packed"
    path: ForwardPath = "packed"
    fallback = ""
    is_reentrant = True
    part_tokens = PART_TOKENS
    num_layers = 1
    dimensions: int

    def __call__(self, texts: Sequence[Ids], prompt_tokens: Sequence[int] | None = None) -> Tensor:
        """See `Encoder`."""
        raise NotImplementedError

    @property
    def paths(self) -> ForwardPaths:
        """See `LoadedEncoder`."""
        return SinglePath(self)

    def extra_bytes(self) -> int:
        """See `LoadedEncoder`; there are none."""
        return 0


class SinglePath:
    """The `ForwardPaths` of an encoder that has one path. Its reference is each text alone."""

    window: int | None = None
    notes: tuple[str, ...] = ()

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self.dimensions = encoder.dimensions

    @property
    def path(self) -> ForwardPath:
        """See `ForwardPaths`."""
        return self._encoder.path

    def candidate_paths(self) -> tuple[ForwardPath, ...]:
        """See `ForwardPaths`."""
        return (self.path,)

    def switch_to(self, path: ForwardPath) -> None:
        """See `ForwardPaths`; there is one."""
        assert path == self.path, "there is one path"

    def forms(self, texts: Sequence[Ids]) -> Iterator[PathForm]:
        """See `ForwardPaths`: all texts together, and the first alone."""
        yield PathForm(range(len(texts)), self._encoder(texts))
        yield PathForm([0], self._encoder(texts[:1]))

    def reference(self, texts: Sequence[Ids]) -> Tensor:
        """See `ForwardPaths`."""
        return torch.cat([self._encoder([ids]) for ids in texts])


FIRST_WAIT_S, LONGEST_WAIT_S = 30.0, 3600.0
"""A path that failed is tried again after the first wait; each failure soon after that doubles the wait."""


class PathFallback:
    """Switches to the fallback path once the last pass on a failed path ends, and tries the failed path again later.

    Args:
        fall_back: switches to the fallback path; called while no pass runs, after `report_failure`.
        resume: switches back and checks the vectors, and returns whether they are right; called while no pass runs. It
            keeps the fallback path in use where they are not.
        clock: seconds.

    Attributes:
        is_active: whether the fallback path is in use, or will be at the next pass, because a faster one failed.
    """

    def __init__(
        self, fall_back: Callable[[], None], resume: Callable[[], bool], clock: Clock = time.monotonic
    ) -> None:
        self._fall_back = fall_back
        self._resume = resume
        self._clock = clock
        self._lock = threading.Lock()
        self._num_passes = 0
        self._is_switching = False
        self._is_fallback_due = False
        self.is_active = False
        self._wait_s = FIRST_WAIT_S
        self._retry_at_s = 0.0
        self._resumed_at_s = -LONGEST_WAIT_S

    @property
    def is_switch_due(self) -> bool:
        """Whether passes must run one at a time, because a switch is due or under way."""
        return self._is_switching or self._is_fallback_due or (self.is_active and self._is_retry_due())

    @property
    def retry_in_s(self) -> float:
        """Seconds until the failed path is tried again; 0 when that is due, or no path has failed."""
        return max(0.0, self._retry_at_s - self._clock()) if self.is_active else 0.0

    def running_pass(self) -> "PathFallback":
        """Counts a pass as running inside the block; makes a switch first that is due while no other pass runs.

        Raises:
            ForwardPathFailed: a switch is under way, or waits for passes that still run.
        """
        return self  # a generator would take four calls more in each pass

    def __enter__(self) -> None:
        with self._lock:
            if self._is_switching or (self._is_fallback_due and self._num_passes):
                raise ForwardPathFailed
            is_due = self._is_fallback_due or (self.is_active and self._is_retry_due())
            self._is_switching = not self._num_passes and is_due
            self._num_passes += 1
        if self._is_switching:  # set by this pass, which is the only one
            try:
                self._switch()
            except BaseException:
                self.__exit__()
                raise

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._num_passes -= 1

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Lets no pass begin inside the block, in which the caller may change how passes run.

        Raises:
            ForwardPathFailed: a pass runs, or a path has failed: try it later.
        """
        with self._lock:
            if self._num_passes or self._is_switching or self.is_active:
                raise ForwardPathFailed
            self._is_switching = True
        try:
            yield
        finally:
            self._is_switching = False

    def report_failure(self) -> None:
        """Schedules the switch to the fallback path, for when no pass runs any more."""
        with self._lock:
            if self._is_fallback_due or self.is_active:
                return
            now_s = self._clock()
            is_soon = now_s - self._resumed_at_s < self._wait_s
            self._wait_s = min(2 * self._wait_s, LONGEST_WAIT_S) if is_soon else FIRST_WAIT_S
            self._is_fallback_due = self.is_active = True
            self._retry_at_s = now_s + self._wait_s

    def retry_now(self) -> None:
        """Makes the retry due at once: the fallback path fails as well, so the faster path was not the cause."""
        self._retry_at_s = self._clock()

    def _is_retry_due(self) -> bool:
        return not self._is_fallback_due and self._clock() >= self._retry_at_s

    def _switch(self) -> None:
        """Switches paths, without the lock: it may take as long as a self-check, and other passes must fail at once."""
        try:
            if self._is_fallback_due:
                self._fall_back()
                self._is_fallback_due = False
            elif self._resume():
                self.is_active, self._resumed_at_s = False, self._clock()
            else:
                self._wait_s = min(2 * self._wait_s, LONGEST_WAIT_S)
                self._retry_at_s = self._clock() + self._wait_s
        finally:
            self._is_switching = False


def weight_bytes(encoder: LoadedEncoder) -> int:
    """Returns the bytes of everything that stays on the device as long as the encoder lives."""
    return storage_bytes(encoder.tensors())


def layer_token_bytes(model: Any, width: int) -> int:
    """Returns the memory that one token needs in a layer, an upper estimate.

    Eight copies of the residual stream (itself, norm, query, key, value, context, output, sum) and three of the widest
    inner layer (gate, up, activation).

    Args:
        width: of the hidden states, where the config states none.
    """
    config = model.config.get_text_config()
    width = getattr(config, "hidden_size", None) or width
    inner = getattr(config, "intermediate_size", None) or 4 * width
    return int((8 * width + 3 * inner) * model.dtype.itemsize)


def workspace_bytes(encoder: LoadedEncoder, batch_tokens: int) -> int:
    """Returns the bytes that a batch of `batch_tokens` needs while it runs, an upper estimate."""
    return batch_tokens * encoder.token_bytes()
