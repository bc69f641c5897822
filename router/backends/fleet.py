"""`Fleet`: the interface between `RemoteBackend` and remote hosts (worker processes or a Ray cluster)."""

from collections.abc import Callable, Mapping
from typing import Protocol

from engines.errors import EngineError, HostLost
from engines.rpc.messages import Reply, Request
from engines.spec import ModelSpec
from engines.types import Budget, Call, HostBudget, HostSnapshot, Result
from router.backends.event_feed import EventFeed
from router.backends.host_directory import HostDirectory


class NotSent(HostLost):
    """Raised before a call was sent, because no host was open; sending it later is safe."""


class RoutedCall:
    """Tracks one call over its attempts on hosts.

    Attributes:
        avoid: hosts that it must not be sent to (again).
        host_id: the host of the last attempt.
        refusal: the error of the hosts in `avoid`; of several, the one that allows the earliest retry.
        was_lost: whether a host was lost while it ran the call.
    """

    def __init__(self, call: Call, spec: ModelSpec) -> None:
        self.call = call
        self.spec = spec
        self.avoid: set[str] = set()
        self.host_id: str | None = None
        self.refusal: EngineError | None = None
        self.was_lost = False


class Fleet(Protocol):
    """Connects to the hosts and sends requests to them. All calls come from one event loop.

    Raises the errors of `engines/errors.py`; `HostLost` when a host ended before it had answered.
    """

    @property
    def directory(self) -> HostDirectory:
        """Snapshots of the hosts, and the calls in flight to them."""

    @property
    def feed(self) -> EventFeed:
        """Events of the hosts."""

    async def open(self, specs: Mapping[str, ModelSpec], on_change: Callable[[], None]) -> None:
        """Connect to the hosts; calls `on_change` when a host appears or is back."""

    async def send(self, routed: RoutedCall) -> Result:
        """Run the call on the best open host."""

    async def ask(self, host_id: str, request: Request) -> Reply:
        """Send a request to one host, and update the directory from its reply."""

    async def reload(
        self, specs: Mapping[str, ModelSpec], budget: Budget | None, host_budget: HostBudget | None = None
    ) -> None:
        """Send a new registry to every host, and to those that appear later."""

    async def recycle(self, host_id: str) -> None:
        """See `Backend.recycle`; `host_id` has been checked."""

    def faults(self) -> Mapping[str, str]:
        """See `Backend.check`."""

    def snapshots(self) -> tuple[HostSnapshot, ...]:
        """See `Backend.snapshots`."""

    def quarantine(self, model_id: str) -> None:
        """Raise LoadFailed for a model that is quarantined because hosts crashed while it ran."""

    async def aclose(self, grace_s: float) -> None:
        """Stop the hosts and tasks that belong to this server."""
