"""Runs the probes of the check at load in every form that the path in use has (`engines/models/verification.py`)."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import product
from typing import Protocol

from torch import Tensor

from engines.inputs.token_ids import Ids
from engines.layers.packing import KernelVariant
from engines.layers.products import onednn_is_faster
from engines.models.base import ForwardPath, PathForm, Size


class FormEncoder(Protocol):
    """What can be made to run texts in one form or another; see `engines.models.transformer.TransformerEncoder`."""

    def encode_batched(self, texts: Sequence[Ids]) -> Tensor:
        """Returns rows `[forms, n, D]` of texts in one batch."""

    def encode_single(self, text: Ids) -> Tensor:
        """Returns rows `[forms, D]` of a text alone."""

    def encode_forced(self, texts: Sequence[Ids], form: KernelVariant = "many") -> Tensor:
        """Returns rows `[n, D]` by kernels of long texts, or of a form, with tokens shared wherever that can be."""

    def encode_fixed(self, texts: Sequence[Ids], size: Size) -> Tensor:
        """Returns rows `[n, D]` by the recorded pass of a size."""


def row_forms(path: ForwardPath, *, is_scripted: bool) -> tuple[KernelVariant, ...]:
    """Returns the forms that a pass of many texts may take on a path.

    Args:
        is_scripted: whether fused layers run by TorchScript, which has another form for few tokens.
    """
    if path == "prepacked":
        return ("many", "prepacked")
    return ("many", "few") if is_scripted and path == "fused" else ("many",)


def path_forms(
    encoder: FormEncoder,
    texts: Sequence[Ids],
    full_rows: Iterable[tuple[Size, Sequence[int]]],
    *,
    takes_blocks: bool,
    shared_forms: Sequence[KernelVariant],
) -> Iterator[PathForm]:
    """Runs texts in a batch and the first alone, by each kernel that such passes take; with attention in blocks, as
    long texts have it, and with shared tokens; and in a full row of each size that has a recorded pass.

    Args:
        full_rows: the sizes of recorded passes, and which texts fill a row of each.
        takes_blocks: whether attention on the path in use can run in blocks.
        shared_forms: the forms in which texts there share the tokens that they begin with.
    """
    for vectors in encoder.encode_batched(texts):
        yield PathForm(range(len(texts)), vectors)
    for vector in encoder.encode_single(texts[0]):
        yield PathForm([0], vector[None])
    if takes_blocks and onednn_is_faster():
        yield PathForm(range(len(texts)), encoder.encode_forced(texts), ", with attention in blocks,")
    for form, row in product(shared_forms, (0, len(texts) - 1)):
        yield PathForm([row, row], encoder.encode_forced([texts[row]] * 2, form), ", with shared tokens,")
    for size, rows in full_rows:
        vectors = encoder.encode_fixed([texts[row] for row in rows], size)
        yield PathForm(rows, vectors, f", in a row of {size.tokens} tokens,")
