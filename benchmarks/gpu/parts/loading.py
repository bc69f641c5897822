"""Measures the seconds of a load: from the disk, from the page cache, and of the copy alone from pinned memory."""

import gc
import time
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from benchmarks.gpu.folders import LOAD_MODELS, folder_of, forget_cache, weight_bytes
from benchmarks.gpu.rig import Rig, timed
from benchmarks.gpu.runner import PartContext

_GROWTH = {"qwen3-4b": 6.8, "qwen3-8b": 2.0}
"""How many times the bytes of the model before it; a model is begun only when its time is left."""


def run(context: PartContext) -> None:
    """Record each model, the small ones first; the last one is left out when there is no time for it."""
    rig = Rig(context.device)
    needed_s = 0.0
    for name in LOAD_MODELS[context.settings["size"]]:
        needed_s *= _GROWTH.get(name, 1.0)
        if needed_s > context.left_s:
            context.record(model=name, ok=None, raised=f"would take {needed_s:.0f} s, {context.left_s:.0f} s are left")
            continue
        needed_s = timed(lambda name=name: context.record(**_one(rig, context, name)))  # type: ignore[misc]  # bound now
    rig.close()


def _one(rig: Rig, context: PartContext, name: str) -> dict[str, Any]:
    started_s = time.perf_counter()
    folder = folder_of(name, context.device)
    made_s = time.perf_counter() - started_s
    size = weight_bytes(folder)
    forget_cache(folder)
    disk_s, disk_check_s, path = _load(rig, folder)
    cache_s, cache_check_s, _ = _load(rig, folder)
    found: dict[str, Any] = {
        "model": name, "bytes": size, "made_s": made_s, "path": path, "from_disk_s": disk_s, "check_s": disk_check_s,
        "from_page_cache_s": cache_s, "check_again_s": cache_check_s, "ok": True,
    }  # fmt: skip
    if rig.is_cuda:
        found["copy_from_pinned_s"] = _copy_from_pinned(rig, folder)
    return found


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


def _copy_from_pinned(rig: Rig, folder: Path) -> float:
    """Return the seconds in which all weights go from pinned memory to the device: what a cache there would leave."""
    pinned: list[torch.Tensor] = []
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as weights:
            pinned += [weights.get_tensor(key).pin_memory() for key in weights.keys()]  # noqa: SIM118  # no mapping
    rig.synchronize()

    def copy() -> None:
        there = [tensor.to(rig.device, non_blocking=True) for tensor in pinned]
        rig.synchronize()
        del there

    seconds = min(timed(copy) for _ in range(2))  # the first one also takes the memory
    pinned.clear()
    gc.collect()
    torch.cuda.empty_cache()
    return seconds
