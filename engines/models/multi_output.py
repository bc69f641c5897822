"""Gives several outputs of one pass: what a transformer's heads make of the hidden states of all tokens."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engines.device.torch_runtime import reserve_for_onnxruntime
from engines.inputs.token_ids import Ids
from engines.layers.packing import KernelVariant, PackedLayout, to_device
from engines.models.base import EncoderConfig, PathForm
from engines.models.cuda_graphs import GraphCapturer
from engines.models.head import Head
from engines.models.output_heads import OutputHeads
from engines.models.outputs import RawOutputs, Wanted
from engines.models.transformer import TransformerEncoder


class MultiOutputEncoder(TransformerEncoder):
    """Runs a transformers model and several heads (`engines.models.outputs.OutputsEncoder`).

    A call gives the dense vectors alone, as without the other heads. The check at load compares what all heads give, on
    every path; `dimensions` is the width of its rows. A recorded pass gives dense vectors only, so that models with
    other heads have none.

    Args:
        model: in eval mode, on the device.
        heads: what follows it.
        config, recorder, notes: see `TransformerEncoder`.
    """

    def __init__(
        self,
        model: Any,
        heads: OutputHeads,
        config: EncoderConfig,
        recorder: GraphCapturer | None = None,
        *,
        notes: tuple[str, ...] = (),
    ) -> None:
        head: Head = heads.dense if heads.dense is not None and heads.is_dense_only else heads
        super().__init__(model, head, config, recorder if head is not heads else None, notes=notes)
        self.heads = heads
        self.dimensions = heads.check_width

    @torch.inference_mode()
    def run_outputs(self, texts: Sequence[Ids], prompt_tokens: Sequence[int] | None, wanted: Wanted) -> RawOutputs:
        """See `OutputsEncoder`."""
        if wanted.is_dense_only:
            return RawOutputs(dense=self(texts, prompt_tokens))
        if wanted.side == "query" and self.heads.queries is not None:
            return self.heads.queries.run_outputs(texts, prompt_tokens, wanted)
        with self.passes.running_pass():
            layout = self._layout(texts, needs_all=True)
            return self.heads.run(self._hidden_of_all(texts, layout), layout, prompt_tokens, wanted)

    @torch.inference_mode()
    def encode_pieces(self, texts: Sequence[Ids], marks: Sequence[Ids]) -> Tensor:
        """See `engines.batching.contextual.PiecesEncoder`: to the dense head, each piece is a text."""
        assert self.heads.dense is not None, "the pooling of a model without a dense head is not known"
        with self.passes.running_pass():
            hidden = self._hidden_of_all(texts, self._layout(texts, needs_all=True))
            kept = to_device(np.flatnonzero(np.concatenate(marks)), self._device)
            lengths = [int(count) for each in marks for count in np.bincount(each)[1:]]
            return self.heads.dense(hidden[kept], PackedLayout(lengths, self._device))

    @property
    def model_dtype(self) -> torch.dtype:
        """Returns the dtype of the model's weights."""
        dtype: torch.dtype = self._model.dtype
        return dtype

    @torch.inference_mode()
    def sparse_weights(self, texts: Sequence[Ids]) -> Tensor:
        """Returns the weights of all entries, float32 `[n, vocabulary]`, by the path in use."""
        assert self.heads.sparse is not None, "the caller knows the heads"
        layout = self._layout(texts, needs_all=True)
        return self.heads.sparse.all_weights(self._hidden(texts, layout), layout, layout.ids, "document")

    def forms(self, texts: Sequence[Ids]) -> Iterator[PathForm]:
        """See `TransformerEncoder`; and in a batch that computes all tokens where a dense vector needs one of them."""
        yield from super().forms(texts)
        if self.heads.is_dense_only and self._kept != "all":
            yield PathForm(range(len(texts)), self._with_all_tokens(texts), ", with the states of all tokens,")

    def token_bytes(self) -> int:
        """See `LoadedEncoder`: of the layers and the sparse head, which follow each other."""
        return super().token_bytes() + (self.heads.sparse.token_bytes if self.heads.sparse is not None else 0)

    def _hidden_of_all(self, texts: Sequence[Ids], layout: PackedLayout) -> Tensor:
        with reserve_for_onnxruntime(self._copies.needs_onnxruntime(layout)):
            return self._hidden_or_fail_over(texts, layout)

    @torch.inference_mode()
    def _with_all_tokens(self, texts: Sequence[Ids]) -> Tensor:
        layout = self._layout(texts, needs_all=True)
        return self._pooled(self._in_form(texts, layout, "many"), layout)

    def _as_asked(self, texts: Sequence[Ids], form: KernelVariant | None = None, *, is_forced: bool = False) -> Tensor:
        """See `TransformerEncoder`; with other heads beside a dense one, the dense vectors also as a pass gives them
        that computes nothing else."""
        rows = super()._as_asked(texts, form, is_forced=is_forced)
        if self.heads.dense is None or self.heads.is_dense_only:
            return rows
        layout = self._layout(texts, needs_all=True)
        return self.heads.check_rows(rows, self._in_form(texts, layout, form, is_forced=is_forced), layout)

    def _reference_rows(self, hidden: Tensor, layout: PackedLayout, prompt_tokens: Sequence[int] | None) -> Tensor:
        if self.heads.is_dense_only:
            return super()._reference_rows(hidden, layout, prompt_tokens)
        return self.heads.check_rows(None, hidden, layout)
