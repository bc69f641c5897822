"""Versions the registry that all hosts must serve: one protocol for worker processes and for a cluster.

A host accepts a registry of a higher generation than its own. It gets one when it connects, at every reload, and
whenever it reports a lower generation. The counter continues from the highest one seen on any host (Lamport 1978), so
the registry that was read last is the newest, whatever the age of its file, also after a rollback. Pure.
"""

import hashlib
from collections.abc import Iterable, Mapping

import msgspec

from engines.rpc.messages import Generation, Reload
from engines.spec import ModelSpec
from engines.types import Budget, HostBudget


def first_generation(specs: Mapping[str, ModelSpec]) -> Generation:
    """Return the generation of a registry that was not sent to any host yet."""
    return Generation(0, _digest(specs))


class DesiredRegistry:
    """The registry that this router read last, as it is sent to hosts.

    Attributes:
        message: the whole registry, as a message to a host.
    """

    def __init__(self, specs: Mapping[str, ModelSpec]) -> None:
        self.message = Reload(specs=specs, generation=first_generation(specs))
        self._highest = 0
        self._is_settled = False

    @property
    def generation(self) -> Generation:
        """The generation of this registry."""
        return self.message.generation

    def change(
        self, specs: Mapping[str, ModelSpec], budget: Budget | None, host_budget: HostBudget | None = None
    ) -> None:
        """Replace the registry by a newly read one, with a generation above all seen. None keeps the last budget."""
        self._is_settled = True
        self.message = Reload(
            specs=specs,
            budget=budget or self.message.budget,
            host_budget=host_budget or self.message.host_budget,
        )
        self._set_generation(self._highest + 1, _digest(specs))

    def observe(self, shown: Generation) -> None:
        """Record the generation of a host. Another router's newer registry stays until the next reload here."""
        self._highest = max(self._highest, shown.counter)
        if self._is_settled and shown.digest == self.generation.digest and shown > self.generation:
            self._set_generation(shown.counter, shown.digest)

    def settle(self, shown: Iterable[Generation]) -> None:
        """Set the generation once the first hosts reported: a start counts as a reload, unless they serve the same."""
        newest = max(shown, default=None)
        if self._is_settled or newest is None:
            return
        self._is_settled = True
        digest = self.generation.digest
        self._set_generation(newest.counter if newest.digest == digest else newest.counter + 1, digest)

    def is_outdated(self, shown: Generation) -> bool:
        """Whether a host with this generation must be sent the registry."""
        return self._is_settled and shown < self.generation

    def _set_generation(self, counter: int, digest: str) -> None:
        self._highest = max(self._highest, counter)
        self.message = msgspec.structs.replace(self.message, generation=Generation(counter, digest))


def _digest(specs: Mapping[str, ModelSpec]) -> str:
    return hashlib.sha256(msgspec.msgpack.encode(specs, order="deterministic")).hexdigest()
