"""Measures what models hold on the device: beside another, in the largest batch, beyond the memory, and afterwards."""

import threading
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from benchmarks.gpu.folders import BASE, folder_of
from benchmarks.gpu.rig import Rig, embed_in_thread, encoder_of, timed
from benchmarks.gpu.runner import PartContext
from benchmarks.lib import workloads
from benchmarks.lib.engine_kit import cosines
from engines.batching.engine import EmbeddingEngine

NUM_LOADS_BESIDE = 3
"""Loads with recording, while another model serves."""

NUM_CYCLES = 20
SETTLED_AFTER = 3
"""Loads after which nothing new is allocated for good: libraries take workspaces when first used."""

CUDA_SLACK_BYTES = 32 * 2**20
"""Workspaces of cuBLAS, which belong to a stream and not to a model."""

CPU_SLACK_SHARE = 0.1
BATCH_TOKENS = {"full": 16384, "small": 2048}
SMALL_SHARE = 0.6
"""Of what a whole batch needs: half of it fits."""

LEAST_COSINE = 0.9999


def capture(context: PartContext) -> None:
    """Record graphs of one model again and again while another serves, whose vectors must stay as they are."""
    rig = Rig(context.device)
    folder = folder_of(BASE[context.settings["size"]], context.device)
    serving = rig.load(folder, max_batch_tokens=2048)
    texts = workloads.make("short", 4, workloads.counter(folder)).texts
    wanted = rig.embed(serving, texts)
    probe = Probe(serving, texts, wanted)
    with probe:
        time.sleep(1.0)
        quiet = probe.take()
        sizes = []
        for number in range(NUM_LOADS_BESIDE):
            loaded = rig.load(folder, model_id=f"beside-{number}", max_batch_tokens=2048)
            sizes.append([size.tokens for size in encoder_of(loaded).sizes])
            loaded.close()
        busy = probe.take()
    serving.close()
    rig.close()
    context.record(
        ok=not probe.errors and probe.worst >= LEAST_COSINE and all(sizes), sizes=sizes, worst_cosine=probe.worst,
        errors=probe.errors[:3], calls_quiet=len(quiet), calls_while_recording=len(busy),
        p50_ms_quiet=1000 * median(quiet), p50_ms_while_recording=1000 * median(busy),
        worst_ms_while_recording=1000 * max(busy),
    )  # fmt: skip


class Probe:
    """A thread that embeds the same texts again and again, and compares every answer."""

    def __init__(self, engine: EmbeddingEngine, texts: tuple[str, ...], wanted: Any) -> None:
        self._engine, self._texts, self._wanted = engine, texts, wanted
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._seconds: list[float] = []
        self.errors: list[str] = []
        self.worst = 1.0

    def __enter__(self) -> "Probe":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def take(self) -> list[float]:
        """Return the seconds of the calls since this was asked last, at least one."""
        while not self._seconds and self._thread.is_alive():
            time.sleep(0.01)
        taken, self._seconds = self._seconds, []
        return taken

    def _run(self) -> None:
        while not self._stop.is_set():
            started_s = time.perf_counter()
            try:
                got = embed_in_thread(self._engine, self._texts)
            except Exception as error:  # noqa: BLE001  # any failure of the serving model is the finding
                self.errors.append(f"{type(error).__name__}: {error}"[:300])
                time.sleep(0.01)
            else:
                self.worst = min(self.worst, float(cosines(got, self._wanted).min()))
            self._seconds.append(time.perf_counter() - started_s)


