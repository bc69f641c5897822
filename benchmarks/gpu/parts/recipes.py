"""Loads every recipe on the device, with and without CUDA graphs, and compares its vectors with float32 on the CPU."""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.gpu.rig import Rig, encoder_of, forget_graphs
from benchmarks.gpu.runner import PartContext
from benchmarks.lib.engine_kit import cosines
from benchmarks.lib.models import RECIPES, Recipe, quiet, wider
from benchmarks.lib.workloads import mixed
from engines.batching.engine import EmbeddingEngine

WIDTH = 64
"""Four heads of 16: the kernels of a GPU take head widths that are multiples of 8."""

LEAST_COSINE = {"cuda": 0.999, "cpu": 0.999999}
NUM_TEXTS, NUM_ALONE = 40, 6
_LEAST_S = 5.0


def run(context: PartContext) -> None:
    """Record path, notes and the worst cosine of each recipe; texts of many lengths together, and some alone."""
    rig, reference = Rig(context.device), Rig("cpu")
    with tempfile.TemporaryDirectory() as draft, wider(WIDTH):
        for name, recipe in RECIPES.items():
            if context.left_s < _LEAST_S:
                context.record(recipe=name, ok=None, raised="no time left in this part")
                continue
            try:
                context.record(**judge(rig, reference, recipe, Path(draft) / name))
            except Exception as error:  # noqa: BLE001  # one family that does not load must not hide the others
                context.record(recipe=name, ok=False, raised=f"{type(error).__name__}: {error}"[:300])
    rig.close()
    reference.close()


def judge(rig: Rig, reference: Rig, recipe: Recipe, folder: Path) -> dict[str, Any]:
    """Return the record of one recipe."""
    try:
        with quiet():
            recipe.build(folder)
    except ImportError as error:
        return {"recipe": recipe.name, "ok": None, "raised": f"not in this transformers: {error}"[:200]}
    texts = mixed(NUM_TEXTS, seed=11)
    plain = reference.load(folder, **{**recipe.spec, "dtype": "float32"})
    wanted = reference.embed(plain, texts)
    plain.close()
    engine = rig.load(folder, **recipe.spec)
    found: dict[str, Any] = {
        "recipe": recipe.name, "attention": engine.info.attention, "path": engine.info.path,
        "notes": list(engine.info.notes), "expected": recipe.attention, "cosine": _worst(rig, engine, texts, wanted),
    }  # fmt: skip
    worst = found["cosine"]
    if engine.info.path == "graphed":
        found["sizes"] = [size.tokens for size in encoder_of(engine).sizes]
        forget_graphs(engine)
        found["path_without_graphs"] = encoder_of(engine).path
        found["cosine_without_graphs"] = _worst(rig, engine, texts, wanted)
        worst = min(worst, found["cosine_without_graphs"])
    engine.close()
    found["ok"] = worst >= LEAST_COSINE[rig.device.type] and found["attention"] == recipe.attention
    return found


def _worst(rig: Rig, engine: EmbeddingEngine, texts: list[str], wanted: Any) -> float:
    """Return the worst cosine of all texts in one call, and of the first few alone."""
    together = cosines(rig.embed(engine, texts), wanted)
    alone = [
        cosines(rig.embed(engine, [text]), row[None]) for text, row in zip(texts[:NUM_ALONE], wanted, strict=False)
    ]
    return float(np.concatenate([together, *alone]).min())
