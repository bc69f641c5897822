"""`Fleet`: what `RemoteBackend` needs of hosts that live elsewhere, whether in worker processes or on a cluster."""

from collections.abc import Callable, Mapping
from typing import Protocol

from engines.errors import EngineError, HostLost
from engines.rpc.messages import Reply, Request
from engines.spec import ModelSpec
from engines.types import Budget, Call, HostSnapshot, Result
from router.backends.event_feed import EventFeed
from router.backends.host_directory import HostDirectory


class NotSent(HostLost):
    """No host was open when the call was to be sent, so nothing was lost; it may be sent when one is."""


class RoutedCall:
    """One call on its way.

    Attributes:
        avoid: hosts that it must not go to (again).
        host_id: where it went last.
        refusal: why the hosts in `avoid` could not have it: of their reasons the most hopeful.
        was_lost: whether a host was lost under it.
    """

    def __init__(self, call: Call, spec: ModelSpec) -> None:
        self.call = call
        self.spec = spec
        self.avoid: set[str] = set()
        self.host_id: str | None = None
        self.refusal: EngineError | None = None
        self.was_lost = False


class Fleet(Protocol):
    """The hosts, and the way to them. All calls come from one event loop.

    Errors are those of `engines/errors.py`; `HostLost` says that a host ended before it had answered.
    """

    @property
    def directory(self) -> HostDirectory:
        """What is known of them."""

    @property
    def feed(self) -> EventFeed:
        """What has happened there."""

    async def open(self, specs: Mapping[str, ModelSpec], on_change: Callable[[], None]) -> None:
        """Reach the hosts; `on_change` is called when one has come that was not there, or is back."""

    async def send(self, ticket: RoutedCall) -> Result:
        """Run the call on the best open host."""

    async def ask(self, host_id: str, request: Request) -> Reply:
        """Ask one host, and bring the ledger up to date with what it says."""

    async def reload(self, specs: Mapping[str, ModelSpec], budget: Budget | None) -> None:
        """Bring a new registry to every host, and to those that come later."""

    async def recycle(self, host_id: str) -> None:
        """See `Backend.recycle`; the host is known."""

    def faults(self) -> Mapping[str, str]:
        """See `Backend.check`."""

    def snapshots(self) -> tuple[HostSnapshot, ...]:
        """See `Backend.snapshots`."""

    def quarantine(self, model_id: str) -> None:
        """Raise LoadFailed for a model that must not run now because of what it did to hosts."""

    async def aclose(self, grace_s: float) -> None:
        """End what belongs to this server."""
