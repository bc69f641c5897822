"""Stand-ins for what only a GPU has, its attention kernel and its graphs, and which are as strict as a capture is."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import cycle
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._pytree import tree_flatten, tree_map

from engines.inputs.tokenizer import Ids
from engines.models.base import PART_TOKENS, Attention, ForwardPath
from engines.models.cuda_graphs import ForbidHostSync, warm_up

WIDTH = 4


class Letters:
    """A tokenizer backend: every character is a token."""

    def encode_batch_fast(self, input: Sequence[str], *, add_special_tokens: bool) -> Sequence[SimpleNamespace]:
        return [SimpleNamespace(ids=[ord(letter) for letter in text.encode("utf-8").decode()]) for text in input]


class ScriptedEncoder:
    """Vectors from the ids alone: `[first, last, sum, length]`; `before` runs first and may raise."""

    attention: Attention = "packed"
    path: ForwardPath = "packed"
    fallback = ""
    dimensions = WIDTH
    is_reentrant = True
    part_tokens = PART_TOKENS

    def __init__(self) -> None:
        self.pause: Callable[[], None] = lambda: None
        self.batches: list[list[int]] = []
        self.before: Callable[[Sequence[Ids]], None] = lambda texts: None

    def __call__(self, texts: Sequence[Ids], prompt_tokens: Sequence[int] | None = None) -> Tensor:
        self.batches.append([len(ids) for ids in texts])
        self.before(texts)
        rows = [[ids[0], ids[-1], ids.sum(), len(ids)] for ids in texts]
        return torch.tensor(np.array(rows, dtype=np.float32))

    def reference(self, texts: Sequence[Ids], prompt_tokens: Sequence[int] | None = None) -> Tensor:
        return self(texts, prompt_tokens)

    def tensors(self) -> list[Tensor]:
        return []

    def token_bytes(self) -> int:
        return 1


class _Tape(ForbidHostSync):  # type: ignore[no-untyped-call]  # untyped upstream
    """Writes down every operation on tensors, and does them again. Numbers are as they were at the first time."""

    def __init__(self) -> None:
        super().__init__()
        self._steps: list[tuple[Any, Any, Any, list[int]]] = []
        self._places: dict[int, int] = {}
        self._alive: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ == "lift_fresh":
            raise NotImplementedError("a graph cannot bring numbers of the host to a GPU")
        given = tree_map(self._place, (args, kwargs or {}))
        out = super().__torch_dispatch__(func, types, args, kwargs)
        self._steps.append((func, *given, [self._entered(made) for made in tree_flatten(out)[0]]))
        return out

    def _place(self, value: Any) -> Any:
        """Where a tensor stands that was made on the way; anything else stays as it is."""
        place = self._places.get(id(value)) if isinstance(value, Tensor) else None
        return value if place is None else _Place(place)

    def _entered(self, made: Any) -> int:
        self._alive.append(made)  # or another one would get its id
        return self._places.setdefault(id(made), len(self._alive) - 1)

    def replay(self, result: Tensor) -> Tensor:
        """What `result` would be now."""
        now: dict[int, Any] = {}
        for func, args, kwargs, places in self._steps:
            here = tree_map(lambda value: now[value.place] if isinstance(value, _Place) else value, (args, kwargs))
            made = tree_flatten(func(*here[0], **here[1]))[0]
            now.update(zip(places, made, strict=True))
        vectors: Tensor = now[self._places[id(result)]]
        return vectors


class _Place:
    def __init__(self, place: int) -> None:
        self.place = place


class TapeRecorder:
    """Records passes as the operations that they are made of (`engines.models.cuda_graphs.GraphCapturer`).

    Args:
        seconds: what a recorded pass takes and what an ordinary one does, in turns.

    Attributes:
        before: called before each recording; may raise.
        changed: what becomes of the vectors of each recording, by its number.
    """

    def __init__(self, seconds: Iterable[float] = (1.0, 2.0)) -> None:
        self._seconds: Iterator[float] = cycle(seconds)
        self.num_recorded = self.num_replayed = 0
        self.before: Callable[[], None] = lambda: None
        self.changed: dict[int, Callable[[Tensor], Tensor]] = {}

    def record(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        self.before()
        self.num_recorded += 1
        warm_up(run)
        change = self.changed.get(self.num_recorded, torch.clone)
        with (tape := _Tape()):
            vectors = run()
        held = torch.empty_like(vectors)

        def replay() -> Tensor:
            self.num_replayed += 1
            return held.copy_(change(tape.replay(vectors)))

        return replay

    def seconds(self, run: Callable[[], object]) -> float:
        return next(self._seconds)


def varlen(  # noqa: PLR0913  # the signature is torch's
    query: Tensor,
    key: Tensor,
    value: Tensor,
    offsets: Tensor,
    offsets_k: Tensor,
    longest: int,
    longest_k: int,
    *,
    scale: float | None,
    window_size: tuple[int, int],
    enable_gqa: bool,
) -> Tensor:
    """`torch.nn.attention.varlen.varlen_attn`: attention inside of each text of a row, `[T, heads, d]`."""
    assert offsets is offsets_k and longest == longest_k and offsets.dtype == torch.int32
    place = torch.arange(len(query))
    text = (place[:, None] >= offsets[None, 1:]).sum(-1)
    ahead = place[None, :] - place[:, None]
    left, right = window_size
    meets = text[:, None] == text[None, :]
    meets = meets & (ahead >= -left) if left >= 0 else meets
    meets = meets & (ahead <= right) if right >= 0 else meets
    q, k, v = (states.transpose(0, 1)[None] for states in (query, key, value))
    out = scaled_dot_product_attention(q, k, v, attn_mask=meets, scale=scale, enable_gqa=enable_gqa)
    return out[0].transpose(0, 1)
