"""How long one call with a few texts takes: with passes that were recorded, without, and beside sentence-transformers.

A part of `benchmarks/gpu.py`: on a CPU nothing is recorded, and the table says so.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import median
from typing import Any

from benchmarks import workloads
from benchmarks.measure import SETTLE_S, Run, interleave, speedup
from engines.batching.engine import EmbeddingEngine
from engines.models.transformer import TransformerEncoder

CALLS = {"one short text": ("short", 1), "8 short texts": ("short", 8), "one passage": ("passages", 1)}
"""What one call brings: a workload, and how many of its texts."""

OURS, ORDINARY, PEER = "Embedyard", "Embedyard without graphs", "sentence-transformers"

_CALLS_A_SAMPLE = 20

Embed = Callable[[Sequence[str]], object]
"""One call: texts in, vectors out, on the host."""


def encoder_of(engine: EmbeddingEngine) -> TransformerEncoder:
    """What an engine runs."""
    assert engine._runner is not None, "the engine has not been closed"
    encoder = engine._runner._encoder
    assert isinstance(encoder, TransformerEncoder), "it has a transformer"
    return encoder


def has_graphs(engine: EmbeddingEngine) -> bool:
    """Whether some of its passes were recorded."""
    return bool(encoder_of(engine).sizes)


def forget_graphs(engine: EmbeddingEngine) -> None:
    """From now on it runs as it would without them. Nothing may run meanwhile."""
    encoder = encoder_of(engine)
    encoder.switch_to(next(path for path in encoder.candidate_paths() if path != "graphed"))


def latency(
    programs: Mapping[str, Embed], count: Callable[[str], int], rounds: int, *, settle_s: float = SETTLE_S
) -> dict[str, dict[str, Any]]:
    """Seconds of a call, by what it brings and by program."""
    found = {}
    for what, (name, num_texts) in CALLS.items():
        workload = workloads.make(name, num_texts, count)
        runs: dict[str, Run] = {
            program: partial(_seconds, embed, workload.texts) for program, embed in programs.items()
        }
        seconds = interleave(runs, rounds, settle_s=settle_s, is_warm=False)
        found[what] = {"tokens": workload.num_tokens, "seconds": seconds}
    return found


def _seconds(embed: Embed, texts: Sequence[str]) -> float:
    """Of one call, the median of several."""
    taken = []
    for _ in range(_CALLS_A_SAMPLE):
        started = time.perf_counter()
        embed(texts)
        taken.append(time.perf_counter() - started)
    return median(taken)


def latency_rows(model: str, found: Mapping[str, dict[str, Any]]) -> list[tuple[str, ...]]:
    """Two lines of the table for each call."""
    rows: list[tuple[str, ...]] = []
    for what, case in found.items():
        seconds = case["seconds"]
        for other in (ORDINARY, PEER):
            label = f"{model}, {what} ({case['tokens']} tokens), beside {other}"
            ours = f"{1000 * median(seconds[OURS]):.2f} ms"
            if other in seconds:
                theirs, ratio = f"{1000 * median(seconds[other]):.2f} ms", str(speedup(seconds[OURS], seconds[other]))
            else:
                theirs, ratio = "no graphs here", "–"
            rows.append(("latency", label, ours, theirs, ratio))
    return rows
