"""TODO router/backends/base.py."""

from collections.abc import AsyncIterator, Iterable, Mapping
from typing import NoReturn, Protocol

from engines.errors import HostNotFound, ModelNotFound
from engines.spec import ModelSpec
from engines.types import Budget, Call, Event, HostSnapshot, ModelStatus, Plan, Result

SIZE_S = 10.0
"""A plan waits no longer for a hub; it then says that the size is not known."""


class Backend(Protocol):
    """All hosts together. Every call names models by their `model_id`, never by an alias.

    Errors are those of `engines/errors.py`, whatever lies between.
    """

    async def start(self) -> None:
        """Open the hosts; afterwards calls are served. Preloads begin but are not waited for."""

    async def run(self, call: Call) -> Result:
        """Answer one call on the best host; waits for a cold model as long as the call allows."""

    async def preload(
        self, model_id: str, *, pin: bool = False, wait: bool = True, host_id: str | None = None
    ) -> ModelStatus:
        """Load the model where it fits best, or on one host; returns when it is ready, at once when `wait` is false.

        Raises:
            HostNotFound: there is no such host.
        """

    async def evict(self, model_id: str, *, force: bool = False, timeout_s: float = 30.0) -> tuple[ModelStatus, ...]:
        """Wait for running requests, then free the model on every host.

        Raises:
            ModelPinned: pinned, and not forced.
            ModelInUse: requests were still running at the timeout.
        """

    async def plan(self, model_id: str) -> Plan:
        """What loading the model would do, without doing it. May ask the hub for its size."""

    async def reload(self, specs: Mapping[str, ModelSpec], budget: Budget | None = None) -> None:
        """Serve these models from now on, in this much memory; only what changed is touched."""

    async def recycle(self, host_id: str) -> None:
        """Drain the host, end what it runs in, start it anew, and bring back what was ready there.

        Returns when the host takes work again; its models may still be on their way.

        Raises:
            HostNotFound: there is no such host.
            InvalidValue: hosts of this backend cannot be started anew.
        """

    def snapshots(self) -> tuple[HostSnapshot, ...]:
        """The state of every host now; never blocks."""

    def check(self) -> Mapping[str, str]:
        """What is wrong with hosts whose device is down, by host id; their callers are told at once. Never blocks."""

    def events(self, after: Mapping[str, int] | None = None) -> AsyncIterator[Event]:
        """Events of all hosts as they happen; with `after` (host id → seq), the remembered ones since come first."""

    async def aclose(self, *, grace_s: float = 30.0) -> None:
        """Admit nothing new, finish what was admitted within the grace time, free everything."""


def no_model(model_id: str) -> NoReturn:
    """Refuse a model that no registry names."""
    raise ModelNotFound(f"no model {model_id!r} is served here; see the list of models")


def no_host(host_id: str, known: Iterable[str]) -> NoReturn:
    """Refuse a host that is not there."""
    raise HostNotFound(f"no host is called {host_id!r}; this server has {', '.join(known) or 'none now'}")
