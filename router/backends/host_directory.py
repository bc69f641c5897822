"""`HostDirectory`: the last snapshot of every remote host, and the calls sent to it since. Chooses hosts for calls.

A snapshot is older than the calls in flight to its host. So a placement counts from the moment it is chosen: while a
call runs on a host whose snapshot does not show the model yet, the model is expected there and its bytes are claimed.
"""

from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import contextmanager

from msgspec import Struct, structs

from engines.spec import ModelSpec
from engines.types import HostSnapshot, ModelStatus, State
from router.backends.placement import NOT_LOADED, eligible_hosts, not_resident, ranked_hosts, replica_host


def ready_models(snapshot: HostSnapshot | None) -> list[ModelStatus]:
    """Return the models that are ready on a host, most recently used first."""
    ready = [status for status in snapshot.models if status.state == "ready"] if snapshot is not None else []
    return sorted(ready, key=lambda status: -(status.last_used_at or 0.0))


def without_models(snapshot: HostSnapshot) -> HostSnapshot:
    """Return the snapshot with every model unloaded, closed to calls."""
    gone = dict.fromkeys(("weight_bytes", "workspace_bytes", "leases", "waiters", "queue_items", "host_bytes"), 0)
    models = tuple(
        status if status.state in NOT_LOADED else structs.replace(status, state="cold", info=None, **gone)
        for status in snapshot.models
    )
    return structs.replace(
        snapshot,
        used_bytes=0,
        host_used_bytes=0,
        parked=(),
        workspace_bytes=0,
        claimed_bytes=0,
        free_bytes=snapshot.budget_bytes,
        residents=(),
        models=models,
        is_draining=True,
    )


class HostDirectory:
    """Holds one router's view of the hosts. Used from one event loop only."""

    def __init__(self) -> None:
        self._hosts: dict[str, HostEntry] = {}
        self._running: Counter[tuple[str, str]] = Counter()

    # ---- snapshots ----

    def update(self, snapshot: HostSnapshot) -> None:
        """Replace the host's snapshot."""
        self._hosts[snapshot.host_id] = HostEntry(snapshot, {status.model_id: status for status in snapshot.models})

    def close(self, host_id: str) -> None:
        """Send the host no new calls, until its next snapshot."""
        entry = self._hosts.get(host_id)
        if entry is not None:
            self.update(structs.replace(entry.snapshot, is_draining=True))

    def forget(self, host_id: str) -> None:
        """Remove a host whose id will not be used again."""
        self._hosts.pop(host_id, None)

    def snapshots(self) -> tuple[HostSnapshot, ...]:
        """Return the snapshots of all hosts."""
        return tuple(entry.snapshot for entry in self._hosts.values())

    def snapshot(self, host_id: str) -> HostSnapshot | None:
        """Return the snapshot of one host; None when it is unknown."""
        entry = self._hosts.get(host_id)
        return entry.snapshot if entry is not None else None

    def running(self, host_id: str) -> list[str]:
        """Return the models for which calls of this router run on the host."""
        return [model_id for (host, model_id), count in self._running.items() if host == host_id and count]

    # ---- calls in flight ----

    @contextmanager
    def in_flight(self, host_id: str, model_id: str) -> Iterator[None]:
        """Count a call to the host for the model while the block runs."""
        self.begin(host_id, model_id)
        try:
            yield
        finally:
            self.end(host_id, model_id)

    def begin(self, host_id: str, model_id: str) -> None:
        """Count a call; `end` must follow."""
        self._running[host_id, model_id] += 1

    def end(self, host_id: str, model_id: str) -> None:
        """Uncount a call that has ended."""
        self._running[host_id, model_id] -= 1
        if not self._running[host_id, model_id]:
            del self._running[host_id, model_id]

    # ---- choosing ----

    def devices(self) -> dict[str, str]:
        """Return the device of every host, by host id."""
        return {host_id: entry.snapshot.device for host_id, entry in self._hosts.items()}

    def open_hosts(self, spec: ModelSpec, avoid: Container[str] = ()) -> list[str]:
        """Return the hosts that take calls for the model now; empty while all of them drain or start.

        Raises:
            LoadFailed: the registry allows it on none of the devices.
        """
        hosts = eligible_hosts(spec, self.devices()) if self._hosts else []
        return [host_id for host_id in hosts if host_id not in avoid and not self._hosts[host_id].snapshot.is_draining]

    def ranked(self, spec: ModelSpec, avoid: Container[str] = ()) -> list[str]:
        """Returns the open hosts for a call, best first; see `ranked_hosts`."""
        return ranked_hosts(spec.model_id, self._views(self.open_hosts(spec, avoid)))

    def pick_replica_host(self, spec: ModelSpec, calls: int) -> str | None:
        """Returns a host for one more copy, when so many calls keep all busy that have the model ready."""
        return replica_host(spec, self._views(self.open_hosts(spec)), calls)

    def not_resident(self, specs: Iterable[ModelSpec]) -> list[ModelSpec]:
        """Returns the models that no host has or is about to have, though some host serves them."""
        return list(not_resident(specs, self._views(self._hosts)))

    def _views(self, hosts: Iterable[str]) -> list["DirectoryView"]:
        return [DirectoryView(self._hosts[host_id], self._running) for host_id in hosts]


class HostEntry(Struct, frozen=True):
    """One host's last snapshot, and its models' statuses by model id."""

    snapshot: HostSnapshot
    statuses: Mapping[str, ModelStatus]


class DirectoryView:
    """A `HostView` of what a host reported last and of the calls that run there from here."""

    __slots__ = ("_entry", "_running")

    def __init__(self, entry: HostEntry, running: Counter[tuple[str, str]]) -> None:
        self._entry = entry
        self._running = running

    @property
    def host_id(self) -> str:
        """See `HostView`."""
        return self._entry.snapshot.host_id

    def state(self, model_id: str) -> State | None:
        """See `HostView`."""
        status = self._entry.statuses.get(model_id)
        return status.state if status is not None else None

    def load(self, model_id: str) -> tuple[int, ...]:
        """See `HostView`. Our own calls are counted now, those of other routers when the host reports them."""
        return self._running[self.host_id, model_id], self._entry.statuses[model_id].leases

    def need_bytes(self, model_id: str) -> int:
        """See `HostView`."""
        status = self._entry.statuses.get(model_id)
        return status.need_bytes + status.need_workspace_bytes if status is not None else 0

    def snapshot(self) -> HostSnapshot:
        """See `HostView`."""
        snapshot, statuses = self._entry.snapshot, self._entry.statuses
        sent = {
            model_id
            for host_id, model_id in self._running
            if host_id == snapshot.host_id and model_id in statuses and statuses[model_id].state in NOT_LOADED
        }
        if not sent:
            return snapshot
        claimed = sum(statuses[model_id].need_bytes for model_id in sent)
        models = tuple(
            structs.replace(status, waiters=max(1, status.waiters)) if status.model_id in sent else status
            for status in snapshot.models
        )
        return structs.replace(snapshot, models=models, claimed_bytes=snapshot.claimed_bytes + claimed)
