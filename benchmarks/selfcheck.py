"""`python -m benchmarks.selfcheck`: what the check at load adds to the load, which may be 20 % for a small model.

Loads and checks alternate as they do in a server, on one warm process. The first load of the process stands by itself:
it imports the model's architecture, and its check runs the reference, as there is no canary yet.
"""

import argparse
import asyncio
import sys
import time
from contextlib import closing
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch
from msgspec import Struct

from benchmarks.folders import resolve
from benchmarks.machine import Watch, usable_cores, warn_if_busy
from benchmarks.report import RESULTS, Report, publish
from engines.device.scheduler import DeviceScheduler
from engines.inputs.tokenizer_threads import TokenizerThreads
from engines.loading.loader import LoaderSettings, TorchLoader
from engines.spec import ModelSpec
from engines.types import ModelFiles

SHARE_LIMIT = 0.2


class Round(Struct, frozen=True):
    """One load, in seconds: building the engine, and its check and canary."""

    load_s: float
    check_s: float

    @property
    def share(self) -> float:
        return self.check_s / self.load_s


def measure(loader: TorchLoader, folder: Path) -> Round:
    """Load, check and free the model of a folder."""
    spec = ModelSpec(model_id="model", source=str(folder))
    begun_s = time.perf_counter()
    engine = loader.load(spec, ModelFiles(path=str(folder), revision="r", size_bytes=0))
    loaded_s = time.perf_counter()
    asyncio.run(engine.warm_up())
    checked_s = time.perf_counter()
    engine.close()
    return Round(loaded_s - begun_s, checked_s - loaded_s)


def run(model: str, rounds: int, cores: int) -> Report:
    """Measure a model of `benchmarks.folders`, or a folder."""
    watch, folder = Watch(), resolve(model)
    warn_if_busy(watch.machine)
    lane = DeviceScheduler("bench", lambda: torch.set_num_threads(cores))
    with TemporaryDirectory() as state, closing(TokenizerThreads(cores)) as threads:
        loader = TorchLoader("cpu", lane, threads, LoaderSettings(canary_folder=Path(state)))
        first, *rest = [measure(loader, folder) for _ in range(rounds + 1)]
    lane.close()
    share = median(one.share for one in rest)
    loads, checks = [one.load_s for one in rest], [one.check_s for one in rest]
    return Report(
        name=f"selfcheck-{folder.name}",
        title=f"What the self-check adds to the load of {folder.name}",
        machine=watch.machine,
        settings={"model": model, "rounds": rounds, "threads": cores},
        header=("what", "median s", "worst s"),
        rows=[
            ("load", f"{median(loads):.3f}", f"{max(loads):.3f}"),
            ("self-check and canary", f"{median(checks):.3f}", f"{max(checks):.3f}"),
            ("the process's very first load", f"{first.load_s:.3f}", f"{first.load_s:.3f}"),
            ("its self-check", f"{first.check_s:.3f}", f"{first.check_s:.3f}"),
        ],
        samples={"rounds": [first, *rest], "share": share},
        notes=(f"the check adds {share:.0%} to the load (median of rounds; wanted: at most {SHARE_LIMIT:.0%})",),
    )


def main() -> None:
    """Print the table; exit with 1 when the check takes more than its share."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.selfcheck", description=__doc__)
    parser.add_argument("--model", default="minilm")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=usable_cores(), help="of the forward pass")
    parser.add_argument("--no-save", dest="results", action="store_const", const=None, default=RESULTS)
    asked = parser.parse_args()
    report = run(asked.model, asked.rounds, asked.threads)
    publish(report, asked.results)
    if report.samples["share"] > SHARE_LIMIT:
        sys.exit(f"the self-check takes more than {SHARE_LIMIT:.0%} of the load")


if __name__ == "__main__":
    main()
