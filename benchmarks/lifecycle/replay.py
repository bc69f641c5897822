"""Compares orders of eviction with each other and with the best possible one, on the traces of `benchmarks/traces`.

    python -m benchmarks.lifecycle.replay policies
    python -m benchmarks.lifecycle.replay decay

    python -m benchmarks.lifecycle.replay tiers [--traces pairs,scan]

`policies`: seconds spent loading by `lru` and by `cost`, for three budgets, as a multiple of the least that any order
could do which knows the future. That bound is computed over all sets of models that fit: a model may leave at any
moment, even while it is used, so that it is lower than what the pool's rules allow. `tiers`: the same with main memory
for a part of the models, from which they come back by copies; the bound is over all ways to divide the models among
device, main memory and disk. `decay`: as `policies`, by how long a request speaks for the next one
(`engines.pool.slot.HEAT_DECAY_S`).
"""

import argparse
from collections.abc import Sequence
from functools import partial

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from benchmarks.lib.machine import Watch
from benchmarks.lib.report import Report, add_save_option, publish, run_command
from benchmarks.lib.traces import TRACES, make
from engines.replay import PoolPolicy, ReplayOptions, ReplayResult, TierRates, replay
from engines.spec import Eviction
from engines.trace import Trace
from engines.types import format_bytes

SHARES = (0.4, 0.6, 0.8)
"""Budgets, as shares of what all models of a trace need together; at least what the largest needs."""

HOST_SHARE = 0.4
"""The host budget of `tiers`, as a share of what all models of a trace need together."""

DECAYS_S = (60.0, 300.0, 900.0, 3600.0, 14_400.0)
POLICIES: tuple[Eviction, ...] = ("lru", "cost")


class Case(Struct, frozen=True):
    """A trace and a budget."""

    name: str
    trace: Trace
    budget_bytes: int

    @property
    def host_budget_bytes(self) -> int:
        """The main memory of `tiers`; at least what two of the largest models need, so that they can change places."""
        weights = sorted(model.weight_bytes for model in self.trace.models.values())
        return max(int(HOST_SHARE * self.trace.resident_bytes), sum(weights[-2:]))


def cases(names: Sequence[str] = tuple(TRACES)) -> list[Case]:
    """Make the cases of these traces."""
    found = []
    for name in names:
        trace = make(name)
        largest = max(model.weight_bytes + model.workspace_bytes for model in trace.models.values())
        budgets = sorted({max(largest, int(share * trace.resident_bytes)) for share in SHARES})
        found += [Case(name, trace, budget) for budget in budgets]
    return found


def least_loading_s(trace: Trace, budget_bytes: int) -> float:
    """Return the least seconds that loads can take together for a sequence of requests that is known in advance.

    Dynamic programming over the sets of models in memory: at a request for a model that is not there, any set that
    contains it, fits, and has nothing else that was not there may follow. Belady's rule is the case of equal sizes and
    costs (L. A. Belady, 1966); with different ones no rule of its kind is optimal, so that all sets are tried.
    """
    models = list(trace.models.values())
    places = {model.model_id: place for place, model in enumerate(models)}
    sets = np.arange(2 ** len(models))
    weights = sum(((sets >> place & 1) * model.weight_bytes for place, model in enumerate(models)), np.zeros_like(sets))
    workspaces = np.max([(sets >> place & 1) * model.workspace_bytes for place, model in enumerate(models)], axis=0)
    fits = weights + workspaces <= budget_bytes
    cost: NDArray[np.float64] = np.full(len(sets), np.inf)
    cost[0] = 0.0
    last = -1
    for request in trace.requests:
        place = places[request.model_id]
        if place != last:
            cost = _after(cost, place, models[place].load_s, fits, sets)
        last = place
    return float(cost.min())


