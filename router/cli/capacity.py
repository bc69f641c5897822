"""Will the models that must be in memory fit, and which others will take turns? Pure arithmetic on snapshots.

Only models whose size is known by then are counted: nothing is asked of a hub for this.
"""

from collections.abc import Iterable, Sequence

from msgspec import Struct

from engines.types import HostSnapshot, ModelStatus
from router.registry.registry import Registry

_SHOWN = 3


class CapacityReport(Struct, frozen=True, kw_only=True):
    """Bytes of weights and the largest workspace, summed over devices; model ids in the registry's order."""

    wanted_bytes: int
    total_bytes: int
    budget_bytes: int
    num_known: int
    misfits: tuple[str, ...]
    """Pinned or preloaded, and no room for them beside each other."""
    turns: tuple[str, ...]
    """The others, for whom the rest has no room at once: they and whoever else may leave take turns."""

    def __str__(self) -> str:
        budget = f"{_gib(self.budget_bytes)} GiB"
        if self.misfits:
            return (
                f"pinned and preloaded models do not fit: {_gib(self.wanted_bytes)} of {budget}; no room for "
                f"{_names(self.misfits)}. Raise MEMORY_BUDGET, or pin and preload fewer"
            )
        wanted = f"pinned and preloaded models take {_gib(self.wanted_bytes)} of {budget}"
        if self.turns:
            need = f"all {self.num_known} of known size need {_gib(self.total_bytes)}"
            take = "take turns" if len(self.turns) > 1 else "takes turns with others"
            return f"{wanted}; {need}, so {_names(self.turns)} {take}"
        return f"{wanted}; all {self.num_known} of known size fit at once ({_gib(self.total_bytes)})"


def plan_capacity(registry: Registry, hosts: Sequence[HostSnapshot]) -> CapacityReport:
    """Place the wanted models first, then the others, each time the largest where most room is."""
    rooms = {host.host_id: _Room(host) for host in hosts}
    known = {spec.model_id: status for spec in registry.models.values() if (status := _largest(hosts, spec.model_id))}
    wanted = [model_id for model_id in known if _is_wanted(registry, model_id)]
    others = [model_id for model_id in known if model_id not in wanted]
    misfits = _place(wanted, known, hosts, rooms)
    turns = _place(others, known, hosts, rooms)
    return CapacityReport(
        wanted_bytes=_together([known[model_id] for model_id in wanted]),
        total_bytes=_together(known.values()),
        budget_bytes=sum(host.budget_bytes for host in hosts),
        num_known=len(known),
        misfits=misfits,
        turns=turns,
    )


class _Room:
    """One device as it fills up on paper."""

    def __init__(self, host: HostSnapshot) -> None:
        self.left_bytes = host.budget_bytes
        self.workspace_bytes = 0

    def after(self, status: ModelStatus) -> int:
        """Bytes left if the model came too; workspaces do not add up."""
        grows = max(0, status.need_workspace_bytes - self.workspace_bytes)
        return self.left_bytes - status.need_bytes - grows

    def take(self, status: ModelStatus) -> None:
        self.left_bytes = self.after(status)
        self.workspace_bytes = max(self.workspace_bytes, status.need_workspace_bytes)


def _place(
    model_ids: Sequence[str], known: dict[str, ModelStatus], hosts: Sequence[HostSnapshot], rooms: dict[str, _Room]
) -> tuple[str, ...]:
    """Those that found no room, in the order given."""
    left_out = set()
    for model_id in sorted(model_ids, key=lambda model_id: -known[model_id].need_bytes):
        fitting = [rooms[host.host_id] for host in hosts if any(s.model_id == model_id for s in host.models)]
        best = max(fitting, key=lambda room: room.after(known[model_id]))
        if best.after(known[model_id]) < 0:
            left_out.add(model_id)
        else:
            best.take(known[model_id])
    return tuple(model_id for model_id in model_ids if model_id in left_out)


def _largest(hosts: Sequence[HostSnapshot], model_id: str) -> ModelStatus | None:
    """The model's status where its needs are known, and largest: a guess may stand beside a measurement."""
    found = [status for host in hosts for status in host.models if status.model_id == model_id and status.need_bytes]
    return max(found, key=lambda status: status.need_bytes, default=None)


def _is_wanted(registry: Registry, model_id: str) -> bool:
    spec = registry.models[model_id]
    return spec.pinned or spec.preload


def _together(statuses: Iterable[ModelStatus]) -> int:
    found = list(statuses)
    return sum(s.need_bytes for s in found) + max((s.need_workspace_bytes for s in found), default=0)


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / 2**30:.1f}"


def _names(model_ids: Sequence[str]) -> str:
    shown = list(model_ids[:_SHOWN])
    if len(model_ids) > _SHOWN:
        shown.append(f"{len(model_ids) - _SHOWN} more")
    return ", ".join(shown[:-1]) + (" and " if len(shown) > 1 else "") + shown[-1]
