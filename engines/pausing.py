"""Pauses inside a forward pass, so that the self-check of a large model does not hold up the small ones beside it."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def pausing(layers: Iterable[nn.Module], pause: Callable[[], None]) -> Iterator[None]:
    """Inside the block, call `pause` before each of these modules runs. What it raises ends the pass."""
    hooks = [layer.register_forward_pre_hook(lambda *_: pause()) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
