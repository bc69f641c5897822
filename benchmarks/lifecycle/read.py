"""Measures how long it takes to read a model's weights from the page cache into main memory, beside other readers.

    python -m benchmarks.lifecycle.read [--model minilm] [--rounds 5]

`bytes`: all threads read the file into memory that is mapped already, the bound for every reader. `safetensors`: its
`load_file`, which maps the file, or reads it (`pread`); mapped weights cost nothing before they are used.
fastsafetensors and the Run:ai model streamer take part where `python -m benchmarks.lib.peers` has installed them, each
in a process of its own; `copied`: every tensor in memory of its own at the end, as ours are.
"""

import argparse
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks.lib.folders import resolve
from benchmarks.lib.machine import Watch, warn_if_busy
from benchmarks.lib.measure import Run, interleave
from benchmarks.lib.peers import interpreter, is_installed
from benchmarks.lib.report import Report, add_save_option, publish
from benchmarks.lib.worker import Worker, WorkerFailed
from engines.affinity import num_usable_cores
from engines.loading.weight_reader import WeightReader, _bytes_at

FILE = "model.safetensors"
CPU = torch.device("cpu")

Reader = Callable[[Path], object]


def _own(folder: Path) -> object:
    with WeightReader(folder, [FILE], CPU) as reader:
        return {name: stored.to() for name, stored in reader.tensors().items()}


READERS: dict[str, Reader] = {
    "ours": _own,
    "safetensors, mapped": lambda folder: load_file(folder / FILE),
    "safetensors, pread": lambda folder: load_file(folder / FILE, backend="pread"),
}
PEERS = {
    "fastsafetensors": "fastsafetensors", "fastsafetensors, copied": "fastsafetensors-copied",
    "Run:ai streamer": "runai", "Run:ai streamer, copied": "runai-copied",
}  # fmt: skip
"""Kinds of `benchmarks/peers/readers.py`."""

ENVIRONMENT = "readers"


def run(model: str, rounds: int, peers: Sequence[str] = tuple(PEERS)) -> Report:
    """Measure our reader, and those of these peers that are installed."""
    watch, folder = Watch(), resolve(model)
    warn_if_busy(watch.machine)
    size = (folder / FILE).stat().st_size
    runs: dict[str, Run] = {name: partial(_seconds, read, folder) for name, read in READERS.items()}
    mapped = torch.zeros(size, dtype=torch.uint8)
    with open_readers(folder / FILE, peers) as (workers, notes):
        runs |= {worker.name: partial(_asked, worker) for worker in workers}
        samples = interleave({"bytes": lambda: _plain(folder, mapped), **runs}, rounds, is_warm=False)
    base_s = median(samples["bytes"])
    return Report(
        name=f"read-{folder.name}",
        title=f"Seconds to read the weights of {folder.name} from the page cache",
        machine=watch.machine,
        settings={"model": model, "rounds": rounds, "threads": num_usable_cores()},
        header=("reader", "median s", "worst s", "over bytes"),
        rows=[
            (name, f"{median(found):.3f}", f"{max(found):.3f}", f"{median(found) / base_s:.2f}")
            for name, found in samples.items()
        ],
        samples=dict(samples),
        notes=(f"{size / 1e6:,.0f} MB; mapped weights are read when they are used, which is not counted", *notes),
    )


@contextmanager
def open_readers(file: Path, peers: Sequence[str]) -> Iterator[tuple[list[Worker], list[str]]]:
    """Start the peers whose tensors are those of the file, each in its process; and a note for each other one."""
    with ExitStack() as stack:
        workers, notes = [], []
        wanted = checksum(file) if peers and is_installed(ENVIRONMENT) else 0
        for name in peers:
            try:
                workers.append(stack.enter_context(_reader(name, file, wanted)))
            except WorkerFailed as error:
                notes.append(f"left out: {str(error).splitlines()[0]}")
                print(error, file=sys.stderr, flush=True)
        yield workers, notes


def _reader(name: str, file: Path, wanted: int) -> Worker:
    """Start a peer and compare what it reads.

    Raises:
        WorkerFailed: it is not installed, does not run here, or reads other bytes.
    """
    if not is_installed(ENVIRONMENT):
        raise WorkerFailed(f"{name} is not installed: python -m benchmarks.lib.peers")
    worker = Worker(name, "readers.py", [PEERS[name], str(file)], python=interpreter(ENVIRONMENT))
    try:
        found = worker.wait_until_warm().ask(check=True)["checksum"]
        if found != wanted:
            raise WorkerFailed(f"{name} reads other bytes than safetensors does")
    except BaseException:
        worker.close()
        raise
    return worker


def _asked(worker: Worker) -> float:
    return float(worker.ask(check=False)["seconds"])


def checksum(file: Path) -> int:
    """Return the CRC of all tensors' bytes in the order of their names, as `readers.py` does."""
    total = 0
    for _, tensor in sorted(load_file(file).items()):
        content: Any = tensor.view(-1).view(torch.uint8).numpy()
        total = zlib.crc32(content, total)
    return total


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
    parser.add_argument("--peers", nargs="*", default=list(PEERS), choices=list(PEERS))
    add_save_option(parser)
    asked = parser.parse_args()
    publish(run(asked.model, asked.rounds, asked.peers), asked.results)


if __name__ == "__main__":
    main()
