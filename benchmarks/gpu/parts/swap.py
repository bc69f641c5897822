"""Measures the seconds from a request for a parked model to its answer, against the rate of pinned copies.

The answer of a parked model takes the copies of its weights, the comparison of a few vectors, and the pass itself; each
is recorded alone, too. Its passes are recorded again after the answer, when the device is idle: how many seconds later
they are back is recorded as well. The rate is that of one copy of pinned memory to the device, in the same process.
"""

import contextlib
import resource
import time
from statistics import median
from typing import Any

import torch

from benchmarks.gpu.folders import SWAP_MODELS, folder_of
from benchmarks.gpu.parts.loading import record_in_time
from benchmarks.gpu.rig import Rig, has_graphs, timed
from benchmarks.gpu.runner import PartContext
from benchmarks.lib.engine_kit import cosines
from engines.batching.engine import EmbeddingEngine

TEXT = "The cat sits outside."
MAX_ROUNDS = 3
PARKED_BYTES = 18 * 10**9
"""Of all rounds of a model: to pin 16 GB takes seconds."""

LEAST_COSINE = 0.9999
LONGEST_RECORDING_S = 15.0
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
    path = engine.info.path
    rounds = [_park_and_ask(rig, engine, wanted) for _ in range(rounds_of(engine.weight_bytes))]
    first_path, back_s = engine.info.path, wait_for_graphs(engine) if path == "graphed" else None
    last_path, again = engine.info.path, rig.embed(engine, [TEXT])
    engine.close()
    found: dict[str, Any] = {key: median(each[key] for each in rounds) for key in rounds[0]}
    found["worst_cosine"] = min(*(each["worst_cosine"] for each in rounds), float(cosines(again, wanted).min()))
    least_s = found["moved_bytes"] / rate
    return {
        "model": name, "path": path, "from_page_cache_s": disk_s, "ready_s": ready_s, **found, "copy_bound_s": least_s,
        "times": found["parked_s"] / least_s, "copy_times": found["copy_s"] / least_s,
        "first_path": first_path, "graphs_back_s": back_s, "rounds_s": [each["parked_s"] for each in rounds],
        "ok": found["worst_cosine"] >= LEAST_COSINE and last_path == path
        and (not rig.is_cuda or found["pinned"] == 1.0),
    }  # fmt: skip


def rounds_of(weight_bytes: int) -> int:
    """Return how often a model is parked: at least once, and smaller ones more often."""
    return max(1, min(MAX_ROUNDS, PARKED_BYTES // weight_bytes))


def wait_for_graphs(engine: EmbeddingEngine) -> float | None:
    """Return the seconds until the passes of a model that came back are recorded again and checked; None where that
    fails or takes too long. The device waits `CHECK_AFTER_S` before it begins."""
    assert engine._parkable is not None, "it came back"
    assert engine._parkable.graphs is not None, "it has a transformer"
    started_s = time.perf_counter()
    while engine._parkable.graphs.is_pending:
        if time.perf_counter() - started_s > LONGEST_RECORDING_S:
            return None
        time.sleep(0.005)  # the device records them by itself
    return time.perf_counter() - started_s if has_graphs(engine) else None


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
