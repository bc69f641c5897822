"""Fake encoders, and stand-ins for a GPU's attention kernel and CUDA graphs that forbid what a capture forbids."""

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

    def encode(self, sequence: str, *, add_special_tokens: bool) -> SimpleNamespace:
        return self.encode_batch_fast([sequence], add_special_tokens=add_special_tokens)[0]

    def encode_batch_fast(self, input: Sequence[str], *, add_special_tokens: bool) -> Sequence[SimpleNamespace]:
        return [SimpleNamespace(ids=[ord(letter) for letter in text.encode("utf-8").decode()]) for text in input]

    def id_to_token(self, token_id: int) -> str | None:
        return chr(token_id)


class ScriptedEncoder:
    """An encoder whose vectors depend on the ids alone: `[first, last, sum, length]`.

    Attributes:
        batches: the lengths of the texts of each call.
        before: called before each batch; may raise.
    """

    attention: Attention = "packed"
    path: ForwardPath = "packed"
    fallback = ""
    dimensions = WIDTH
    is_reentrant = True
    part_tokens = PART_TOKENS

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.before: Callable[[Sequence[Ids]], None] = lambda texts: None

    def __call__(self, texts: Sequence[Ids], prompt_tokens: Sequence[int] | None = None) -> Tensor:
        self.batches.append([len(ids) for ids in texts])
        self.before(texts)
        rows = [[ids[0], ids[-1], ids.sum(), len(ids)] for ids in texts]
        return torch.tensor(np.array(rows, dtype=np.float32))


class _OperationRecorder(ForbidHostSync):  # type: ignore[no-untyped-call]  # untyped upstream
    """Records every operation on tensors and replays them. Arguments that are no tensors keep their recorded values."""

    def __init__(self) -> None:
        super().__init__()
        self._steps: list[tuple[Any, Any, Any, list[int]]] = []
        self._indices: dict[int, int] = {}
        self._alive: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ == "lift_fresh":
            raise NotImplementedError("a graph cannot bring numbers of the host to a GPU")
        given = tree_map(self._reference, (args, kwargs or {}))
        out = super().__torch_dispatch__(func, types, args, kwargs)
        self._steps.append((func, *given, [self._register(made) for made in tree_flatten(out)[0]]))
        return out

    def _reference(self, value: Any) -> Any:
        """Replaces a tensor that a recorded operation made by its index; returns anything else as it is."""
        index = self._indices.get(id(value)) if isinstance(value, Tensor) else None
        return value if index is None else _TensorIndex(index)

    def _register(self, made: Any) -> int:
        self._alive.append(made)  # or another tensor could get its id
        return self._indices.setdefault(id(made), len(self._alive) - 1)

    def replay(self, result: Tensor) -> Tensor:
        """Runs the operations again and returns the tensor in place of `result`."""
        now: dict[int, Any] = {}
        for func, args, kwargs, indices in self._steps:
            given = tree_map(
                lambda value: now[value.index] if isinstance(value, _TensorIndex) else value, (args, kwargs)
            )
            made = tree_flatten(func(*given[0], **given[1]))[0]
            now.update(zip(indices, made, strict=True))
        vectors: Tensor = now[self._indices[id(result)]]
        return vectors


class _TensorIndex:
    def __init__(self, index: int) -> None:
        self.index = index


class FakeGraphCapturer:
    """Records passes as their operations, on a CPU (`engines.models.cuda_graphs.GraphCapturer`).

    Args:
        seconds: how long a recorded pass takes and how long an ordinary one takes, alternately, over and over.

    Attributes:
        before: called before each recording; may raise.
        changed: what is done to the vectors of each recording, by its number from 1.
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
        with (recorder := _OperationRecorder()):
            vectors = run()
        held = torch.empty_like(vectors)

        def replay() -> Tensor:
            self.num_replayed += 1
            return held.copy_(change(recorder.replay(vectors)))

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
    """`torch.nn.attention.varlen.varlen_attn` on a CPU: attention inside of each text of a row, `[T, heads, d]`."""
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
