"""Measures how long it takes to read a model's weights from the page cache into main memory, beside other readers.

    python -m benchmarks.lifecycle.read [--model minilm] [--rounds 5]

`bytes`: all threads read the file into memory that is mapped already, the bound for every reader. `safetensors`: its
`load_file`, which maps the file, or reads it (`pread`); mapped weights cost nothing before they are used.
fastsafetensors and the Run:ai model streamer take part where they are installed.
"""

import argparse
import importlib
import importlib.util
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks.lib.folders import resolve
from benchmarks.lib.machine import Watch, usable_cores, warn_if_busy
from benchmarks.lib.measure import interleave
from benchmarks.lib.report import RESULTS, Report, publish
from engines.loading.weight_reader import WeightReader, _bytes_at

FILE = "model.safetensors"
CPU = torch.device("cpu")

Reader = Callable[[Path], object]


def _own(folder: Path) -> object:
    with WeightReader(folder, [FILE], CPU) as reader:
        return {name: stored.to() for name, stored in reader.tensors().items()}


def _fastsafetensors(folder: Path) -> object:
    module: Any = importlib.import_module("fastsafetensors")
    with ExitStack() as stack:
        opened = stack.enter_context(module.fastsafe_open([str(folder / FILE)], nogds=True, device="cpu"))
        return {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118  # no mapping


def _runai(folder: Path) -> object:
    module: Any = importlib.import_module("runai_model_streamer")
    with module.SafetensorsStreamer() as streamer:
        streamer.stream_file(str(folder / FILE))
        return {name: tensor.clone() for name, tensor in streamer.get_tensors()}


READERS: dict[str, Reader] = {
    "ours": _own,
    "safetensors, mapped": lambda folder: load_file(folder / FILE),
    "safetensors, pread": lambda folder: load_file(folder / FILE, backend="pread"),
}
PEERS: dict[str, tuple[str, Reader]] = {
    "fastsafetensors": ("fastsafetensors", _fastsafetensors),
    "runai-model-streamer": ("runai_model_streamer", _runai),
}


def run(model: str, rounds: int) -> Report:
    """Measure the readers that are installed."""
    watch, folder = Watch(), resolve(model)
    warn_if_busy(watch.machine)
    size = (folder / FILE).stat().st_size
    readers = READERS | {name: read for name, (module, read) in PEERS.items() if importlib.util.find_spec(module)}
    runs = {name: (lambda read=read: _seconds(read, folder)) for name, read in readers.items()}
    mapped = torch.zeros(size, dtype=torch.uint8)
    samples = interleave({"bytes": lambda: _plain(folder, mapped), **runs}, rounds, is_warm=False)
    base_s = median(samples["bytes"])
    return Report(
        name=f"read-{folder.name}",
        title=f"Seconds to read the weights of {folder.name} from the page cache",
        machine=watch.machine,
        settings={"model": model, "rounds": rounds, "threads": usable_cores()},
        header=("reader", "median s", "worst s", "over bytes"),
        rows=[
            (name, f"{median(found):.3f}", f"{max(found):.3f}", f"{median(found) / base_s:.2f}")
            for name, found in samples.items()
        ],
        samples=dict(samples),
        notes=(f"{size / 1e6:,.0f} MB; mapped weights are read when they are used, which is not counted",),
    )


def _seconds(read: Reader, folder: Path) -> float:
    begun_s = perf_counter()
    held = read(folder)
    seconds = perf_counter() - begun_s
    del held
    return seconds


def _plain(folder: Path, memory: torch.Tensor) -> float:
    """Read the whole file into memory that is in use already, with all threads."""
    with WeightReader(folder, [FILE], CPU) as reader:
        descriptor = next(iter(reader._places.values())).descriptor
        begun_s = perf_counter()
        reader._fill(descriptor, 0, _bytes_at(memory))
        return perf_counter() - begun_s


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lifecycle.read", description=__doc__)
    parser.add_argument("--model", default="minilm", help="of benchmarks.lib.folders, or a folder")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-save", dest="results", action="store_const", const=None, default=RESULTS)
    asked = parser.parse_args()
    publish(run(asked.model, asked.rounds), asked.results)


if __name__ == "__main__":
    main()
