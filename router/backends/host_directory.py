"""Who gets which model where hosts live elsewhere: what they told last, and what was sent to them since.

A snapshot is older than the calls that are on their way to its host. So a placement counts from the moment it is
chosen: as long as a call runs on a host that does not show its model yet, the model is expected there and its bytes are
claimed.
"""

from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from msgspec import Struct, structs

from engines.spec import ModelSpec
from engines.types import HostSnapshot, ModelStatus
from router.backends.placement import AWAY, eligible_hosts, pick_replica_host, rank_hosts


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
        """Open hosts, best first. Two cases: 1. ready somewhere: the least busy of those; 2. `rank` decides."""
        hosts = self.open_hosts(spec, avoid)
        ready = [host_id for host_id in hosts if self._state(host_id, spec.model_id) == "ready"]
        if ready:
            return ready if len(ready) == 1 else sorted(ready, key=lambda host: self._load(host, spec.model_id))  # (1)
        return rank_hosts(spec.model_id, self._need_bytes(spec.model_id, hosts), self._expected(hosts))  # (2)

    def pick_replica_host(self, spec: ModelSpec, calls: int) -> str | None:
        """A host for one more copy, when so many calls keep all busy that have the model ready."""
        hosts = self.open_hosts(spec)
        ready = [host_id for host_id in hosts if self._state(host_id, spec.model_id) == "ready"]
        if not ready or calls < len(ready):
            return None
        return pick_replica_host(spec, self._need_bytes(spec.model_id, hosts), self._expected(hosts))

    def not_resident(self, specs: Iterable[ModelSpec]) -> list[ModelSpec]:
        """Those that no host has or expects, though some host serves them."""
        return [
            spec
            for spec in specs
            if (states := [page.statuses[spec.model_id].state for page in self._serving(spec.model_id)])
            and all(state in AWAY for state in states)
        ]

    def _serving(self, model_id: str) -> Iterator["HostEntry"]:
        return (page for page in self._hosts.values() if model_id in page.statuses)

    def _state(self, host_id: str, model_id: str) -> str:
        status = self._hosts[host_id].statuses.get(model_id)
        return status.state if status is not None else "absent"

    def _load(self, host_id: str, model_id: str) -> tuple[int, int]:
        """Our own calls are counted now, those of other routers when the host tells."""
        return self._running[host_id, model_id], self._hosts[host_id].statuses[model_id].leases

    def _need_bytes(self, model_id: str, hosts: Sequence[str]) -> int:
        found = [status for host_id in hosts if (status := self._hosts[host_id].statuses.get(model_id))]
        return max((status.need_bytes + status.need_workspace_bytes for status in found), default=0)

    def _expected(self, hosts: Sequence[str]) -> list[HostSnapshot]:
        """The hosts' snapshots as they will be when what was sent has arrived."""
        return [self._with_sent(self._hosts[host_id]) for host_id in hosts]

    def _with_sent(self, page: "HostEntry") -> HostSnapshot:
        snapshot = page.snapshot
        sent = {
            model_id
            for host_id, model_id in self._running
            if host_id == snapshot.host_id and model_id in page.statuses and page.statuses[model_id].state in AWAY
        }
        if not sent:
            return snapshot
        claimed = sum(page.statuses[model_id].need_bytes for model_id in sent)
        models = tuple(
            structs.replace(status, waiters=max(1, status.waiters)) if status.model_id in sent else status
            for status in snapshot.models
        )
        return structs.replace(snapshot, models=models, claimed_bytes=snapshot.claimed_bytes + claimed)


class HostEntry(Struct, frozen=True):
    """One host: its last snapshot, and the same by model."""

    snapshot: HostSnapshot
    statuses: Mapping[str, ModelStatus]
