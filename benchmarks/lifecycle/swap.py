"""Measures how long a model takes from a request to its answer, by where its weights are.

    python -m benchmarks.lifecycle.swap peers [--models minilm,bert-base] [--peers infinity-process] [--rounds 3]
    python -m benchmarks.lifecycle.swap engine [--models minilm,bert-base] [--rounds 5] [--threads N]

`peers`: over HTTP from our server, and beside it the ways of other programs (`benchmarks/lifecycle/ways.py`), one after
the other; a result file for each model, and one plot of all that there are.
`engine`: in the process. `device`: the model is ready. `host`: it is parked in main memory, and its files are deleted
meanwhile. `disk`: they are in the page cache; the engine is built, checked and warmed up. On a CPU both memories are
the same, and parked weights stay in place (`engines/models/parking.py`); `--copies` copies those that torch can free
alone, as on a GPU.
"""

import argparse
import asyncio
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, Literal

import msgspec
import numpy as np
import torch
from msgspec import Struct
from numpy.typing import NDArray

from benchmarks.lib.folders import resolve
from benchmarks.lib.machine import Watch, warn_if_busy
from benchmarks.lib.report import Report, add_save_option, can_draw, draw_seconds, draw_stacked, publish, run_command
from benchmarks.lib.worker import WorkerFailed
from benchmarks.lifecycle.ways import WAYS, Answer, Way
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

    `load_s`, `check_s`, `answer_s`: of `disk_s`, to read and build the model, to check it and warm it up, to answer.
    `park_s`: to park the model. `moved_bytes`: what is copied.
    """

    device_s: float
    host_s: float
    load_s: float
    check_s: float
    answer_s: float
    park_s: float
    weight_bytes: int
    moved_bytes: int

    @property
    def disk_s(self) -> float:
        return self.load_s + self.check_s + self.answer_s


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
    loaded_s = time.perf_counter()
    await engine.warm_up()
    checked_s = time.perf_counter()
    first = await _embed(engine)
    load_s, check_s, answer_s = loaded_s - begun_s, checked_s - loaded_s, time.perf_counter() - checked_s
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
        device_s=device_s, host_s=host_s, load_s=load_s, check_s=check_s, answer_s=answer_s, park_s=park_s,
        weight_bytes=weight_bytes, moved_bytes=moved_bytes,
    )  # fmt: skip


async def _embed(engine: EmbeddingEngine) -> NDArray[np.float32]:
    result = await engine.run(EmbedCall(model_id="m", texts=TEXTS))
    assert isinstance(result, Embeddings), "it embeds"
    return result.array()


def run_engine(models: Sequence[str], rounds: int, threads: int, *, copies: bool = False) -> Report:
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
        header=(
            "model",
            "weights",
            "copied",
            "ready",
            "from main memory",
            "from disk",
            "load / check / answer",
            "to park",
        ),
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
    sizes = [f"{size / 1e6:,.0f} MB" for size in (first.weight_bytes, first.moved_bytes)]
    steps = " / ".join(f"{_of(swaps, step):.3f}" for step in STEPS)
    seconds = [f"{_of(swaps, each):.3f} s" for each in ("device_s", "host_s", "disk_s", "park_s")]
    return (name, *sizes, *seconds[:3], steps, seconds[3])


STEPS = {"load_s": "read and build", "check_s": "check and warm up", "answer_s": "answer"}


def _of(swaps: Sequence[Swap], field: str) -> float:
    return float(median(getattr(swap, field) for swap in swaps))


def draw_steps(path: Path, found: Mapping[str, Sequence[Swap]]) -> None:
    """Draw the steps of a load from the page cache on each other, a bar for each model."""
    series = {name: [_of(swaps, step) for swaps in found.values()] for step, name in STEPS.items()}
    draw_stacked(path, "From the page cache to the answer: where the seconds go", list(found), series)


def main_engine(argv: Sequence[str]) -> None:
    """Print the table of the engine."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lifecycle.swap engine", description=__doc__)
    parser.add_argument("--models", default="minilm,bert-base", help="of benchmarks.lib.folders, with commas")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--copies", action="store_true", help="copy the weights of parked models")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the forward pass")
    add_save_option(parser)
    asked = parser.parse_args(argv)
    report = run_engine(asked.models.split(","), asked.rounds, asked.threads, copies=asked.copies)
    publish(report, asked.results)
    if asked.results is not None and can_draw():
        draw_steps(asked.results / "swap-steps.svg", report.samples)