def _after(
    cost: NDArray[np.float64], place: int, load_s: float, fits: NDArray[np.bool_], sets: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Return the least cost of each set of models after a request for the model at a place."""
    has = (sets >> place & 1).astype(bool)
    reachable = np.where(has, np.inf, cost)
    for other in range(len(sets).bit_length() - 1):  # of each set, the least cost of all sets that contain it
        pairs = reachable.reshape(-1, 2, 1 << other)
        np.minimum(pairs[:, 0], pairs[:, 1], out=pairs[:, 0])
    loaded = np.full_like(cost, np.inf)
    loaded[has] = reachable[sets[has] & ~(1 << place)] + load_s
    loaded[~fits] = np.inf
    return np.minimum(loaded, np.where(has, cost, np.inf))


_DISK, _HOST, _DEVICE = range(3)


def least_moving_s(trace: Trace, budget_bytes: int, host_budget_bytes: int, rates: TierRates) -> float:
    """Return the least seconds that loads and wakes can take together, where models may be in main memory too.

    Dynamic programming as in `least_loading_s`, over all ways to divide n models among three tiers: an array with n
    axes of length 3. At a request for a model that is not on the device, it comes there, and any others go down.
    """
    models = list(trace.models.values())
    places = {model.model_id: place for place, model in enumerate(models)}
    fits = _dividable(trace, budget_bytes, host_budget_bytes)
    cost: NDArray[np.float64] = np.full((3,) * len(models), np.inf)
    cost[(_DISK,) * len(models)] = 0.0
    last = -1
    for request in trace.requests:
        place = places[request.model_id]
        if place != last:
            cost = _after_moves(cost, place, (rates.load_s(models[place]), rates.wake_s(models[place])), fits)
        last = place
    return float(cost.min())


def _dividable(trace: Trace, budget_bytes: int, host_budget_bytes: int) -> NDArray[np.bool_]:
    """Return whether each way to divide the models fits into both budgets."""
    models = list(trace.models.values())
    tiers = np.indices((3,) * len(models), dtype=np.int8)
    shape = tiers.shape[1:]
    weights, workspaces, parked = (np.zeros(shape, dtype=np.int64) for _ in range(3))
    for tier, model in zip(tiers, models, strict=True):
        weights += (tier == _DEVICE) * model.weight_bytes
        parked += (tier == _HOST) * model.weight_bytes
        np.maximum(workspaces, (tier == _DEVICE) * model.workspace_bytes, out=workspaces)
    return (weights + workspaces <= budget_bytes) & (parked <= host_budget_bytes)


def _after_moves(
    cost: NDArray[np.float64], place: int, seconds: tuple[float, float], fits: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """Return the least cost of each division after a request for the model at a place; `seconds`: to load, to wake."""
    by_tier = np.moveaxis(cost, place, 0)
    moved = np.minimum(by_tier[_DISK] + seconds[0], by_tier[_HOST] + seconds[1])
    for axis in range(moved.ndim):  # of each division, the least cost of all from which others only went down
        tiers = np.moveaxis(moved, axis, 0)
        np.minimum(tiers[_HOST], tiers[_DEVICE], out=tiers[_HOST])
        np.minimum(tiers[_DISK], tiers[_HOST], out=tiers[_DISK])
    after = np.full_like(by_tier, np.inf)
    moved[~np.moveaxis(fits, place, 0)[_DEVICE]] = np.inf
    after[_DEVICE] = np.minimum(moved, by_tier[_DEVICE])
    return np.moveaxis(after, 0, place)


def run_tiers(names: Sequence[str]) -> Report:
    """Compare the orders of eviction with a part of main memory for parked models."""
    watch, rates = Watch(), TierRates()
    rows, samples = [], []
    for case in cases(names):
        least = least_moving_s(case.trace, case.budget_bytes, case.host_budget_bytes, rates)
        cells = [case.name, format_bytes(case.budget_bytes), format_bytes(case.host_budget_bytes), f"{least:,.0f} s"]
        for policy in POLICIES:
            result = _replay_tiers(case, policy, rates)
            moving_s = result.loading_s + result.waking_s
            cells += [f"{moving_s / least:.2f}", f"{result.waited_s:,.0f} s", f"{result.reloads} + {result.wakes}"]
            samples.append({
                "trace": case.name, "budget_bytes": case.budget_bytes, "host_bytes": case.host_budget_bytes,
                "policy": policy, "least_s": least, "moving_s": moving_s, "waited_s": result.waited_s,
                "p95_s": result.cold_wait_s(0.95), "reloads": result.reloads, "wakes": result.wakes,
            })  # fmt: skip
        rows.append(tuple(cells))
    columns = [
        f"{policy}: {what}" for policy in POLICIES for what in ("moving, × the least", "waited", "reloads + wakes")
    ]
    return Report(
        name="replay-tiers",
        title="Orders of eviction with main memory for parked models, in virtual time",
        machine=watch.machine,
        settings={"shares": SHARES, "host_share": HOST_SHARE, "copy_bytes_per_s": rates.copy_bytes_per_s},
        header=("trace", "budget", "host budget", "least moving", *columns),
        rows=rows,
        samples={"replays": samples},
        notes=(
            "virtual time: the figures are the same on every machine",
            "copies at 10 GB/s and 50 ms for the check of a woken model are assumed: no GPU has measured them",
            "the bound counts no copies to main memory, and lets models change places without room for both there",
        ),
    )


def _replay_tiers(case: Case, policy: Eviction, rates: TierRates) -> ReplayResult:
    return replay(
        case.trace,
        budget_bytes=case.budget_bytes,
        rules=PoolPolicy(eviction=policy),
        options=ReplayOptions(host_budget_bytes=case.host_budget_bytes, rates=rates),
    )


def run_policies() -> Report:
    """Compare the orders of eviction."""
    watch = Watch()
    rows, samples = [], []
    for case in cases():
        least = least_loading_s(case.trace, case.budget_bytes)
        cells = [case.name, format_bytes(case.budget_bytes), f"{least:,.0f} s"]
        for policy in POLICIES:
            result = replay(case.trace, budget_bytes=case.budget_bytes, rules=PoolPolicy(eviction=policy))
            cells += [
                f"{result.loading_s / least:.2f}",
                f"{result.waited_s:,.0f} s",
                f"{result.cold_wait_s(0.95):.1f} s",
            ]
            samples.append({
                "trace": case.name, "budget_bytes": case.budget_bytes, "policy": policy, "least_s": least,
                "loading_s": result.loading_s, "waited_s": result.waited_s, "reloads": result.reloads,
            })  # fmt: skip
        rows.append(tuple(cells))
    columns = [f"{policy}: {what}" for policy in POLICIES for what in ("loading, × the least", "waited", "p95 cold")]
    return Report(
        name="replay",
        title="Orders of eviction on four days of requests, in virtual time",
        machine=watch.machine,
        settings={"shares": SHARES},
        header=("trace", "budget", "least loading", *columns),
        rows=rows,
        samples={"replays": samples},
        notes=("virtual time: the figures are the same on every machine",),
    )


def run_decay() -> Report:
    """Compare how long a request speaks for the next one."""
    watch = Watch()
    rows = []
    for case in cases():
        cells = [case.name, format_bytes(case.budget_bytes)]
        for decay_s in DECAYS_S:
            rules = PoolPolicy(eviction="cost", heat_decay_s=decay_s)
            result = replay(case.trace, budget_bytes=case.budget_bytes, rules=rules)
            cells.append(f"{result.loading_s:,.0f} s")
        rows.append(tuple(cells))
    return Report(
        name="replay-decay",
        title="Seconds spent loading with `eviction: cost`, by the decay of requests",
        machine=watch.machine,
        settings={"shares": SHARES},
        header=("trace", "budget", *(f"{decay_s:g} s" for decay_s in DECAYS_S)),
        rows=rows,
        samples={},
        notes=("virtual time: the figures are the same on every machine",),
    )


def _main(argv: Sequence[str], kind: str) -> None:
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.lifecycle.replay {kind}", description=__doc__)
    add_save_option(parser)
    if kind == "tiers":
        parser.add_argument("--traces", default=",".join(TRACES))
    asked = parser.parse_args(argv)
    if kind == "tiers":
        publish(run_tiers(asked.traces.split(",")), asked.results)
    else:
        publish(run_policies() if kind == "policies" else run_decay(), asked.results)


def main() -> None:
    """Run the requested command."""
    run_command({kind: partial(_main, kind=kind) for kind in ("policies", "decay", "tiers")})


if __name__ == "__main__":
    main()
