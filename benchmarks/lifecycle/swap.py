"""Measures how long a model takes from a request to its answer, by where its weights are.

    python -m benchmarks.lifecycle.swap [--models minilm,bert-base] [--rounds 5] [--threads N]

`device`: it is ready. `host`: it is parked in main memory, and its files are deleted meanwhile. `disk`: they are in
the page cache; the engine is built, checked and warmed up. On a CPU both memories are the same, and parked weights stay
in place (`engines/models/parking.py`); `--copies` copies those that torch can free alone, as on a GPU.
"""

import argparse
import asyncio
import shutil
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Literal

import numpy as np
import torch
from msgspec import Struct
from numpy.typing import NDArray

from benchmarks.lib.folders import resolve
from benchmarks.lib.machine import Watch, warn_if_busy
from benchmarks.lib.report import RESULTS, Report, publish
from engines.batching.engine import EmbeddingEngine
from engines.device import torch_runtime
from engines.device.scheduler import DeviceScheduler
from engines.inputs.tokenizer_threads import TokenizerThreads
from engines.loading.loader import LoaderSettings, TorchLoader
from engines.spec import Dtype, ModelSpec
from engines.types import EmbedCall, Embeddings, ModelFiles

TEXTS = ("The cat sits outside.",)

Temperature = Literal["device", "host", "disk"]


class Case(Struct, frozen=True):
    """A model of `benchmarks.lib.folders` in a dtype."""

    model: str
    dtype: Dtype = "auto"

    @property
    def name(self) -> str:
        return self.model if self.dtype == "auto" else f"{self.model} in {self.dtype}"


class Swap(Struct, frozen=True, kw_only=True):
    """Seconds of one round, from a request to its answer.

    `park_s`: to park the model. `moved_bytes`: what is copied.
    """

    device_s: float
    host_s: float
    disk_s: float
    park_s: float
    weight_bytes: int
    moved_bytes: int


def cases(models: Sequence[str], dtypes: Sequence[Dtype] = ("auto", "bfloat16")) -> list[Case]:
    """Return each model in each dtype."""
    return [Case(model, dtype) for model in models for dtype in dtypes]


async def measure(loader: TorchLoader, case: Case, folder: Path) -> Swap:
    """Load a copy of a model's folder, use it, park it, delete the folder, and use it again.

    Raises:
        AssertionError: the vectors before and after differ.
    """
    spec = ModelSpec(model_id="m", source=str(folder), dtype=case.dtype, min_cosine=0.0)
    begun_s = time.perf_counter()
    engine = loader.load(spec, ModelFiles(path=str(folder), revision=case.name, size_bytes=0))
    await engine.warm_up()
    first = await _embed(engine)
    disk_s = time.perf_counter() - begun_s
    begun_s = time.perf_counter()
    await _embed(engine)
    device_s = time.perf_counter() - begun_s
    shutil.rmtree(folder)
    begun_s = time.perf_counter()
    await asyncio.to_thread(engine.park)
    park_s = time.perf_counter() - begun_s
    moved_bytes = engine.moved_bytes
    begun_s = time.perf_counter()
    await asyncio.to_thread(engine.wake)
    await engine.resume()
    again = await _embed(engine)
    host_s = time.perf_counter() - begun_s
    assert np.allclose(again, first, atol=1e-5), f"{case.name} gives other vectors after it was parked"
    weight_bytes = engine.weight_bytes
    engine.close()
    return Swap(
        device_s=device_s, host_s=host_s, disk_s=disk_s, park_s=park_s, weight_bytes=weight_bytes,
        moved_bytes=moved_bytes,
    )  # fmt: skip


async def _embed(engine: EmbeddingEngine) -> NDArray[np.float32]:
    result = await engine.run(EmbedCall(model_id="m", texts=TEXTS))
    assert isinstance(result, Embeddings), "it embeds"
    return result.array()


def run(models: Sequence[str], rounds: int, threads: int, *, copies: bool = False) -> Report:
    """Measure all cases."""
    watch = Watch()
    warn_if_busy(watch.machine)
    scheduler = DeviceScheduler(
        "bench", torch_runtime.prepare, num_threads=threads, use_cores=torch_runtime.set_threads
    )
    found: dict[str, list[Swap]] = {}
    with TemporaryDirectory() as state, closing(TokenizerThreads(threads)) as tokenizers:
        settings = LoaderSettings(canary_folder=Path(state), copies_parked=copies)
        loader = TorchLoader("cpu", scheduler, tokenizers, settings)
        for case in cases(models):
            found[case.name] = [_round(loader, case, Path(state) / "model") for _ in range(rounds + 1)][1:]
    scheduler.close()
    return Report(
        name="swap",
        title="Seconds from a request to its answer, by where the model's weights are",
        machine=watch.machine,
        settings={"models": list(models), "rounds": rounds, "threads": threads, "copies": copies},
        header=("model", "weights", "copied", "ready", "from main memory", "from disk", "to park"),
        rows=[_row(name, swaps) for name, swaps in found.items()],
        samples=dict(found),
        notes=(
            "medians; from main memory: its files deleted meanwhile, and vectors checked where weights were copied",
            "of what is copied, weights held by ONNX Runtime or oneDNN stay in place on a CPU",
        ),
    )


def _round(loader: TorchLoader, case: Case, folder: Path) -> Swap:
    shutil.copytree(resolve(case.model), folder)
    return asyncio.run(measure(loader, case, folder))


def _row(name: str, swaps: Sequence[Swap]) -> tuple[str, ...]:
    first = swaps[0]
    seconds = [
        median(values) for values in zip(*((s.device_s, s.host_s, s.disk_s, s.park_s) for s in swaps), strict=True)
    ]
    sizes = [f"{size / 1e6:,.0f} MB" for size in (first.weight_bytes, first.moved_bytes)]
    return (name, *sizes, *(f"{value:.3f} s" for value in seconds))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lifecycle.swap", description=__doc__)
    parser.add_argument("--models", default="minilm,bert-base", help="of benchmarks.lib.folders, with commas")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--copies", action="store_true", help="copy the weights of parked models")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the forward pass")
    parser.add_argument("--no-save", dest="results", action="store_const", const=None, default=RESULTS)
    asked = parser.parse_args()
    publish(run(asked.models.split(","), asked.rounds, asked.threads, copies=asked.copies), asked.results)


if __name__ == "__main__":
    main()