# Beside other programs.

MODELS = "minilm,bert-base,qwen3-0.6b,xlmr-large"
_PLOT = "swap.svg"


def sample(ways: Sequence[Way], folder: Path, rounds: int) -> tuple[dict[str, list[Answer]], list[str]]:
    """Return the answers of each way, the first one of each uncounted, and a note for each that does not run here."""
    found: dict[str, list[Answer]] = {}
    notes = []
    for way in ways:
        print(f"{folder.name}: {way.key} …", file=sys.stderr, flush=True)
        try:
            found |= _sample(way, folder, rounds)
        except WorkerFailed as error:
            notes.append(f"left out: {str(error).splitlines()[0]}")
            print(error, file=sys.stderr, flush=True)
    return found, notes


def _sample(way: Way, folder: Path, rounds: int) -> dict[str, list[Answer]]:
    with way.open(folder) as asks:
        answers: dict[str, list[Answer]] = {name: [] for name in asks}
        for _ in range(rounds + 1):
            for name, ask in asks.items():
                answers[name].append(ask())
    return {name: all_of_it[1:] for name, all_of_it in answers.items()}


def run_peers(model: str, ways: Sequence[Way], rounds: int) -> Report:
    """Measure a model of `benchmarks.lib.folders`, or a folder."""
    watch, folder = Watch(), resolve(model)
    warn_if_busy(watch.machine)
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    found, notes = sample(ways, folder, rounds)
    return Report(
        name=f"swap-{folder.name}",
        title=f"Seconds from a request to its answer, {folder.name}, {size / 1e6:,.0f} MB",
        machine=watch.machine,
        settings={"model": folder.name, "rounds": rounds, "ways": [way.key for way in ways], "weight_bytes": size},
        header=("way", "median s", "worst s", "vector off by"),
        rows=rows_of(found),
        samples={"seconds": {name: [answer.seconds for answer in answers] for name, answers in found.items()}},
        notes=(*notes, "files in the page cache; float32; one way after the other"),
    )


def rows_of(found: Mapping[str, Sequence[Answer]]) -> list[tuple[str, ...]]:
    """Return a row a way; its vector is compared with that of the first way."""
    vectors = {name: np.stack([answer.vector for answer in answers]) for name, answers in found.items()}
    rows: list[tuple[str, ...]] = []
    for name, answers in found.items():
        seconds = [answer.seconds for answer in answers]
        off_by = np.abs(vectors[name] - next(iter(vectors.values()))[0]).max()
        rows.append((name, f"{median(seconds):.3f}", f"{max(seconds):.3f}", f"{off_by:.0e}"))
    return rows


def draw(folder: Path) -> None:
    """Draw the models whose results are in a folder, from the smallest on."""
    reports = [msgspec.json.decode(path.read_bytes(), type=Report) for path in folder.glob("swap-*.json")]
    reports.sort(key=lambda report: int(report.settings["weight_bytes"]))
    names = dict.fromkeys(name for report in reports for name in report.samples["seconds"])
    series: dict[str, list[float | None]] = {
        name: [_median(report.samples["seconds"].get(name)) for report in reports] for name in names
    }
    groups = [f"{report.settings['model']}, {report.settings['weight_bytes'] / 1e6:,.0f} MB" for report in reports]
    draw_seconds(folder / _PLOT, "From a request to its answer, by where the model is", groups, series)


def _median(seconds: Any) -> float | None:
    return median(seconds) if seconds else None


def main_peers(argv: Sequence[str]) -> None:
    """Print a table for each model, and draw all."""
    keys = [way.key for way in WAYS[1:]]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lifecycle.swap peers", description=__doc__)
    parser.add_argument("--models", default=MODELS, help="of benchmarks.lib.folders, with commas")
    parser.add_argument("--peers", nargs="*", default=keys, choices=keys)
    parser.add_argument("--rounds", type=int, default=3)
    add_save_option(parser)
    asked = parser.parse_args(argv)
    ways = [way for way in WAYS if way is WAYS[0] or way.key in asked.peers]
    for model in asked.models.split(","):
        publish(run_peers(model, ways, asked.rounds), asked.results)
    if asked.results is not None and can_draw():
        draw(asked.results)


def main() -> None:
    """Run the requested command."""
    run_command({"peers": main_peers, "engine": main_engine})


if __name__ == "__main__":
    main()
