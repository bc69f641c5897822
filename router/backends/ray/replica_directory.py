"""`ReplicaDirectory`: the replicas, and the requests in flight to them, for one router process.

Serve creates the request router by itself and pickles its class by value, so nothing can be passed to it: it and the
fleet share `REPLICAS`. All of it lives on one event loop, because `RAY_SERVE_THROUGHPUT_OPTIMIZED` keeps Serve's
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
    """One request to a replica. `to`: its id; None to choose the best one for the model of `call`.

    `limit`: timeout of the reply. `is_sent`: false when it was given up because no replica could take it.
    """

    def __init__(self, *, call: RoutedCall | None = None, to: str | None = None) -> None:
        self.call = call
        self.to = to
        self.limit: asyncio.Timeout | None = None
        self.is_sent = True

    def give_up(self) -> None:
        """End the wait for a reply: Serve would retry until a replica takes it, and route no others meanwhile."""
        if self.is_sent and self.limit is not None:
            self.limit.reschedule(asyncio.get_running_loop().time())
        self.is_sent = False


class ReplicaDirectory:
    """Tracks the replicas from reports of Serve's controller and of the hosts.

    Attributes:
        running: ids of the running replicas, according to Serve.
        on_change: called when a host starts to take calls: it is new, or back.
    """

    def __init__(self) -> None:
        self.directory = HostDirectory()
        self.running: frozenset[str] = frozenset()
        self.on_change: Callable[[], None] = lambda: None
        self._requests: dict[str, RoutedRequest] = {}
        self._last_name = 0

    # ---- called by the fleet ----

    def begin(self, routed: RoutedRequest) -> str:
        """Register a request; returns the name that Serve passes to `choose`."""
        self._last_name += 1
        name = str(self._last_name)
        self._requests[name] = routed
        return name

    def end(self, name: str) -> None:
        """Remove a request that was answered or cancelled."""
        routed = self._requests.pop(name)
        if routed.call is not None and routed.to is not None:
            self.directory.end(routed.to, routed.call.spec.model_id)

    def update(self, snapshot: HostSnapshot) -> None:
        """Replace the snapshot of a running host."""
        before = self.directory.snapshot(snapshot.host_id)
        if snapshot.host_id in self.running:
            self.directory.update(snapshot)
            if before is None or (before.is_draining and not snapshot.is_draining):
                self.on_change()

    # ---- called by the request router ----

    def set_running(self, stats: Mapping[str, Mapping[str, Any]]) -> None:
        """Set the running replicas; uses the snapshots in their stats for new ones, until these are polled."""
        known = self.directory.devices().keys()
        self.running = frozenset(stats)
        for host_id in known - self.running:
            self.directory.forget(host_id)
        for host_id in self.running - known:
            if "snapshot" in stats[host_id]:
                self.update(msgspec.convert(stats[host_id]["snapshot"], HostSnapshot))

    def choose(self, name: str, running: Collection[str]) -> str | None:
        """Choose the replica for a request; None when none can take it now, and then the request is given up.

        A placement counts from here on: concurrent requests for cold models must not all see an empty host.
        """
        routed = self._requests.get(name)
        if routed is None:
            return None  # cancelled by its caller
        chosen = self._choose_best(routed, routed.call, running) if routed.call is not None else routed.to
        if chosen not in running:
            routed.give_up()
            return None
        return chosen

    def _choose_best(self, routed: RoutedRequest, call: RoutedCall, running: Collection[str]) -> str | None:
        model_id = call.spec.model_id
        if routed.to is not None:
            self.directory.end(routed.to, model_id)  # chosen before, and refused
            routed.to = None
        try:
            hosts = [host_id for host_id in self.directory.ranked(call.spec, call.avoid) if host_id in running]
        except LoadFailed:
            return None
        if hosts:
            routed.to = call.host_id = hosts[0]
            self.directory.begin(hosts[0], model_id)
        return routed.to


REPLICAS = ReplicaDirectory()
