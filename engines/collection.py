"""Keeps Python's garbage collection away from objects that stay for good, mostly those of imported libraries."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def no_collection() -> Iterator[None]:
    """Run the block, which imports and builds what stays, without garbage collection, and `freeze` what there is then.

    torch, transformers and the server are 430,000 objects. While they are imported the collector goes through them
    again and again, 0.75 of 3.1 s of CPU time, and the 12,000 objects that it frees are 8 MB.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        freeze()
        if was_enabled:
            gc.enable()


def freeze() -> None:
    """Exclude the objects that exist now from garbage collection.

    Each unload of a model ends with a full collection; over torch and transformers it holds the interpreter lock for
    0.3 s, during which no request is answered. At the end of the process, the interpreter goes through them for 2 s.
    No collection comes first: it takes as long as one unload's, and would free next to nothing.
    """
    gc.freeze()
