"""The registry that all hosts shall serve, and its generation: one protocol for worker processes and for a cluster.

A host takes what is of a higher generation than its own. It is told at its hello, at every reload, and whenever it
shows a lower one. The counter goes on from the highest that was seen on any host (Lamport 1978), so what was read last
holds, whatever the age of its file: a registry that was rolled back is as new as any. Pure.
"""

import hashlib
from collections.abc import Iterable, Mapping

import msgspec

from engines.rpc.messages import Generation, Reload
from engines.spec import ModelSpec
from engines.types import Budget


def first_generation(specs: Mapping[str, ModelSpec]) -> Generation:
    """Of a registry that no host has been told of yet."""
    return Generation(0, _digest(specs))


class DesiredRegistry:
    """What this router has read last, as it is told to hosts.

    Attributes:
        message: tells a host all of it.
    """

    def __init__(self, specs: Mapping[str, ModelSpec]) -> None:
        self.message = Reload(specs=specs, generation=first_generation(specs))
        self._highest = 0
        self._is_settled = False

    @property
    def generation(self) -> Generation:
        """Of this registry."""
        return self.message.generation

    def change(self, specs: Mapping[str, ModelSpec], budget: Budget | None) -> None:
        """It was read again, so it is newer than all that was seen. Without a budget, the last one holds."""
        self._is_settled = True
        self.message = Reload(specs=specs, budget=budget or self.message.budget)
        self._count(self._highest + 1, _digest(specs))

    def hear(self, shown: Generation) -> None:
        """A host serves this. Another router's newer registry is left alone, and the next reload here beats it."""
        self._highest = max(self._highest, shown.counter)
        if self._is_settled and shown.digest == self.generation.digest and shown > self.generation:
            self._count(shown.counter, shown.digest)

    def settle(self, shown: Iterable[Generation]) -> None:
        """The first hosts were heard: a start is a reload, unless they serve the same already."""
        newest = max(shown, default=None)
        if self._is_settled or newest is None:
            return
        self._is_settled = True
        digest = self.generation.digest
        self._count(newest.counter if newest.digest == digest else newest.counter + 1, digest)

    def is_lacking(self, shown: Generation) -> bool:
        """Whether a host that serves this must be told."""
        return self._is_settled and shown < self.generation

    def _count(self, counter: int, digest: str) -> None:
        self._highest = max(self._highest, counter)
        self.message = msgspec.structs.replace(self.message, generation=Generation(counter, digest))


def _digest(specs: Mapping[str, ModelSpec]) -> str:
    return hashlib.sha256(msgspec.msgpack.encode(specs, order="deterministic")).hexdigest()
