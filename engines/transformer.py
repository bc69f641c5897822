"""Token ids to vectors with one model on one device: the transformer, and the chain of modules behind it.

Knows six ways to run the transformer: `packed` (one row, no padding), `fused` (the same, its layers in fewer steps),
`prepacked` (the same, with a second copy of the weights for few tokens), `padded` (batches of similar lengths),
`unpadded` (batches of one length), and the reference (one length, plain attention) against which
`engines/selfcheck.py` holds the others.
"""

import inspect
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import structlog
import torch
from torch import Tensor, nn

from engines.adapters import Form, PackedState, Positions, adapt, why_not_packed
from engines.attention import PACKED
from engines.breaks import end_part
from engines.encoder import Attention, Path, PathLeft
from engines.fused import copied_bytes, fuse
from engines.layout import PADDING_SHARE, Layout, similar_lengths, to_device
from engines.modules import Chain
from engines.rope import LengthAwareRope
from engines.tokenize import Ids

log = structlog.get_logger(__name__)

_FUSED: tuple[Path, ...] = ("prepacked", "fused")

_ATTENTION: dict[Path, Attention] = {"padded": "padded", "unpadded": "unpadded"}
"""How texts share a pass on paths that have padding or could have it."""

Run = Callable[[Sequence[Ids], Layout], Tensor]
"""One forward pass of texts, sorted by length: their hidden states `[T, H]`."""


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
        self._form: Form | None = None
        self.notes = why_not_packed(model)
        adapt(model, self._state)
        self._fused = [] if self.notes else fuse(model, self._state)
        self.window: int | None = getattr(model.config.get_text_config(), "sliding_window", None)
        self.dimensions = chain.dimensions
        self.path: Path = "padded"
        self.pause: Callable[[], None] = lambda: None
        self._lock = threading.Lock()
        self._num_inside = 0
        self._is_leaving = False
        layers = self.layers()
        self.num_layers = len(layers)
        for layer in layers:
            layer.register_forward_pre_hook(lambda *_: self.pause())

    @property
    def attention(self) -> Attention:
        """See `Encoder`."""
        return _ATTENTION.get(self.path, "packed")

    @property
    def is_reentrant(self) -> bool:
        """See `Encoder`. Not where the model itself keeps something from one pass to the next."""
        return not self._is_leaving and not self._rope.remembers

    @torch.inference_mode()
    def __call__(self, texts: Sequence[Ids], prompt_tokens: Sequence[int] | None = None) -> Tensor:
        """See `Encoder`."""
        layout = self._layout(texts)
        with self._inside():
            hidden = self._hidden_or_left(texts, layout)
        return self._chain(hidden, layout, prompt_tokens)

    @torch.inference_mode()
    def together(self, texts: Sequence[Ids]) -> Tensor:
        """See `Candidate`: padded batches are not cut by length, however much padding that takes."""
        return self._as_asked(texts, "many")

    @torch.inference_mode()
    def alone(self, text: Ids) -> Tensor:
        """See `Candidate`."""
        forms: tuple[Form, ...] = ("few", "prepacked") if self.path == "prepacked" else ("few",)
        return torch.cat([self._as_asked([text], form) for form in forms])

    @torch.inference_mode()
    def reference(self, texts: Sequence[Ids], prompt_tokens: Sequence[int] | None = None) -> Tensor:
        """See `Encoder`. It changes how the model runs, so that nothing else may run meanwhile."""
        used = self.path
        self._switch("eager")
        try:
            hidden = self._in_runs(self._unpadded, texts, self._layout(texts))
        finally:
            self.use(used)
        return self._chain(hidden, self._layout(texts), prompt_tokens)

    def use(self, path: Path) -> None:
        """See `Candidate`."""
        self.path = path
        self._switch(self._own_attention if path in _ATTENTION else PACKED)
        for layer in self._fused:
            layer.prepack() if path == "prepacked" else layer.unpack()
            end_part()

    def paths(self) -> tuple[Path, ...]:
        """See `Candidate`. Whether a path is right, `engines/selfcheck.py` finds out."""
        if self.notes:
            return ("padded", "unpadded")
        plain: tuple[Path, ...] = ("packed", "padded", "unpadded")
        fused = _FUSED if self.copied_bytes() else _FUSED[1:]
        return (*fused, *plain) if self._fused else plain

    def layers(self) -> list[nn.Module]:
        """What repeats, one after the other: between two of them a pass can pause."""
        return [layer for stack in self._model.modules() if isinstance(stack, nn.ModuleList) for layer in stack]

    def tensors(self) -> list[Tensor]:
        """See `Encoder`."""
        model: nn.Module = self._model
        return [*model.parameters(), *model.buffers(), *self._chain.weights]

    def copied_bytes(self) -> int:
        """See `Candidate`."""
        return copied_bytes(self._fused)

    def token_bytes(self) -> int:
        """See `Encoder`: eight copies of the residual stream (its own, norm, query, key, value, context, output, sum)
        and three of the widest inner layer (gate, up, activation); one layer's are freed before the next one's come.
        """
        config = self._model.config.get_text_config()
        inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
        return int((8 * config.hidden_size + 3 * inner) * self._model.dtype.itemsize)

    def _as_asked(self, texts: Sequence[Ids], form: Form) -> Tensor:
        """Vectors by the path in use, which is not left when it fails."""
        layout = self._layout(texts)
        self._padding_share, self._form = 1.0, form
        try:
            return self._chain(self._hidden(texts, layout), layout)
        finally:
            self._padding_share, self._form = PADDING_SHARE, None

    def _switch(self, implementation: str) -> None:
        if self._model._can_set_attn_implementation():
            self._model.set_attn_implementation(implementation)
        elif self._is_mpnet:  # only decides whether a mask is made
            self._model.config._attn_implementation = implementation

    def _layout(self, texts: Sequence[Ids]) -> Layout:
        return Layout([len(ids) for ids in texts], self._device)

    @contextmanager
    def _inside(self) -> Iterator[None]:
        """A pass runs. Whoever is alone after a path has failed leaves it; the others are to come again."""
        with self._lock:
            if self._is_leaving and self._num_inside:
                raise PathLeft
            if self._is_leaving:
                self.use("unpadded")
                self._is_leaving = False
            self._num_inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._num_inside -= 1

    def _hidden(self, texts: Sequence[Ids], layout: Layout) -> Tensor:
        """Hidden states `[T, H]` by the path in use."""
        others: dict[Path, Run] = {"padded": self._padded, "unpadded": self._unpadded}
        return self._in_runs(others.get(self.path, self._packed), texts, layout)

    def _hidden_or_left(self, texts: Sequence[Ids], layout: Layout) -> Tensor:
        """The same; a path that fails where its check did not is left for good, for the plainest one."""
        try:
            return self._hidden(texts, layout)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            if self.path == "unpadded":
                raise
            log.warning("model.path_left", path=self.path, tokens=layout.num_tokens, exc_info=True)
            self._is_leaving = True
            raise PathLeft from error

    def _in_runs(self, run: Run, texts: Sequence[Ids], layout: Layout) -> Tensor:
        """Hidden states `[T, H]`, in several passes where texts must not share one."""
        spans = list(self._rope.runs(layout.lengths))
        if len(spans) == 1:
            self._rope.reset()
            return run(texts, layout)
        return torch.cat([self._in_runs(run, part, self._layout(part)) for part in (texts[a:b] for a, b in spans)])

    def _packed(self, texts: Sequence[Ids], layout: Layout) -> Tensor:
        """One row through the transformer."""
        row = to_device(np.concatenate(texts), self._device)
        options: dict[str, Any] = {"packed_layout": layout}
        if self._takes_positions:
            options["position_ids"] = self._positions(row, layout)[None]
        with self._state.running(layout, is_fused=self.path in _FUSED, form=self._form):
            return self._forward(row[None], attention_mask=None, **options)[0]

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
        held = to_device(mask, self._device)
        return self._forward(to_device(ids, self._device), attention_mask=held)[held.bool()]

    def _forward(self, input_ids: Tensor, **options: Any) -> Tensor:
        hidden: Tensor = self._model(input_ids=input_ids, **options).last_hidden_state
        return hidden
