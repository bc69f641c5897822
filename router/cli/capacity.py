"""Predicts whether models fit in memory at once, for the banner of `serve` and for `plan`. Pure.

Places them as the pool charges them: weights add up on a device, and of workspaces the largest counts. Only models of
known size are counted.
"""

from collections.abc import Iterable, Mapping, Sequence

from msgspec import Struct

from engines.types import HostSnapshot
from router.registry.registry import Registry

_SHOWN = 3


class KnownNeed(Struct, frozen=True, kw_only=True):
    """The memory that a model needs, in bytes, and the names of the devices that it may run on."""

    weight_bytes: int
    workspace_bytes: int
    devices: tuple[str, ...]


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
        whose = "the one model whose size is" if self.num_known == 1 else f"the {self.num_known} models whose sizes are"
        need = f"{_gib(self.total_bytes)} of {budget} for {whose} known"
        if self.alternating:
            verb = "take turns" if len(self.alternating) > 1 else "takes turns with others"
            wanted = f"; pinned and preloaded ones take {_gib(self.wanted_bytes)}" if self.wanted_bytes else ""
            return f"{need}, so {_names(self.alternating)} {verb}{wanted}"
        return f"{need}{'' if self.num_known == 1 else ', all at once'}"


def plan_capacity(registry: Registry, hosts: Sequence[HostSnapshot]) -> CapacityReport:
    """Place the wanted models first, then the others."""
    capacities = Capacities({host.host_id: host.budget_bytes for host in hosts})
    needs = {model_id: need for model_id in registry.models if (need := _largest_need(hosts, model_id))}
    wanted = {model_id: need for model_id, need in needs.items() if _is_wanted(registry, model_id)}
    others = {model_id: need for model_id, need in needs.items() if model_id not in wanted}
    return CapacityReport(
        wanted_bytes=total_bytes(wanted.values()),
        total_bytes=total_bytes(needs.values()),
        budget_bytes=sum(host.budget_bytes for host in hosts),
        num_known=len(needs),
        misfits=capacities.place(wanted),
        alternating=capacities.place(others),
    )


class Capacities:
    """Simulates the free memory of devices. `budgets`: bytes for models, by the name of the device."""

    def __init__(self, budgets: Mapping[str, int]) -> None:
        self._devices = {name: _DeviceCapacity(budget_bytes) for name, budget_bytes in budgets.items()}

    def place(self, needs: Mapping[str, KnownNeed]) -> tuple[str, ...]:
        """Place models, each time the largest on the device with most space; returns those that do not fit, in order.

        A model that may run on none of the devices does not fit.
        """
        unplaced = set()
        for model_id in sorted(needs, key=lambda model_id: -needs[model_id].weight_bytes):
            need = needs[model_id]
            fitting = [self._devices[name] for name in need.devices if name in self._devices]
            best = max(fitting, key=lambda device: device.left_after(need), default=None)
            if best is None or best.left_after(need) < 0:
                unplaced.add(model_id)
            else:
                best.add(need)
        return tuple(model_id for model_id in needs if model_id in unplaced)


class _DeviceCapacity:
    """Simulates the free memory of one device."""

    def __init__(self, budget_bytes: int) -> None:
        self.left_bytes = budget_bytes
        self.workspace_bytes = 0

    def left_after(self, need: KnownNeed) -> int:
        """Return the bytes left with the model added; only the largest workspace counts."""
        grows = max(0, need.workspace_bytes - self.workspace_bytes)
        return self.left_bytes - need.weight_bytes - grows

    def add(self, need: KnownNeed) -> None:
        self.left_bytes = self.left_after(need)
        self.workspace_bytes = max(self.workspace_bytes, need.workspace_bytes)


def _largest_need(hosts: Sequence[HostSnapshot], model_id: str) -> KnownNeed | None:
    """Return the model's largest known need: hosts may have an estimate and a measurement."""
    held = [(host.host_id, status) for host in hosts for status in host.models if status.model_id == model_id]
    largest = max((status for _, status in held if status.need_bytes), key=lambda each: each.need_bytes, default=None)
    if largest is None:
        return None
    devices = tuple(host_id for host_id, _ in held)
    return KnownNeed(weight_bytes=largest.need_bytes, workspace_bytes=largest.need_workspace_bytes, devices=devices)


def _is_wanted(registry: Registry, model_id: str) -> bool:
    spec = registry.models[model_id]
    return spec.pinned or spec.preload


def total_bytes(needs: Iterable[KnownNeed]) -> int:
    """Return the bytes that all of them need at once on one device."""
    found = list(needs)
    return sum(need.weight_bytes for need in found) + max((need.workspace_bytes for need in found), default=0)


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / 2**30:.1f}"


def _names(model_ids: Sequence[str]) -> str:
    shown = list(model_ids[:_SHOWN])
    if len(model_ids) > _SHOWN:
        shown.append(f"{len(model_ids) - _SHOWN} more")
    return ", ".join(shown[:-1]) + (" and " if len(shown) > 1 else "") + shown[-1]
