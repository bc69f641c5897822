"""The routing policy: which host gets a call, one more copy of a busy model, or a model that must be in memory.

It is pure, and the same for hosts of this process, of worker processes and of a cluster, which backends show it as
`HostView`s. A host that only waits for memory does not have the model yet, but the bytes that it has promised count:
otherwise many cold models at once over-commit one host while another is empty.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Protocol

from engines.errors import EngineError, LoadFailed, ModelTooLarge, OutOfMemory, Unavailable
from engines.host import device_matches
from engines.spec import ModelSpec, is_same_engine
from engines.types import HostSnapshot, ModelStatus, State

NOT_LOADED = ("absent", "cold", "failed")
"""States of a model that a host neither has nor is about to have."""
_RESIDENT = {"ready": 0, "waking": 1, "warming": 2, "loading": 3}
_EXPECTED = ("fetching", "waiting_space")
_PARKED = ("parking", "parked")

_OF_THE_HOST = frozenset({"load", "out_of_memory", "self_check_failed", "load_hangs"})
"""Kinds of `LoadFailed` that may be caused by the host; the others come from the files or the hub, on every host."""

_FITS = 2
_FAILED = 4
_NOT_NOW = 5
Key = tuple[int, float, bool, int]


class HostView(Protocol):
    """One host as the policy sees it. The questions about one model are cheap; the snapshot is for when it is cold."""

    @property
    def host_id(self) -> str:
        """Returns the name of the host."""

    def state(self, model_id: str) -> State | None:
        """Returns the state of the model there; None when the host does not serve it."""

    def load(self, model_id: str) -> tuple[int, ...]:
        """Returns how busy a model is that is ready there; the lowest gets the next call."""

    def need_bytes(self, model_id: str) -> int:
        """Returns what the model takes there; 0 when that is unknown."""

    def snapshot(self) -> HostSnapshot:
        """Returns the whole host, with calls that are on their way to it counted as arrived."""


def ranked_hosts(model_id: str, hosts: Sequence[HostView]) -> list[str]:
    """Returns the ids of hosts for a call, best first. Two cases:

    1. ready somewhere: only those hosts, the least busy first;
    2. ready nowhere: all of them, by `rank_hosts`.
    """
    ready = [host for host in hosts if host.state(model_id) == "ready"]
    if len(ready) > 1:
        ready.sort(key=lambda host: host.load(model_id))
    if ready:
        return [host.host_id for host in ready]  # (1)
    return rank_hosts(model_id, _need_bytes(model_id, hosts), [host.snapshot() for host in hosts])  # (2)


def replica_host(spec: ModelSpec, hosts: Sequence[HostView], num_busy: int) -> str | None:
    """Returns the host for one more copy of a model; None when none is needed or none may have it.

    Args:
        num_busy: calls that run, or hosts that have some; a copy is needed when there are as many as hosts have the
            model ready.
    """
    num_ready = sum(host.state(spec.model_id) == "ready" for host in hosts)
    if not num_ready or num_busy < num_ready:
        return None
    return pick_replica_host(spec, _need_bytes(spec.model_id, hosts), [host.snapshot() for host in hosts])


def not_resident(specs: Iterable[ModelSpec], hosts: Sequence[HostView]) -> Iterator[ModelSpec]:
    """Yields the models that no host has or is about to have, though some host serves them. Looks at each when it is
    its turn, so that loads which were begun for the ones before count."""
    for spec in specs:
        states = [state for host in hosts if (state := host.state(spec.model_id)) is not None]
        if states and all(state in NOT_LOADED or (state == "parked" and not is_only_warm(spec)) for state in states):
            yield spec


def is_wanted(spec: ModelSpec) -> bool:
    """Tells whether the model must be in memory before anyone asks for it."""
    return spec.pinned or spec.preload or spec.warm


def is_only_warm(spec: ModelSpec) -> bool:
    """Tells whether main memory is enough for a model that is wanted."""
    return spec.warm and not (spec.pinned or spec.preload)


def warm_first(specs: Iterable[ModelSpec]) -> list[ModelSpec]:
    """Sorts models in the order of their loads at start: those that later ones may park come first."""
    return sorted(specs, key=lambda spec: not is_only_warm(spec))


def is_newly_wanted(old: ModelSpec | None, new: ModelSpec) -> bool:
    """Tells whether a model must be in memory now that had not to be before, or was another engine."""
    return is_wanted(new) and (old is None or not is_wanted(old) or not is_same_engine(old, new))


def _need_bytes(model_id: str, hosts: Iterable[HostView]) -> int:
    return max((host.need_bytes(model_id) for host in hosts), default=0)


def eligible_hosts(spec: ModelSpec, devices: Mapping[str, str]) -> list[str]:
    """Return the ids of the hosts (`devices`: id → device) on whose device the registry lets the model run.

    Raises:
        LoadFailed: there is none.
    """
    found = [host_id for host_id, device in devices.items() if device_matches(device, spec.device)]
    if not found:
        raise LoadFailed(
            f"model {spec.model_id!r} requires device {spec.device!r}; this server has "
            f"{', '.join(dict.fromkeys(devices.values()))}; change its `device` in the registry, or DEVICE",
            retry_after_s=300.0,
            kind="no_device",
        )
    return found


def may_succeed_elsewhere(error: EngineError) -> bool:
    """Whether another host may load the model after this one failed with `error`."""
    if isinstance(error, LoadFailed):
        return error.kind in _OF_THE_HOST
    return isinstance(error, ModelTooLarge) or (isinstance(error, OutOfMemory) and error.stage == "load")


def earliest_retry(one: EngineError | None, other: EngineError) -> EngineError:
    """Return the error to report of two hosts' errors: the one that allows the earlier retry."""
    return other if one is None or _wait_s(other) < _wait_s(one) else one


