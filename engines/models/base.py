"""What an engine runs: token ids to vectors with one model on one device. Protocols, and what an encoder weighs."""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, Protocol

from torch import Tensor

from engines.inputs.tokenizer import Ids
from engines.models.adapters import storage_bytes

PART_TOKENS = 64
"""Tokens of the smallest part that is cut for a thread of its own, where few tokens cost nearly as much as these."""


Attention = Literal["packed", "padded", "unpadded"]


ForwardPath = Literal["graphed", "prepacked", "fused", "packed", "padded", "unpadded"]


def attention_of(path: ForwardPath) -> Attention:
    """How texts share a pass on a path."""
    return path if path in ("padded", "unpadded") else "packed"


class Size(NamedTuple):
    """How many tokens a row of a fixed size holds, and of how many texts at the most."""

    tokens: int
    texts: int


class ForwardPathFailed(Exception):
    """A path failed where its check did not. The texts are to be run again: the next pass takes the plainest path."""


class Encoder(Protocol):
    """What an engine runs. Texts come sorted by length, and vectors leave in the same order.

    Attributes:
        part_tokens: of the smallest pass that is worth a thread of its own.
        fallback: why the path that was chosen at load is not in use now; empty while it is.
        pause: called before each layer; it may run other texts through this very encoder, if it is `is_reentrant`.
    """

    dimensions: int
    pause: Callable[[], None]
    part_tokens: int

    @property
    def attention(self) -> Attention:
        """How texts share a pass."""

    @property
    def path(self) -> ForwardPath:
        """The one in use."""

    @property
    def fallback(self) -> str:
        """Why the path that was chosen at load is not in use now; empty while it is."""

    @property
    def is_reentrant(self) -> bool:
        """Whether several threads may call at once."""

    def __call__(self, texts: Sequence[Ids], prompt_tokens: Sequence[int] | None = None) -> Tensor:
        """Float32 vectors `[n, dimensions]` on the device, as the model's own modules leave them.

        Raises:
            ForwardPathFailed: run the texts again.
        """

    def reference(self, texts: Sequence[Ids], prompt_tokens: Sequence[int] | None = None) -> Tensor:
        """The same, without company of another length, through the plain forward pass."""

    def tensors(self) -> list[Tensor]:
        """All weights and buffers."""

    def token_bytes(self) -> int:
        """Memory that one token of a batch needs while it runs, an upper estimate."""


class CheckableEncoder(Encoder, Protocol):
    """An encoder that has not been checked yet.

    Attributes:
        path: the one in use.
        num_layers: between so many parts of about equal length a pass pauses.
        window: tokens that sliding attention reaches, None without it.
        notes: why a faster path is not worth trying.
        largest_copy: bytes that a path may hold in second copies of weights.
        num_threads: that may run one pass together.
        recheck: called before a path that failed is used again; raises where its vectors are not right.
    """

    largest_copy: int
    num_threads: int
    path: ForwardPath
    num_layers: int
    window: int | None
    notes: tuple[str, ...]
    recheck: "Recheck"

    @property
    def sizes(self) -> tuple[Size, ...]:
        """On the path in use, the sizes whose rows run in a form of their own; none where there is one for all."""

    def encode_fixed(self, texts: Sequence[Ids], size: Size) -> Tensor:
        """As a call that runs in a row of this size, which has room for the texts."""

    def extra_bytes(self) -> int:
        """Bytes that the path in use keeps in addition to `tensors`, an upper estimate."""

    def candidate_paths(self) -> tuple[ForwardPath, ...]:
        """The paths worth trying, the fastest first; the last is the one that must be right."""

    def encode_batched(self, texts: Sequence[Ids]) -> Tensor:
        """As a call, with as much company for each text as the path allows, in each form that texts in company
        may take: `[forms, n, dimensions]`."""

    def encode_single(self, text: Ids) -> Tensor:
        """As a call with this text only, in each form that few tokens may take: `[forms, dimensions]`."""

    def switch_to(self, path: ForwardPath) -> None:
        """Run this way from now on; nothing may run meanwhile."""


Recheck = Callable[[CheckableEncoder], None]


def weight_bytes(encoder: Encoder) -> int:
    """Bytes of everything that stays on the device as long as the encoder lives."""
    return storage_bytes(encoder.tensors())


def workspace_bytes(encoder: Encoder, batch_tokens: int) -> int:
    """Bytes that a batch of `batch_tokens` needs while it runs, an upper estimate."""
    return batch_tokens * encoder.token_bytes()
