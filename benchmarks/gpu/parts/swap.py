"""Measures the seconds from a request for a parked model to its answer, against the rate of pinned copies.

The answer of a parked model takes the copies of its weights, recording its passes again, the comparison of a few
vectors, and the pass itself; each is recorded alone, too. The rate is that of one copy of pinned memory to the device,
in the same process.
"""

import contextlib
import resource
import time
from statistics import median
from typing import Any

import torch

from benchmarks.gpu.folders import SWAP_MODELS, folder_of
from benchmarks.gpu.parts.loading import record_in_time
from benchmarks.gpu.rig import Rig, forget_graphs, has_graphs, timed
from benchmarks.gpu.runner import PartContext
from benchmarks.lib.engine_kit import cosines
from engines.batching.engine import EmbeddingEngine
from engines.errors import SelfCheckFailed

TEXT = "The cat sits outside."
MAX_ROUNDS = 3
PARKED_BYTES = 18 * 10**9
"""Of all rounds of a model: to pin 16 GB takes seconds."""

LEAST_COSINE = 0.9999
RATE_BYTES = {"full": 2**30, "small": 2**24}
_NUM_COPIES = 4


def run(context: PartContext) -> None:
    """Record the rate, then each model, the small ones first."""
    raise_lock_limit()
    size = context.settings["size"]
    with contextlib.closing(Rig(context.device)) as rig:
        rate = copy_rate(rig, RATE_BYTES[size])
        context.record(what="rate", bytes_per_s=rate)
        record_in_time(context, SWAP_MODELS[size], lambda name: _one(rig, context, name, rate))


def raise_lock_limit() -> None:
    """Allow this process to lock as much memory as it may: more than that, parked models stay pageable."""
    _, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (hard, hard))


def copy_rate(rig: Rig, size: int) -> float:
    """Return the bytes a second of the best of some copies, from pinned memory where the device is a GPU."""
    source = torch.ones(size, dtype=torch.uint8)
    if rig.is_cuda:
        source = source.pin_memory()
    target = torch.empty(size, dtype=torch.uint8, device=rig.device)

    def copy() -> None:
        target.copy_(source, non_blocking=True)
        rig.synchronize()

    return size / min(timed(copy) for _ in range(_NUM_COPIES))


def _one(rig: Rig, context: PartContext, name: str, rate: float) -> dict[str, Any]:
    folder = folder_of(name, context.device)
    started_s = time.perf_counter()
    engine = rig.load(folder, max_batch_tokens=8192)
    wanted = rig.embed(engine, [TEXT])
    disk_s = time.perf_counter() - started_s
    ready_s = timed(lambda: rig.embed(engine, [TEXT]))
    rounds = [_park_and_ask(rig, engine, wanted) for _ in range(rounds_of(engine.weight_bytes))]
    path, plain_s = engine.info.path, _without_graphs(rig, engine, wanted)
    engine.close()
    found: dict[str, Any] = {key: median(each[key] for each in rounds) for key in rounds[0]}
    least_s = found["moved_bytes"] / rate
    return {
        "model": name, "path": path, "from_page_cache_s": disk_s, "ready_s": ready_s, **found, "copy_bound_s": least_s,
        "times": found["parked_s"] / least_s, "copy_times": found["copy_s"] / least_s,
        "without_graphs_s": plain_s, "times_without_graphs": None if plain_s is None else plain_s / least_s,
        "rounds_s": [each["parked_s"] for each in rounds],
        "ok": found["worst_cosine"] >= LEAST_COSINE and (not rig.is_cuda or found["pinned"] == 1.0),
    }  # fmt: skip


def rounds_of(weight_bytes: int) -> int:
    """Return how often a model is parked: at least once, and smaller ones more often."""
    return max(1, min(MAX_ROUNDS, PARKED_BYTES // weight_bytes))


def _without_graphs(rig: Rig, engine: EmbeddingEngine, wanted: Any) -> float | None:
    """Return the seconds to the answer where no pass is recorded again; None without graphs, or where the check refuses
    this path, which rounds otherwise than the one that was checked at load."""
    if not has_graphs(engine):
        return None
    forget_graphs(engine)
    with contextlib.suppress(SelfCheckFailed):
        return _park_and_ask(rig, engine, wanted)["parked_s"]
    return None


def _park_and_ask(rig: Rig, engine: EmbeddingEngine, wanted: Any) -> dict[str, float]:
    """Return the seconds of parking, and of coming back for a request, step by step."""
    park_s = timed(engine.park)
    moved_bytes, is_pinned = engine.moved_bytes, _is_pinned(engine)
    started_s = time.perf_counter()
    engine.wake()
    copied_s = time.perf_counter()
    rig.wait(engine.resume())
    checked_s = time.perf_counter()
    got = rig.embed(engine, [TEXT])
    answered_s = time.perf_counter()
    return {
        "park_s": park_s, "moved_bytes": moved_bytes, "pinned": float(is_pinned), "copy_s": copied_s - started_s,
        "check_s": checked_s - copied_s, "answer_s": answered_s - checked_s, "parked_s": answered_s - started_s,
        "worst_cosine": float(cosines(got, wanted).min()),
    }  # fmt: skip


def _is_pinned(engine: EmbeddingEngine) -> bool:
    assert engine._parkable is not None, "it is parked"
    assert engine._parkable._copy is not None, "it is parked"
    return engine._parkable._copy._is_pinned
