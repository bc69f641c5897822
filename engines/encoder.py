"""Token ids to vectors with one model on one device: the transformer, and the chain of modules behind it.

Knows four ways to run the transformer: `packed` (one row, no padding), `padded` (batches of similar lengths),
`unpadded` (batches of one length), and the reference (one length, plain attention) against which
`engines/selfcheck.py` holds the others.
Not thread-safe: the lane's thread is its only caller.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

import numpy as np
import structlog
import torch
from torch import Tensor, nn

from engines.adapters import PackedState, Positions, adapt, storage_bytes, why_not_packed
from engines.attention import PACKED
from engines.layout import PADDING_SHARE, Layout, similar_lengths
from engines.modules import Chain
from engines.rope import LengthAwareRope
from engines.tokenize import Ids

log = structlog.get_logger(__name__)

Attention = Literal["packed", "padded", "unpadded"]
Run = Callable[[Sequence[Ids], Layout], Tensor]
"""One forward pass of texts, sorted by length: their hidden states `[T, H]`."""


class Encoder(Protocol):
    """What an engine runs. Texts come sorted by length, and vectors leave in the same order."""

    dimensions: int
    attention: Attention

    def __call__(self, texts: Sequence[Ids], prompt_tokens: Sequence[int] | None = None) -> Tensor:
        """Float32 vectors `[n, dimensions]` on the device, as the model's own modules leave them."""

    def reference(self, texts: Sequence[Ids], prompt_tokens: Sequence[int] | None = None) -> Tensor:
        """The same, without company of another length, through the plain forward pass."""

    def tensors(self) -> list[Tensor]:
        """All weights and buffers."""

    def token_bytes(self) -> int:
        """Memory that one token of a batch needs while it runs, an upper estimate."""


class Candidate(Encoder, Protocol):
    """An encoder that has not been checked yet.

    Attributes:
        window: tokens that sliding attention reaches, None without it.
        notes: why a faster path is not worth trying.
    """

    window: int | None
    notes: tuple[str, ...]

    def paths(self) -> tuple[Attention, ...]:
        """The paths worth trying, the fastest first; the last is the one that must be right."""

    def together(self, texts: Sequence[Ids]) -> Tensor:
        """As a call, with as much company for each text as the path allows."""

    def use(self, attention: Attention) -> None:
        """Run this way from now on."""

    def layers(self) -> list[nn.Module]:
        """What repeats, one after the other: between two of them a pass can pause."""


