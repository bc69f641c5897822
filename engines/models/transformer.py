"""Turns token ids into vectors with one model on one device: the transformer, and the modules that follow it.

There are seven paths through the transformer: `packed` (one row, no padding), `fused` (the same, its layers in fewer
steps; in decoders, texts share the tokens that all begin with), `graphed` (either of them, but short rows as CUDA
graphs of a fixed size), `prepacked` (fused, but short texts bypass the model's own code and run from copies of the
weights), `padded` (batches of similar lengths), `unpadded` (batches of one length), and the reference (one length,
plain attention), with which `engines/models/verification.py` compares the others.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import structlog
import torch
from torch import Tensor

from engines.device.torch_runtime import reserve_for_onnxruntime
from engines.errors import SelfCheckFailed, device_loss, is_device_error
from engines.inputs.token_ids import ID_MASK, TYPE_SHIFT, UNSEEN, Ids
from engines.layers.attention import PACKED, has_varlen
from engines.layers.decoder import fuse_decoder
from engines.layers.fused import fuse
from engines.layers.packing import (
    KernelVariant,
    PackedLayout,
    PackedState,
    TokenChoice,
    WindowMasks,
    bucket_by_length,
    padded,
    to_device,
)
from engines.layers.products import replace_products
from engines.layers.rope import LengthAwareRope
from engines.layers.shared_prefix import SharedPrefixLayout, num_shared_tokens
from engines.models import prepacked
from engines.models.adapters import Positions, adapt, layers_of, padding_id, switch_attention, why_not_packed
from engines.models.base import (
    PART_TOKENS,
    Attention,
    EncoderConfig,
    ForwardPath,
    ForwardPathFailed,
    ForwardPaths,
    PathFallback,
    PathForm,
    Size,
    attention_of,
    is_recording,
    layer_token_bytes,
)
from engines.models.cuda_graphs import CudaGraphs, FixedPackedLayout, GraphCapturer, kept_bytes
from engines.models.head import Head
from engines.models.path_forms import path_forms, row_forms
from engines.models.prepacked import PrepackedWeights

log = structlog.get_logger(__name__)

Run = Callable[[Sequence[Ids], PackedLayout], Tensor]
"""Runs one forward pass of texts, sorted by length, and returns their hidden states `[T, H]`."""


class TransformerEncoder:
    """Runs a transformers model and its head; `passes` counts what runs.

    Args:
        model: in eval mode, on the device.
        chain: the modules behind it.
        config: how to run; both live on its device.
        recorder: records passes there; None where that is not possible.
        notes: what else speaks against packing.
        has_types: whether ids carry token types (`engines.inputs.token_ids.TYPE_SHIFT`).
    """

    def __init__(
        self,
        model: Any,
        chain: Head,
        config: EncoderConfig,
        recorder: GraphCapturer | None = None,
        *,
        notes: tuple[str, ...] = (),
        has_types: bool = False,
    ) -> None:
        self._model, self._chain, self._config, self._device = model, chain, config, config.device
        self._state, self._masks = PackedState(self._preemption_point), WindowMasks()
        self._takes_positions = "position_ids" in inspect.signature(model.forward).parameters
        self._positions = Positions(model)
        self._filler, self._rope = padding_id(model), LengthAwareRope(model)
        # transformers 5.17 says that Gemma 2 supports SDPA, which then leaves its scores without their cap.
        is_capped = getattr(model.config.get_text_config(), "attn_logit_softcapping", None) is not None
        self._own_attention = "sdpa" if model._supports_sdpa and not is_capped else "eager"
        self.notes = why_not_packed(model) or notes
        adapt(model, self._state)
        self._fused = [] if self.notes else fuse(model, self._state)
        decoder = [] if self.notes or self._fused else fuse_decoder(model, self._state)
        form = config.weight_form
        self._product_bytes = form.apply(model, [*self._fused, *decoder]) if form is not None else 0
        self._copies = PrepackedWeights(model, self._fused, has_types=has_types)
        self._is_fusible, self._has_types = bool(self._fused or decoder), has_types
        on_cpu = self._device.type == "cpu"
        skips = ("last",) if decoder else self._fused[-1].skips if self._fused else ()
        self._kept: TokenChoice = chain.reads if on_cpu and chain.reads in skips else "all"
        self._is_scripted = any(layer.is_scripted for layer in decoder)
        self._can_share = bool(decoder) and on_cpu and all(layer.is_causal for layer in decoder)
        if on_cpu and not self.notes:
            replace_products(model, self._state)
        self._recorder = recorder if has_varlen(self._device, model.dtype) and not self._rope.remembers else None
        self._graphs: CudaGraphs | None = None
        self.window: int | None = getattr(model.config.get_text_config(), "sliding_window", None)
        self.dimensions, self.placed = chain.dimensions, config.placed
        self.path: ForwardPath = "padded"
        self._chosen: ForwardPath = "padded"
        self._failure, self.part_tokens = "", PART_TOKENS
        self.passes = PathFallback(lambda: self.switch_to("unpadded"), self._resume)
        self.num_layers = len(layers := layers_of(model))
        for layer in layers:
            layer.register_forward_pre_hook(lambda *_: self._preemption_point())

    @property
    def paths(self) -> ForwardPaths:
        """See `LoadedEncoder`."""
        return self

    @property
    def attention(self) -> Attention:
        """See `Encoder`."""
        return attention_of(self.path)

    @property
    def is_reentrant(self) -> bool:
        """See `Encoder`. False where the model keeps state from one pass to the next, or layers take turns."""
        return not (self.passes.is_switch_due or self._rope.remembers or (self.placed and self.placed.host_layers))

    @property
    def fallback(self) -> str:
        """See `Encoder`."""
        wait_s = self.passes.retry_in_s
        why = f"unpadded: {self._failure} on the {self._chosen} path, which is tried again in {wait_s:.0f} s"
        return why if self.passes.is_active else ""

    @torch.inference_mode()
    def __call__(self, texts: Sequence[Ids], prompt_tokens: Sequence[int] | None = None) -> Tensor:
        """See `Encoder`."""
        with self.passes.running_pass():  # graphs, too: those of a path that is taken up again are not checked yet
            graphs = self._graphs if prompt_tokens is None else None
            if graphs is not None and (size := graphs.fitting(texts)) is not None:
                return graphs(texts, size)
            layout = self._layout(texts)
            with reserve_for_onnxruntime(self._copies.needs_onnxruntime(layout)):
                return self._pooled(self._hidden_or_fail_over(texts, layout), layout, prompt_tokens)

    def forms(self, texts: Sequence[Ids]) -> Iterator[PathForm]:
        """See `ForwardPaths`, and `engines/models/path_forms.py`."""
        full_rows = self._graphs.full_rows(texts) if self._graphs is not None else ()
        takes_blocks, can_share = self.attention == "packed" and self._device.type == "cpu", self._can_share
        shared_forms = row_forms("fused", is_scripted=self._is_scripted) if can_share and self.path == "fused" else ()
        return path_forms(self, texts, full_rows, takes_blocks=takes_blocks, shared_forms=shared_forms)

    @torch.inference_mode()
    def encode_batched(self, texts: Sequence[Ids]) -> Tensor:
        """Returns vectors `[forms, n, D]`, with as many other texts beside each as the path allows, in each form that
        a pass of many texts may take. Padded batches are not cut by length, however much padding that takes."""
        forms = row_forms(self.path, is_scripted=self._is_scripted)
        return torch.stack([self._as_asked(texts, form) for form in forms])

    @torch.inference_mode()
    def encode_single(self, text: Ids) -> Tensor:
        """Returns vectors `[forms, D]` of a text alone, in each form that a pass of few tokens may take."""
        forms: tuple[KernelVariant, ...] = ("few", "shared") if self.path == "prepacked" else ("few",)
        return torch.cat([self._as_asked([text], form) for form in forms])

    @torch.inference_mode()
    def encode_forced(self, texts: Sequence[Ids], form: KernelVariant = "many") -> Tensor:
        """Returns vectors `[n, D]` with attention in blocks and tokens shared wherever that can be, worthwhile or not.
        Else only texts that are longer than those of a check have these."""
        return self._as_asked(texts, form, is_forced=True)

    @torch.inference_mode()
    def encode_fixed(self, texts: Sequence[Ids], size: Size) -> Tensor:
        """Returns vectors `[n, D]` of texts that fit into a row of this size, by its recorded pass."""
        assert self._graphs is not None, "it has a size"
        return self._graphs(texts, size)

    @torch.inference_mode()
    def reference(self, texts: Sequence[Ids], prompt_tokens: Sequence[int] | None = None) -> Tensor:
        """See `ForwardPaths`. It changes how the model runs, so that nothing else may run meanwhile."""
        used, layout = self.path, self._layout(texts)
        switch_attention(self._model, "eager")
        try:
            hidden = self._in_runs(self._unpadded, texts, layout)
        finally:
            self.switch_to(used)
        return self._reference_rows(hidden, layout, prompt_tokens)

    def _reference_rows(self, hidden: Tensor, layout: PackedLayout, prompt_tokens: Sequence[int] | None) -> Tensor:
        return self._chain(hidden, layout, prompt_tokens)

    @torch.inference_mode()
    def switch_to(self, path: ForwardPath, graphs: CudaGraphs | None = None) -> None:
        """See `ForwardPaths`. Passes are recorded once, where `graphs` are not given, and forgotten with their path."""
        self.path = path
        self.part_tokens = prepacked.PART_TOKENS if path == "prepacked" else PART_TOKENS
        switch_attention(self._model, PACKED if self.attention == "packed" else self._own_attention)
        if path != "graphed":
            self._graphs = None
        elif self._graphs is None:
            self._graphs = graphs or self.unrecorded().recorded()
        self._copies.make(self._config.num_threads if path == "prepacked" else 0)

    def candidate_paths(self) -> tuple[ForwardPath, ...]:
        """See `ForwardPaths`. Whether a path is right, `engines/models/verification.py` finds out."""
        if self.notes:
            return ("padded", "unpadded")
        copied = self._copied_bytes() or self._copies.can_run_packed
        fast: dict[ForwardPath, object] = {"graphed": self._recorder, "prepacked": copied, "fused": self._is_fusible}
        return (*(path for path, can in fast.items() if can), "packed", "padded", "unpadded")

    @property
    def sizes(self) -> tuple[Size, ...]:
        """Returns the sizes whose rows run by a recorded pass on the path in use."""
        return self._graphs.sizes if self._graphs is not None else ()

    def extra_bytes(self) -> int:
        """See `LoadedEncoder`."""
        if self._graphs is not None:
            return kept_bytes(self._graphs.kept_tokens, self.token_bytes())
        return self._product_bytes + (self._copied_bytes() if self.path == "prepacked" else 0)

    def tensors(self) -> list[Tensor]:
        """See `Encoder`."""
        return [*self._model.parameters(), *self._model.buffers(), *self._chain.weights]

    def token_bytes(self) -> int:
        """See `LoadedEncoder`. Those of a layer are freed before those of the next are allocated."""
        return layer_token_bytes(self._model, self.dimensions) + 16 * self._has_types

    def _copied_bytes(self) -> int:
        return self._copies.size_bytes(self._config.max_prepacked_bytes, self._config.num_threads)

    def unrecorded(self) -> CudaGraphs:
        """Returns what records its passes. It must run nothing else while they are recorded (`passes.alone`)."""
        assert self._recorder is not None, "paths() offers what can be done"
        return CudaGraphs(self._fixed, self._as_asked, self._positions.filler, self._device, self._recorder)

    def _preemption_point(self) -> None:
        """Lets other texts run, but during a recording, in which they would be recorded too."""
        if not is_recording():
            self._config.preemption_point()

    def _fixed(self, layout: FixedPackedLayout) -> Tensor:
        """Returns the vectors of a row of a fixed size, also of its places without a text."""
        return self._chain(self._row(layout.ids, layout), layout)

    def _as_asked(self, texts: Sequence[Ids], form: KernelVariant | None = None, *, is_forced: bool = False) -> Tensor:
        """Returns rows of the check by the path in use, without falling back when it fails."""
        layout = self._layout(texts)
        return self._pooled(self._in_form(texts, layout, form, is_forced=is_forced), layout)

    def _in_form(
        self, texts: Sequence[Ids], layout: PackedLayout, form: KernelVariant | None, *, is_forced: bool = False
    ) -> Tensor:
        """Returns hidden states in a form. It is a property of the layout, so that other passes may run meanwhile."""
        layout.padding_share, layout.variant, layout.is_forced = 1.0, form, is_forced
        return self._hidden(texts, layout)

    def _pooled(self, hidden: Tensor, layout: PackedLayout, prompt_tokens: Sequence[int] | None = None) -> Tensor:
        """Applies the head to hidden states of all tokens `[T, H]`, or of one token of each text `[n, H]`."""
        if (rows := hidden.shape[0]) < layout.num_tokens:
            layout, prompt_tokens = PackedLayout([1] * rows, self._device), None
        return self._chain(hidden, layout, prompt_tokens)

    def _layout(self, texts: Sequence[Ids], *, needs_all: bool = False) -> PackedLayout:
        layout = PackedLayout([len(ids) for ids in texts], self._device, self._masks)
        layout.texts, layout.needs_all = texts, needs_all
        return layout

    def _kept_tokens(self, layout: PackedLayout) -> TokenChoice:
        """Returns the tokens of which the last layer gives hidden states."""
        return self._kept if self.path in ("fused", "prepacked") and not layout.needs_all else "all"

    def _hidden(self, texts: Sequence[Ids], layout: PackedLayout) -> Tensor:
        """Returns hidden states `[T, H]` by the path in use; `[n, H]` of one token each if the head reads no others."""
        runs: dict[Attention, Run] = {"packed": self._packed, "padded": self._padded, "unpadded": self._unpadded}
        return self._in_runs(runs[self.attention], texts, layout)

    def _hidden_or_fail_over(self, texts: Sequence[Ids], layout: PackedLayout) -> Tensor:
        """Returns hidden states `[T, H]`; when the path fails, schedules the switch to `unpadded` and a later retry.

        Raises:
            ForwardPathFailed: the path failed, although its check at load did not; run the texts again.
        """
        try:
            return self._hidden(texts, layout)
        except Exception as error:
            if is_device_error(error):
                raise
            if self.path == "unpadded":
                self.passes.retry_now()
                raise
            self._leave_path(error, layout.num_tokens)
            raise ForwardPathFailed from error

    def _leave_path(self, error: Exception, num_tokens: int) -> None:
        log.warning("model.path_left", path=self.path, tokens=num_tokens, exc_info=error)
        self._chosen, self._failure = self.path, type(error).__name__
        self.passes.report_failure()

    def check_beside(self, check: Callable[[ForwardPaths], None]) -> None:
        """Runs a check of the path in use beside other passes, and leaves the path where the check fails.

        Raises:
            ForwardPathFailed: another path is being taken; check that one later.
        """
        with self.passes.running_pass():
            try:
                check(self)
            except SelfCheckFailed as error:
                self._leave_path(error, 0)

    def _resume(self) -> bool:
        """Switches back to the failed path if its vectors are right: the failure may have corrupted it."""
        try:
            self.switch_to(self._chosen)
            self._config.recheck(self)
        except Exception as error:
            if device_loss(error):
                raise
            # Whatever else it is, the plainest path serves on.
            log.warning("model.path_not_resumed", path=self._chosen, reason=str(error))
            self.switch_to("unpadded")
            return False
        log.info("model.path_resumed", path=self._chosen)
        return True

    def _in_runs(self, run: Run, texts: Sequence[Ids], layout: PackedLayout) -> Tensor:
        """Returns hidden states `[T, H]`, from several passes where texts must not share one."""
        longest = self._rope.limit
        spans = [] if longest is None or layout.longest <= longest else [*self._rope.runs(layout.lengths)]
        if len(spans) < 2:
            self._rope.reset()
            return run(texts, layout)
        parts = [(texts[a:b], self._layout(texts[a:b])) for a, b in spans]
        for _, part in parts:
            part.run_like(layout)
        return torch.cat([self._in_runs(run, *part) for part in parts])

    def _packed(self, texts: Sequence[Ids], layout: PackedLayout) -> Tensor:
        """Runs the texts as one packed row; in a causal model they share the tokens that all begin with."""
        layout.in_blocks = layout.is_forced
        can_share = self._can_share and self.path == "fused" and len(texts) > 1 and layout.num_visible is None
        num_shared = num_shared_tokens(texts, is_forced=layout.is_forced) if can_share else 0
        if not num_shared:
            return self._row(layout.ids, layout)
        row = np.concatenate([texts[0][:num_shared], *(ids[num_shared:] for ids in texts)])
        shared = SharedPrefixLayout(layout.lengths, num_shared, self._device)
        shared.run_like(layout)
        shared.in_blocks = layout.is_forced
        hidden = self._row(to_device(row, self._device), shared)
        return hidden if self._kept_tokens(layout) == "last" else hidden[shared.spread]

    def _row(self, row: Tensor, layout: PackedLayout) -> Tensor:
        """Returns the hidden states of a packed row of ids `[T]`."""
        kept = self._kept_tokens(layout)
        if self._copies.supports(layout, layout.variant):
            positions = self._positions(row & ID_MASK if self._has_types else row, layout)
            return self._copies(row, positions, layout, layout.variant, self._preemption_point, kept)
        ids, types = self._parted(row[None])
        options = {"position_ids": self._positions(ids[0], layout)[None], **types} if self._takes_positions else types
        is_fused = self._is_fusible and self.path != "packed"
        with self._state.running(layout, is_fused=is_fused, variant=layout.variant, kept=kept):
            return self._forward(ids, attention_mask=None, packed_layout=layout, **options)[0]

    def _padded(self, texts: Sequence[Ids], layout: PackedLayout) -> Tensor:
        """Runs the texts as padded batches of similar lengths, and drops the padding."""
        spans = bucket_by_length(layout.lengths, layout.padding_share)
        return torch.cat([self._batch(texts[start:end]) for start, end in spans])

    def _unpadded(self, texts: Sequence[Ids], layout: PackedLayout) -> Tensor:
        """Runs the texts as batches of one length."""
        return torch.cat([self._batch(texts[start:end]) for start, end in bucket_by_length(layout.lengths, 0.0)])

    def _batch(self, texts: Sequence[Ids]) -> Tensor:
        """Returns the hidden states `[tokens, H]` of a padded batch, without those of the padding."""
        ids, mask = padded(texts, self._filler)
        places = np.flatnonzero(mask)  # on the host, which would wait for a GPU to count the tokens of a mask
        row, types = self._parted(to_device(ids, self._device))
        seen = to_device(mask & (ids < UNSEEN), self._device)
        hidden = self._forward(row, attention_mask=seen, **types).flatten(0, 1)
        return hidden if len(places) == len(hidden) else hidden[to_device(places, self._device)]

    def _parted(self, ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns ids without marks, and the types as the model takes them; none where ids carry none."""
        return ids & ID_MASK, {"token_type_ids": ids >> TYPE_SHIFT} if self._has_types else {}

    def _forward(self, input_ids: Tensor, **options: Any) -> Tensor:
        hidden: Tensor = self._model(input_ids=input_ids, **options).last_hidden_state
        return hidden
