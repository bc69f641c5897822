"""Who gets which model where hosts live elsewhere: what they told last, and what was sent to them since.

A snapshot is older than the calls that are on their way to its host. So a placement counts from the moment it is
chosen: as long as a call runs on a host that does not show its model yet, the model is expected there and its bytes are
claimed.
"""

from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import contextmanager

from msgspec import Struct, structs

from engines.spec import ModelSpec
from engines.types import HostSnapshot, ModelStatus, State
from router.backends.placement import AWAY, eligible_hosts, not_resident, ranked_hosts, replica_host


def hot(snapshot: HostSnapshot | None) -> list[ModelStatus]:
    """What was ready on a host, the most recently used first."""
    ready = [status for status in snapshot.models if status.state == "ready"] if snapshot is not None else []
    return sorted(ready, key=lambda status: -(status.last_used_at or 0.0))


def emptied(snapshot: HostSnapshot) -> HostSnapshot:
    """The host with nothing in memory, closed to calls."""
    gone = dict.fromkeys(("weight_bytes", "workspace_bytes", "leases", "waiters", "queue_items"), 0)
    models = tuple(
        status if status.state in AWAY else structs.replace(status, state="cold", info=None, **gone)
        for status in snapshot.models
    )
    return structs.replace(
        snapshot,
        used_bytes=0,
        workspace_bytes=0,
        claimed_bytes=0,
        free_bytes=snapshot.budget_bytes,
        residents=(),
        models=models,
        is_draining=True,
    )


class HostDirectory:
    """One router's view of the hosts. Lives on one event loop."""

    def __init__(self) -> None:
        self._hosts: dict[str, HostEntry] = {}
        self._running: Counter[tuple[str, str]] = Counter()

    # ---- what hosts tell ----

    def update(self, snapshot: HostSnapshot) -> None:
        """What a host is like now."""
        self._hosts[snapshot.host_id] = HostEntry(snapshot, {status.model_id: status for status in snapshot.models})

    def close(self, host_id: str) -> None:
        """The host takes nothing new, whatever its last snapshot said."""
        page = self._hosts.get(host_id)
        if page is not None:
            self.update(structs.replace(page.snapshot, is_draining=True))

    def forget(self, host_id: str) -> None:
        """The host will not come back under this name."""
        self._hosts.pop(host_id, None)

    def snapshots(self) -> tuple[HostSnapshot, ...]:
        """Of all hosts."""
        return tuple(page.snapshot for page in self._hosts.values())

    def snapshot(self, host_id: str) -> HostSnapshot | None:
        """Of one host."""
        page = self._hosts.get(host_id)
        return page.snapshot if page is not None else None

    def running(self, host_id: str) -> list[str]:
        """The models that calls from here run on there."""
        return [model_id for (host, model_id), count in self._running.items() if host == host_id and count]

    # ---- what is sent to them ----

    @contextmanager
    def in_flight(self, host_id: str, model_id: str) -> Iterator[None]:
        """A call to the host about the model runs inside the block."""
        self.begin(host_id, model_id)
        try:
            yield
        finally:
            self.end(host_id, model_id)

    def begin(self, host_id: str, model_id: str) -> None:
        """A call begins; `end` must follow."""
        self._running[host_id, model_id] += 1

    def end(self, host_id: str, model_id: str) -> None:
        """A call that had begun has ended."""
        self._running[host_id, model_id] -= 1
        if not self._running[host_id, model_id]:
            del self._running[host_id, model_id]

    # ---- choosing ----

    def devices(self) -> dict[str, str]:
        """Host id → device, of all hosts."""
        return {host_id: page.snapshot.device for host_id, page in self._hosts.items()}

    def open_hosts(self, spec: ModelSpec, avoid: Container[str] = ()) -> list[str]:
        """Hosts that take the model's calls now; empty while all of them drain or start.

        Raises:
            LoadFailed: the registry lets it run on none.
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
    """One host: its last snapshot, and the same by model."""

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
            if host_id == snapshot.host_id and model_id in statuses and statuses[model_id].state in AWAY
        }
        if not sent:
            return snapshot
        claimed = sum(statuses[model_id].need_bytes for model_id in sent)
        models = tuple(
            structs.replace(status, waiters=max(1, status.waiters)) if status.model_id in sent else status
            for status in snapshot.models
        )
        return structs.replace(snapshot, models=models, claimed_bytes=snapshot.claimed_bytes + claimed)
