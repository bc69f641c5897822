"""Measures the seconds of a load from the disk; part `swap` has those from the page cache."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.folders import LOAD_MODELS, folder_of, forget_cache, weight_bytes
from benchmarks.gpu.rig import Rig, timed
from benchmarks.gpu.runner import PartContext

_GROWTH = {"qwen3-4b": 6.8, "qwen3-8b": 2.0}
"""How many times the bytes of the model before it; a model is begun only when its time is left."""


def run(context: PartContext) -> None:
    """Record each model, the small one first."""
    rig = Rig(context.device)
    record_in_time(context, LOAD_MODELS[context.settings["size"]], lambda name: _one(rig, context, name))
    rig.close()


def record_in_time(context: PartContext, names: Sequence[str], measure: Callable[[str], dict[str, Any]]) -> None:
    """Record models of growing size; one that would take longer than there is time is left out."""
    needed_s = 0.0
    for name in names:
        needed_s *= _GROWTH.get(name, 1.0)
        if needed_s > context.left_s:
            context.record(model=name, ok=None, raised=f"would take {needed_s:.0f} s, {context.left_s:.0f} s are left")
            continue
        needed_s = timed(lambda name=name: context.record(**measure(name)))  # type: ignore[misc]  # bound now


def _one(rig: Rig, context: PartContext, name: str) -> dict[str, Any]:
    started_s = time.perf_counter()
    folder = folder_of(name, context.device)
    made_s = time.perf_counter() - started_s
    forget_cache(folder)
    disk_s, disk_check_s, path = _load(rig, folder)
    return {
        "model": name, "bytes": weight_bytes(folder), "made_s": made_s, "path": path, "from_disk_s": disk_s,
        "check_s": disk_check_s, "ok": True,
    }  # fmt: skip


def _load(rig: Rig, folder: Path) -> tuple[float, float, str]:
    """Return the seconds of reading and of the check at load, and the path that was chosen."""
    started_s = time.perf_counter()
    engine = rig.build(folder, max_batch_tokens=8192)
    rig.synchronize()
    read_s = time.perf_counter() - started_s
    check_s = timed(lambda: rig.warm_up(engine))
    path = engine.info.path
    engine.close()
    return read_s, check_s, path