def memory(context: PartContext) -> None:
    """Compare what a model is charged with and what torch's allocator holds: at rest, with two bulk requests, after."""
    rig = Rig(context.device)
    size = context.settings["size"]
    folder = folder_of(BASE[size], context.device)
    count = workloads.counter(folder)
    warm = rig.load(folder, max_batch_tokens=1024)  # what libraries take when first used is not this model's
    rig.embed(warm, ["a first text"])
    warm.close()
    before = torch.cuda.memory_allocated(rig.device)
    engine = rig.load(folder, max_batch_tokens=BATCH_TOKENS[size])
    rest = torch.cuda.memory_allocated(rig.device) - before
    bulk = [workloads.make("long", 4 * BATCH_TOKENS[size] // 400, count, seed=seed).texts for seed in (1, 2)]
    for name, calls in (("one bulk request", bulk[:1]), ("two bulk requests", bulk)):
        rig.synchronize()
        torch.cuda.reset_peak_memory_stats(rig.device)
        rig.embed_at_once(engine, calls)
        peak = torch.cuda.max_memory_allocated(rig.device) - before - rest
        context.record(
            what=name, charged_bytes=engine.workspace_bytes, peak_bytes=peak, ok=peak <= engine.workspace_bytes
        )
    context.record(
        what="weights and graphs", charged_bytes=engine.weight_bytes, peak_bytes=rest, ok=rest <= engine.weight_bytes
    )
    engine.close()
    left = torch.cuda.memory_allocated(rig.device) - before
    context.record(what="after it left", charged_bytes=0, peak_bytes=left, ok=left <= CUDA_SLACK_BYTES)
    rig.close()


def out_of_memory(context: PartContext) -> None:
    """Take memory away until a batch does not fit: its halves must, with the same vectors, and the limit comes back."""
    rig = Rig(context.device)
    size = context.settings["size"]
    folder = folder_of(BASE[size], context.device)
    tokens = BATCH_TOKENS[size]
    engine = rig.load(folder, max_batch_tokens=tokens)
    texts = workloads.make("long", 2 * tokens // 400, workloads.counter(folder)).texts
    torch.cuda.reset_peak_memory_stats(rig.device)
    wanted = rig.embed(engine, texts)
    rig.synchronize()
    torch.cuda.empty_cache()
    held = torch.cuda.memory_reserved(rig.device)
    need = torch.cuda.max_memory_allocated(rig.device) - torch.cuda.memory_allocated(rig.device)
    total = torch.cuda.get_device_properties(rig.device).total_memory
    torch.cuda.set_per_process_memory_fraction((held + SMALL_SHARE * need) / total, rig.device)
    try:
        got = rig.embed(engine, texts)
        halved = _batch_limit(engine, tokens)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, rig.device)
    grown = _limits_with_time(engine, tokens)
    after = rig.embed(engine, texts)
    worst = float(np.minimum(cosines(got, wanted), cosines(after, wanted)).min())
    context.record(
        batch_tokens=tokens, needed_bytes=need, allowed_bytes=int(SMALL_SHARE * need), limit_tokens=halved,
        limits_with_time=grown, worst_cosine=worst,
        ok=halved < tokens and grown[-1] == tokens and worst >= LEAST_COSINE,
    )  # fmt: skip
    engine.close()
    rig.close()


def _batch_limit(engine: EmbeddingEngine, tokens: int) -> int:
    assert engine._runner is not None, "the engine is open"
    return engine._runner._learned.within(tokens)


def _limits_with_time(engine: EmbeddingEngine, tokens: int) -> list[int]:
    """Return the limit after each of the waits, by a clock that runs ahead, until it is gone."""
    assert engine._runner is not None, "the engine is open"
    learned, ahead_s, found = engine._runner._learned, 0.0, [_batch_limit(engine, tokens)]
    while found[-1] < tokens and len(found) < 20:
        ahead_s += 60.0
        learned._clock = lambda ahead_s=ahead_s: time.monotonic() + ahead_s  # type: ignore[misc]  # bound now
        found.append(_batch_limit(engine, tokens))
    return found


def cycles(context: PartContext) -> None:
    """Load, use and evict a model twenty times; what is held must come back to what it was after the first few."""
    rig = Rig(context.device)
    folder = folder_of(BASE[context.settings["size"]], context.device)
    texts = workloads.make("short", 8, workloads.counter(folder)).texts
    held: list[int] = []
    seconds: list[float] = []
    for _ in range(NUM_CYCLES):
        seconds.append(timed(lambda: _cycle(rig, folder, texts)))
        held.append(rig.held_bytes())
    settled = held[SETTLED_AFTER - 1]
    slack = CUDA_SLACK_BYTES if rig.is_cuda else max(CUDA_SLACK_BYTES, int(CPU_SLACK_SHARE * settled))
    context.record(
        what="memory_reserved" if rig.is_cuda else "anonymous memory", held_bytes=held, grown_bytes=held[-1] - settled,
        seconds_a_cycle=median(seconds), ok=held[-1] - settled <= slack,
    )  # fmt: skip
    rig.close()


def _cycle(rig: Rig, folder: Path, texts: tuple[str, ...]) -> None:
    engine = rig.load(folder, max_batch_tokens=2048)
    rig.embed(engine, texts)
    engine.close()