class TransformerEncoder:
    """A transformers model and its chain.

    Args:
        model: in eval mode, on the device.
        chain: the modules behind it.
        device: where both live.
    """

    def __init__(self, model: Any, chain: Chain, device: torch.device) -> None:
        self._model = model
        self._chain = chain
        self._device = device
        self._state = PackedState()
        self._takes_positions = "position_ids" in inspect.signature(model.forward).parameters
        self._positions = Positions(model)
        self._rope = LengthAwareRope(model)
        self._own_attention = "sdpa" if model._supports_sdpa else "eager"
        self._is_mpnet = model.config.model_type == "mpnet"
        self._padding_share = PADDING_SHARE
        self.notes = why_not_packed(model)
        adapt(model, self._state)
        self.window: int | None = getattr(model.config.get_text_config(), "sliding_window", None)
        self.dimensions = chain.dimensions
        self.attention: Attention = "padded"

    @torch.inference_mode()
    def __call__(self, texts: Sequence[Ids], prompt_tokens: Sequence[int] | None = None) -> Tensor:
        """See `Encoder`."""
        layout = self._layout(texts)
        return self._chain(self._hidden_or_slower(texts, layout), layout, prompt_tokens)

    @torch.inference_mode()
    def together(self, texts: Sequence[Ids]) -> Tensor:
        """See `Candidate`: padded batches are not cut by length, however much padding that takes."""
        layout = self._layout(texts)
        self._padding_share = 1.0
        try:
            return self._chain(self._hidden(texts, layout), layout)
        finally:
            self._padding_share = PADDING_SHARE

    @torch.inference_mode()
    def reference(self, texts: Sequence[Ids], prompt_tokens: Sequence[int] | None = None) -> Tensor:
        """See `Encoder`."""
        used = self.attention
        self._switch("eager")
        try:
            hidden = self._in_runs(self._unpadded, texts, self._layout(texts))
        finally:
            self.use(used)
        return self._chain(hidden, self._layout(texts), prompt_tokens)

    def use(self, attention: Attention) -> None:
        """See `Candidate`."""
        self.attention = attention
        self._switch(PACKED if attention == "packed" else self._own_attention)

    def paths(self) -> tuple[Attention, ...]:
        """See `Candidate`. Whether the packed path is right, `engines/selfcheck.py` finds out."""
        return ("padded", "unpadded") if self.notes else ("packed", "padded", "unpadded")

    def layers(self) -> list[nn.Module]:
        """See `Candidate`."""
        return [layer for stack in self._model.modules() if isinstance(stack, nn.ModuleList) for layer in stack]

    def tensors(self) -> list[Tensor]:
        """See `Encoder`."""
        model: nn.Module = self._model
        return [*model.parameters(), *model.buffers(), *self._chain.weights]

    def token_bytes(self) -> int:
        """See `Encoder`: eight copies of the residual stream (its own, norm, query, key, value, context, output, sum)
        and three of the widest inner layer (gate, up, activation); one layer's are freed before the next one's come.
        """
        config = self._model.config.get_text_config()
        inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
        return int((8 * config.hidden_size + 3 * inner) * self._model.dtype.itemsize)

    def _switch(self, implementation: str) -> None:
        if self._model._can_set_attn_implementation():
            self._model.set_attn_implementation(implementation)
        elif self._is_mpnet:  # only decides whether a mask is made
            self._model.config._attn_implementation = implementation

    def _layout(self, texts: Sequence[Ids]) -> Layout:
        return Layout([len(ids) for ids in texts], self._device)

    def _hidden(self, texts: Sequence[Ids], layout: Layout) -> Tensor:
        """Hidden states `[T, H]` by the path in use."""
        paths: dict[Attention, Run] = {"packed": self._packed, "padded": self._padded, "unpadded": self._unpadded}
        return self._in_runs(paths[self.attention], texts, layout)

    def _hidden_or_slower(self, texts: Sequence[Ids], layout: Layout) -> Tensor:
        """The same; a path that fails where its check did not is left for good, for the plainest one."""
        try:
            return self._hidden(texts, layout)
        except torch.OutOfMemoryError:
            raise
        except Exception:
            if self.attention == "unpadded":
                raise
            log.warning("model.path_left", path=self.attention, tokens=layout.num_tokens, exc_info=True)
        self.use("unpadded")
        return self._hidden(texts, layout)

    def _in_runs(self, run: Run, texts: Sequence[Ids], layout: Layout) -> Tensor:
        """Hidden states `[T, H]`, in several passes where texts must not share one."""
        spans = list(self._rope.runs(layout.lengths))
        if len(spans) == 1:
            self._rope.reset()
            return run(texts, layout)
        return torch.cat([self._in_runs(run, part, self._layout(part)) for part in (texts[a:b] for a, b in spans)])

    def _packed(self, texts: Sequence[Ids], layout: Layout) -> Tensor:
        """One row through the transformer."""
        row = self._to_device(np.concatenate(texts))
        options: dict[str, Any] = {"packed_layout": layout}
        if self._takes_positions:
            options["position_ids"] = self._positions(row, layout)[None]
        self._state.layout = layout
        try:
            return self._forward(row[None], attention_mask=None, **options)[0]
        finally:
            self._state.layout = None

    def _padded(self, texts: Sequence[Ids], layout: Layout) -> Tensor:
        """Batches of similar lengths through the transformer; the padding is dropped again."""
        spans = similar_lengths(layout.lengths, self._padding_share)
        return torch.cat([self._batch(texts[start:end]) for start, end in spans])

    def _unpadded(self, texts: Sequence[Ids], layout: Layout) -> Tensor:
        """Batches of one length through the transformer."""
        return torch.cat([self._batch(texts[start:end]) for start, end in similar_lengths(layout.lengths, 0.0)])

    def _batch(self, texts: Sequence[Ids]) -> Tensor:
        longest = max(len(ids) for ids in texts)
        ids = np.full((len(texts), longest), self._model.config.pad_token_id or 0, dtype=np.int64)
        mask = np.zeros((len(texts), longest), dtype=np.int64)
        for row, text in enumerate(texts):
            ids[row, : len(text)] = text
            mask[row, : len(text)] = 1
        held = self._to_device(mask)
        return self._forward(self._to_device(ids), attention_mask=held)[held.bool()]

    def _forward(self, input_ids: Tensor, **options: Any) -> Tensor:
        hidden: Tensor = self._model(input_ids=input_ids, **options).last_hidden_state
        return hidden

    def _to_device(self, array: Any) -> Tensor:
        return torch.from_numpy(array).to(self._device, non_blocking=True)


def weight_bytes(encoder: Encoder) -> int:
    """Bytes of everything that stays on the device as long as the encoder lives."""
    return storage_bytes(encoder.tensors())


def workspace_bytes(encoder: Encoder, batch_tokens: int) -> int:
    """Bytes that a batch of `batch_tokens` needs while it runs, an upper estimate."""
    return batch_tokens * encoder.token_bytes()
