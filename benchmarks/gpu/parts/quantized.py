"""Compares int8 weights with bfloat16 on the device: vectors, bytes and speed."""

from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

from benchmarks.gpu.folders import LARGE, folder_of
from benchmarks.gpu.parts.speed import interleave_calls
from benchmarks.gpu.rig import Rig
from benchmarks.gpu.runner import PartContext
from benchmarks.lib import workloads
from benchmarks.lib.engine_kit import cosines
from engines.precision import MIN_COSINE

NUM_TEXTS = {"full": {"short": 1024, "passages": 512}, "small": {"short": 32, "passages": 16}}
ROUNDS = {"full": 3, "small": 2}


def int8_weights(context: PartContext) -> None:
    """Record, for each workload, how near int8 comes to bfloat16 and how fast each is, in interleaved rounds; and the
    bytes of both.

    On a CPU, where `int8` is another form (`engines/models/weight_forms.py`), the vectors' bound is the same.
    """
    rig = Rig(context.device)
    size = context.settings["size"]
    folder = folder_of(LARGE[size], context.device)
    engines = {dtype: rig.load(folder, dtype=dtype, min_cosine=0.0) for dtype in ("bfloat16", "int8")}
    held = {dtype: engine.weight_bytes for dtype, engine in engines.items()}
    for name, num_texts in NUM_TEXTS[size].items():
        texts = workloads.make(name, num_texts, workloads.counter(folder)).texts
        runs: dict[str, Callable[[], Any]] = {
            dtype: partial(rig.embed, engine, texts) for dtype, engine in engines.items()
        }
        worst = float(cosines(runs["int8"](), runs["bfloat16"]()).min())
        seconds = interleave_calls(runs, ROUNDS[size])
        context.record(
            model=folder.name, workload=name, texts=len(texts), worst_cosine=worst, weight_bytes=held,
            size_ratio=held["int8"] / held["bfloat16"], paths={dtype: one.info.path for dtype, one in engines.items()},
            speedup=median(a / b for a, b in zip(seconds["bfloat16"], seconds["int8"], strict=True)),
            ok=worst >= MIN_COSINE["int8"],
        )  # fmt: skip
    for engine in engines.values():
        engine.close()
    rig.close()
