"""Predicts from host snapshots whether pinned and preloaded models fit, and which others alternate in memory. Pure.

Only models of known size are counted: the hub is not queried.
"""

from collections.abc import Iterable, Sequence

from msgspec import Struct

from engines.types import HostSnapshot, ModelStatus
from router.registry.registry import Registry

_SHOWN = 3


class CapacityReport(Struct, frozen=True, kw_only=True):
    """Bytes of weights plus the largest workspace, summed over devices; model ids in the registry's order."""

    wanted_bytes: int
    total_bytes: int
    budget_bytes: int
    num_known: int
    misfits: tuple[str, ...]
    """Pinned or preloaded models that do not fit together."""
    alternating: tuple[str, ...]
    """Other models that do not fit beside the rest: they and other evictable models alternate in memory."""

    def __str__(self) -> str:
        budget = f"{_gib(self.budget_bytes)} GiB"
        if self.misfits:
            return (
                f"pinned and preloaded models do not fit: {_gib(self.wanted_bytes)} of {budget}; no room for "
                f"{_names(self.misfits)}. Raise MEMORY_BUDGET, or pin and preload fewer"
            )
        wanted = f"pinned and preloaded models take {_gib(self.wanted_bytes)} of {budget}"
        if self.alternating:
            need = f"all {self.num_known} of known size need {_gib(self.total_bytes)}"
            verb = "take turns" if len(self.alternating) > 1 else "takes turns with others"
            return f"{wanted}; {need}, so {_names(self.alternating)} {verb}"
        return f"{wanted}; all {self.num_known} of known size fit at once ({_gib(self.total_bytes)})"


def plan_capacity(registry: Registry, hosts: Sequence[HostSnapshot]) -> CapacityReport:
    """Place the wanted models first, then the others, each time the largest on the device with most space."""
    capacities = {host.host_id: _DeviceCapacity(host) for host in hosts}
    statuses = {
        spec.model_id: status for spec in registry.models.values() if (status := _largest(hosts, spec.model_id))
    }
    wanted = [model_id for model_id in statuses if _is_wanted(registry, model_id)]
    others = [model_id for model_id in statuses if model_id not in wanted]
    misfits = _place(wanted, statuses, hosts, capacities)
    alternating = _place(others, statuses, hosts, capacities)
    return CapacityReport(
        wanted_bytes=_total_bytes([statuses[model_id] for model_id in wanted]),
        total_bytes=_total_bytes(statuses.values()),
        budget_bytes=sum(host.budget_bytes for host in hosts),
        num_known=len(statuses),
        misfits=misfits,
        alternating=alternating,
    )


class _DeviceCapacity:
    """Simulates the free memory of one device."""

    def __init__(self, host: HostSnapshot) -> None:
        self.left_bytes = host.budget_bytes
        self.workspace_bytes = 0

    def left_after(self, status: ModelStatus) -> int:
        """Return the bytes left with the model added; only the largest workspace counts."""
        grows = max(0, status.need_workspace_bytes - self.workspace_bytes)
        return self.left_bytes - status.need_bytes - grows

    def add(self, status: ModelStatus) -> None:
        self.left_bytes = self.left_after(status)
        self.workspace_bytes = max(self.workspace_bytes, status.need_workspace_bytes)


def _place(
    model_ids: Sequence[str],
    statuses: dict[str, ModelStatus],
    hosts: Sequence[HostSnapshot],
    capacities: dict[str, _DeviceCapacity],
) -> tuple[str, ...]:
    """Place models; returns those that do not fit, in the order given."""
    unplaced = set()
    for model_id in sorted(model_ids, key=lambda model_id: -statuses[model_id].need_bytes):
        fitting = [capacities[host.host_id] for host in hosts if any(s.model_id == model_id for s in host.models)]
        best = max(fitting, key=lambda capacity: capacity.left_after(statuses[model_id]))
        if best.left_after(statuses[model_id]) < 0:
            unplaced.add(model_id)
        else:
            best.add(statuses[model_id])
    return tuple(model_id for model_id in model_ids if model_id in unplaced)


def _largest(hosts: Sequence[HostSnapshot], model_id: str) -> ModelStatus | None:
    """Return the model's status with the largest known need: hosts may have an estimate and a measurement."""
    found = [status for host in hosts for status in host.models if status.model_id == model_id and status.need_bytes]
    return max(found, key=lambda status: status.need_bytes, default=None)


def _is_wanted(registry: Registry, model_id: str) -> bool:
    spec = registry.models[model_id]
    return spec.pinned or spec.preload


def _total_bytes(statuses: Iterable[ModelStatus]) -> int:
    found = list(statuses)
    return sum(s.need_bytes for s in found) + max((s.need_workspace_bytes for s in found), default=0)


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / 2**30:.1f}"


def _names(model_ids: Sequence[str]) -> str:
    shown = list(model_ids[:_SHOWN])
    if len(model_ids) > _SHOWN:
        shown.append(f"{len(model_ids) - _SHOWN} more")
    return ", ".join(shown[:-1]) + (" and " if len(shown) > 1 else "") + shown[-1]
