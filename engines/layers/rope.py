"""Keeps rotary embeddings whose frequencies depend on the longest text of a batch from mixing texts.

`dynamic` and `longrope` models compute other frequencies for every text of a batch once it holds a text longer than
those that they were trained on; `dynamic` models also keep the longest length so far. A text's vector would depend on
the other texts of its batch and on earlier batches. So longer texts run alone, from a clean state: each then gets the
vector that the model gives for the text by itself.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import nn

_CACHED, _FIRST = "max_seq_len_cached", "original_inv_freq"


class LengthAwareRope:
    """The rotary embeddings of a model that depend on the length of a batch; most models have none.

    Attributes:
        limit: the most tokens of a text that may share a batch, None for any.
        remembers: whether a pass changes them, so that two must not run at once.
    """

    def __init__(self, model: nn.Module) -> None:
        found = [(module, _kinds(module)) for module in model.modules() if hasattr(module, "rope_type")]
        self._dynamic = [module for module, kinds in found if any("dynamic" in kind for kind in kinds)]
        aware = [module for module, kinds in found if any("dynamic" in kind or kind == "longrope" for kind in kinds)]
        self.remembers = bool(aware)
        self.limit: int | None = min((limit for module in aware for limit in _limits(module)), default=None)

    def runs(self, lengths: Sequence[int]) -> Iterator[tuple[int, int]]:
        """Cuts lengths, in ascending order, into runs (start, end) of texts that may share a forward pass."""
        shared = sum(1 for length in lengths if self.limit is None or length <= self.limit)
        if shared:
            yield 0, shared
        yield from ((index, index + 1) for index in range(shared, len(lengths)))

    def reset(self) -> None:
        """Restores the state before the first text."""
        for module in self._dynamic:
            for name, frequencies in list(module.named_buffers(recurse=False)):
                if name.endswith(_FIRST):
                    setattr(module, name.replace(_FIRST, "inv_freq"), frequencies.clone())
            for name in [name for name in vars(module) if name.endswith(_CACHED)]:
                setattr(module, name, module.original_max_seq_len)


def _kinds(module: Any) -> tuple[str, ...]:
    """Returns the types of a module: `rope_type` is one type, or one for each type of layer."""
    kinds = module.rope_type
    return tuple(kinds.values()) if isinstance(kinds, dict) else (str(kinds),)


def _limits(module: Any) -> Iterable[int]:
    """Yields the lengths at which the frequencies of a module change."""
    yield module.original_max_seq_len
    parameters = getattr(module.config, "rope_parameters", None) or {}
    for settings in (parameters, *parameters.values()):
        if isinstance(settings, dict) and settings.get("original_max_position_embeddings"):
            yield settings["original_max_position_embeddings"]
