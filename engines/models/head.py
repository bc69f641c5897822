"""Applies the modules that follow the backbone of a model: pooling, dense layers, normalization."""

from collections.abc import Callable, Sequence
from typing import Protocol

import structlog
from torch import Tensor

from engines.layers.packing import PackedLayout, TokenChoice
from engines.layers.pooling import pool
from engines.spec import PoolingMode

log = structlog.get_logger(__name__)

TOKENS, SENTENCE = "token_embeddings", "sentence_embedding"

Features = dict[str, Tensor]
"""The named tensors that modules read and write, as in sentence-transformers."""

Step = Callable[[Features, PackedLayout, Sequence[int] | None], None]
"""One module: features, layout and prompt tokens of the texts."""


class Head(Protocol):
    """What turns the hidden states of a row into one row of numbers for each text.

    Attributes:
        weights: the tensors that it holds.
    """

    weights: list[Tensor]

    @property
    def dimensions(self) -> int:
        """Returns the width of the rows."""

    @property
    def reads(self) -> TokenChoice:
        """Returns the tokens whose hidden states must be computed."""

    def __call__(self, hidden: Tensor, layout: PackedLayout, prompt_tokens: Sequence[int] | None = None) -> Tensor:
        """Turns packed hidden states `[T, H]` into float32 rows `[n, dimensions]`.

        Args:
            prompt_tokens: the number of leading tokens of each text that belong to its prompt.
        """


class EmbeddingHead:
    """Applies the modules that follow the transformer, in order.

    Args:
        hidden_size: the width of the transformer's hidden states.
        pooling: the registry's pooling modes, if any.

    Attributes:
        pooling: the pooling modes in use.
        override: the registry's pooling modes, which replace the folder's.
        source: the tensor that a Dense module reads which names none.
        target: the name of the tensor that is the result.
        excludes_prompt: whether pooling leaves out the tokens of the prompt.
        widths: the width of each named tensor after the modules so far.
        weights: the tensors that the modules hold.
    """

    def __init__(self, hidden_size: int, pooling: tuple[PoolingMode, ...] | None = None) -> None:
        self.widths = {TOKENS: hidden_size}
        self.pooling: tuple[PoolingMode, ...] = ()
        self.override = pooling
        self.source = self.target = SENTENCE
        self.excludes_prompt = False
        self.weights: list[Tensor] = []
        self._steps: list[Step] = []

    def __call__(self, hidden: Tensor, layout: PackedLayout, prompt_tokens: Sequence[int] | None = None) -> Tensor:
        """Turns packed hidden states `[T, H]` into float32 vectors `[n, dimensions]`.

        Args:
            prompt_tokens: the number of leading tokens of each text that belong to its prompt.
        """
        return self.run(hidden, layout, prompt_tokens)[self.target]

    def run(self, hidden: Tensor, layout: PackedLayout, prompt_tokens: Sequence[int] | None = None) -> Features:
        """Returns all named tensors that the modules leave, from packed hidden states `[T, H]`."""
        features = {TOKENS: hidden.float()}
        for step in self._steps:
            step(features, layout, prompt_tokens)
        return features

    @property
    def dimensions(self) -> int:
        """The width of the vectors."""
        return self.widths[self.target]

    @property
    def reads(self) -> TokenChoice:
        """The tokens whose hidden states the vector of a text depends on."""
        if self.pooling == ("lasttoken",):
            return "last"
        return "first" if self.pooling == ("cls",) and not self.excludes_prompt else "all"

    def add_pooling(self, modes: tuple[PoolingMode, ...], *, include_prompt: bool = True) -> None:
        """Adds pooling by `modes`, side by side, or by the registry's modes where it has any."""
        if self.override is not None and self.override != modes:
            log.warning("model.pooling_overridden", files=modes, registry=self.override)
        modes = self.override or modes

        def step(features: Features, layout: PackedLayout, prompt_tokens: Sequence[int] | None) -> None:
            features[SENTENCE] = pool(features[TOKENS], layout, modes, None if include_prompt else prompt_tokens)

        self._steps.append(step)
        self.pooling = modes
        self.excludes_prompt = not include_prompt
        self.widths[SENTENCE] = self.widths[TOKENS] * len(modes)

    def add(self, function: Callable[[Tensor], Tensor], source: str, target: str, width: int) -> None:
        """Adds a function of one named tensor, whose result is `width` wide."""

        def step(features: Features, _: PackedLayout, __: Sequence[int] | None) -> None:
            features[target] = function(features[source])

        self._steps.append(step)
        self.widths[target] = width