def _wait_s(error: EngineError) -> float:
    return error.retry_after_s if isinstance(error, Unavailable) else float("inf")


def rank_hosts(model_id: str, need_bytes: int, snapshots: Iterable[HostSnapshot]) -> list[str]:
    """Rank host ids for a model, best first. `need_bytes`: memory the model needs, 0 when unknown.

    1. it is resident: ready, then waking, then warming, then loading;
    2. it fits into free, unclaimed memory;
    3. other models must be evicted, the longest idle first;
    4. its last load failed there and was not retried since;
    5. it cannot be loaded now: the host is too busy, too small, draining, or other processes hold the memory.
    Within each tier: hosts that expect the model already or have it parked come first, then rendezvous hashing decides.
    """
    keys = {host.host_id: _key(model_id, need_bytes, host) for host in snapshots}
    return sorted(keys, key=lambda host_id: keys[host_id])


def pick_replica_host(spec: ModelSpec, need_bytes: int, snapshots: Sequence[HostSnapshot]) -> str | None:
    """Choose a host for one more replica of a busy model, within `replicas` of the registry; None when there is none.

    A replica takes free memory only: evicting another model for it, which is then loaded again, gains nothing. Hosts
    where the model failed to load are skipped: a preload would end the quarantine, and each busy request starts one.
    """
    having = [host for host in snapshots if _has_or_expects(spec.model_id, host)]
    if len(having) >= spec.replicas:
        return None
    rest = {
        host.host_id: _key(spec.model_id, need_bytes, host)
        for host in snapshots
        if host not in having and not host.is_draining and _state(spec.model_id, host) != "failed"
    }
    best = min(rest, key=lambda host_id: rest[host_id], default=None)
    return best if best is not None and rest[best][0] == _FITS else None


def _has_or_expects(model_id: str, host: HostSnapshot) -> bool:
    status = _status(model_id, host)
    return status is not None and (status.state not in (*NOT_LOADED, *_PARKED) or status.waiters > 0)


def _state(model_id: str, host: HostSnapshot) -> State | None:
    status = _status(model_id, host)
    return status.state if status is not None else None


def _status(model_id: str, host: HostSnapshot) -> ModelStatus | None:
    return next((status for status in host.models if status.model_id == model_id), None)


def _key(model_id: str, need_bytes: int, host: HostSnapshot) -> Key:
    status = _status(model_id, host)
    is_expected = status is not None and (status.state in _EXPECTED or status.waiters > 0)
    tier, order = _tier(need_bytes, host, status, is_expected=is_expected)
    is_near = is_expected or (status is not None and status.state in _PARKED)
    return tier, order, not is_near, -_weight(model_id, host.host_id)


def _tier(need_bytes: int, host: HostSnapshot, status: ModelStatus | None, *, is_expected: bool) -> tuple[int, float]:
    is_stuck = bool(host.stuck) and status is not None and status.state not in ("ready", "warming")
    if host.is_draining or status is None or is_stuck:
        return _NOT_NOW, float(host.is_draining)
    if status.state in _RESIDENT:  # also a split model, which needs more than the host has
        return 1, _RESIDENT[status.state]
    if need_bytes > host.budget_bytes:
        return _NOT_NOW, 0.0
    claimed = host.claimed_bytes if not is_expected else max(0, host.claimed_bytes - need_bytes)
    missing = need_bytes + claimed - _free_bytes(host)
    used_at = _last_victim_used_at(host, missing) if missing > 0 else 0.0
    if used_at is None:
        return _NOT_NOW, -1.0
    if status.state == "failed":
        return _FAILED, used_at
    return (3, used_at) if missing > 0 else (_FITS, 0.0)


def _free_bytes(host: HostSnapshot) -> int:
    """Return the part of the budget that neither this server's models nor other processes use."""
    if host.ceiling_bytes is None:
        return host.free_bytes
    return min(host.free_bytes, host.ceiling_bytes - host.used_bytes - host.workspace_bytes)


def _last_victim_used_at(host: HostSnapshot, missing_bytes: int) -> float | None:
    """Return when the most recently used of the needed victims was used; None when evicting all is not enough.

    Older claims take the first victims, because their bytes are part of `missing_bytes`.
    """
    statuses = {status.model_id: status for status in host.models}
    for model_id in host.residents:
        victim = statuses.get(model_id)
        if victim is None or victim.pinned or victim.leases or victim.state != "ready":
            continue
        missing_bytes -= victim.weight_bytes
        if missing_bytes <= 0:
            return victim.last_used_at or 0.0
    return None


def _weight(model_id: str, host_id: str) -> int:
    """Compute the rendezvous hash: when hosts come or go, only their own models move."""
    return int.from_bytes(hashlib.blake2b(f"{model_id}\0{host_id}".encode(), digest_size=8).digest())
