"""What this process knows of the replicas, and which calls are on their way to them.

Serve makes the request router by itself and pickles its class by value, so nothing can be handed to it: both it and the
fleet find the board here. All of it lives on one event loop, because `RAY_SERVE_THROUGHPUT_OPTIMIZED` keeps Serve's
router on the loop of its caller.
"""

import asyncio
from collections.abc import Callable, Collection, Mapping
from typing import Any

import msgspec

from engines.errors import LoadFailed
from engines.types import HostSnapshot
from router.backends.fleet import RoutedCall
from router.backends.host_directory import HostDirectory


class RoutedRequest:
    """One request to a replica. `to`: which one; None when the best for the ticket's model is to be chosen.

    `limit`: of the wait for its answer. `is_sent`: false when it was given up because no replica could take it.
    """

    def __init__(self, *, ticket: RoutedCall | None = None, to: str | None = None) -> None:
        self.ticket = ticket
        self.to = to
        self.limit: asyncio.Timeout | None = None
        self.is_sent = True

    def give_up(self) -> None:
        """End the wait: Serve would look for a replica until there is one, and keep others from being routed."""
        if self.is_sent and self.limit is not None:
            self.limit.reschedule(asyncio.get_running_loop().time())
        self.is_sent = False


class ReplicaDirectory:
    """The replicas as Serve's controller and the hosts themselves tell of them.

    Attributes:
        running: ids of the replicas that run, as Serve says.
        on_change: called when a host takes calls that did not before: it is new, or it is back.
    """

    def __init__(self) -> None:
        self.ledger = HostDirectory()
        self.running: frozenset[str] = frozenset()
        self.on_change: Callable[[], None] = lambda: None
        self._errands: dict[str, RoutedRequest] = {}
        self._last_errand = 0

    # ---- the fleet's side ----

    def begin(self, errand: RoutedRequest) -> str:
        """Put an errand on the board; the name that its request carries."""
        self._last_errand += 1
        name = str(self._last_errand)
        self._errands[name] = errand
        return name

    def end(self, name: str) -> None:
        """The request has its answer, or nobody waits for it any more."""
        errand = self._errands.pop(name)
        if errand.ticket is not None and errand.to is not None:
            self.ledger.end(errand.to, errand.ticket.spec.model_id)

    def note(self, snapshot: HostSnapshot) -> None:
        """What a host that runs is like now."""
        before = self.ledger.snapshot(snapshot.host_id)
        if snapshot.host_id in self.running:
            self.ledger.update(snapshot)
            if before is None or (before.is_draining and not snapshot.is_draining):
                self.on_change()

    # ---- the request router's side ----

    def see(self, stats: Mapping[str, Mapping[str, Any]]) -> None:
        """These replicas run now; what they say of themselves counts until they are asked directly."""
        known = self.ledger.devices().keys()
        self.running = frozenset(stats)
        for host_id in known - self.running:
            self.ledger.forget(host_id)
        for host_id in self.running - known:
            if "snapshot" in stats[host_id]:
                self.note(msgspec.convert(stats[host_id]["snapshot"], HostSnapshot))

    def choose(self, name: str, running: Collection[str]) -> str | None:
        """The replica for a request; None when none can take it now, and then the request is given up.

        A placement counts from here on: a herd on cold models must not find every host as empty as the first did.
        """
        errand = self._errands.get(name)
        if errand is None:
            return None  # its caller has left
        chosen = self._best(errand, errand.ticket, running) if errand.ticket is not None else errand.to
        if chosen not in running:
            errand.give_up()
            return None
        return chosen

    def _best(self, errand: RoutedRequest, ticket: RoutedCall, running: Collection[str]) -> str | None:
        model_id = ticket.spec.model_id
        if errand.to is not None:
            self.ledger.end(errand.to, model_id)  # chosen before, and refused
            errand.to = None
        try:
            hosts = [host_id for host_id in self.ledger.ranked(ticket.spec, ticket.avoid) if host_id in running]
        except LoadFailed:
            return None
        if hosts:
            errand.to = ticket.host_id = hosts[0]
            self.ledger.begin(hosts[0], model_id)
        return errand.to


REPLICAS = ReplicaDirectory()
