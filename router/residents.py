"""What was in memory on a host that ends, and what is left of it: pure functions of its last snapshot."""

from msgspec import structs

from engines.records import HostSnapshot, ModelStatus
from router.placement import AWAY


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
