"""Measures the time to a cold model's first answer (`request`) and of the check at load (`selfcheck`).

    python -m benchmarks.lifecycle.cold_start request
    python -m benchmarks.lifecycle.cold_start selfcheck

`request`: files on disk, server up; each round evicts the model and sends one request: the time to its answer, and how
much of it was loading, from the server's `Server-Timing`. The first round is the process's first load of any model,
and is reported separately.
`selfcheck`: what the check adds to the load, which may be 20 % for a small model. Loads and checks alternate on one
warm process. The first load imports the model's architecture, and its check runs the reference, as there is no canary.
"""

import argparse
import asyncio
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch
from msgspec import Struct

from benchmarks.lib.folders import resolve
from benchmarks.lib.machine import Machine, Watch, warn_if_busy
from benchmarks.lib.measure import with_progress
from benchmarks.lib.report import Report, add_save_option, publish, run_command
from benchmarks.lib.servers import Server, call, own, serving, write_registry
from engines.affinity import num_usable_cores
from engines.device.scheduler import DeviceScheduler
from engines.inputs.tokenizer_threads import TokenizerThreads
from engines.loading.loader import LoaderSettings, TorchLoader
from engines.spec import ModelSpec
from engines.types import ModelFiles
from router.loadgen.http_client import Target

MODEL = "cold"
_LOAD = re.compile(r"\bload;dur=([0-9.]+)")


class Round(Struct, frozen=True):
    """Seconds of one cold request, and of a warm one directly after it."""

    cold_s: float
    load_s: float
    warm_s: float


def ready(target: Target) -> None:
    """Check that the server is ready, with no model loaded.

    Raises:
        OSError: not yet.
    """
    call(target, "GET", "/ready")


def measure_request(target: Target) -> Round:
    """Request the absent model, then request it again once it is loaded, then evict it."""
    cold_s, timing = _embed(target)
    warm_s, _ = _embed(target)
    call(target, "POST", f"/admin/models/{MODEL}/evict")
    load = _LOAD.search(timing)
    return Round(cold_s, float(load[1]) / 1000 if load else 0.0, warm_s)


def run_request(folder: Path, rounds: int) -> Report:
    """Measure a model folder on a server with default settings."""
    watch = Watch()
    warn_if_busy(watch.machine)
    with tempfile.TemporaryDirectory() as draft:
        registry = write_registry(Path(draft) / "registry.yaml", {MODEL: folder}, preload=False)
        with serving(own(registry, MODEL), first=ready) as server:
            found = [measure_request(server.target) for _ in with_progress(range(rounds + 1), "round")]
            machine = watch.machine
    return _report(folder, server, found, machine)


def _report(folder: Path, server: Server, found: list[Round], machine: Machine) -> Report:
    first, rest = found[0], found[1:]
    cold, load, warm = ([getattr(one, name) for one in rest] for name in ("cold_s", "load_s", "warm_s"))
    return Report(
        name=f"cold-start-{folder.name}",
        title=f"Cold start, {folder.name}, files on disk, server warm",
        machine=machine,
        settings={"model": folder.name, "rounds": len(rest)},
        header=("what", "median s", "worst s"),
        rows=[
            ("request to answer, model absent", f"{median(cold):.3f}", f"{max(cold):.3f}"),
            ("  of it waiting for the load", f"{median(load):.3f}", f"{max(load):.3f}"),
            ("request to answer, model ready", f"{median(warm):.3f}", f"{max(warm):.3f}"),
            ("the process's very first load", f"{first.cold_s:.3f}", f"{first.cold_s:.3f}"),
            ("process start to /ready", f"{server.start_s:.3f}", f"{server.start_s:.3f}"),
        ],
        samples={"first": first, "rounds": rest, "start_s": server.start_s},
    )


def _embed(target: Target) -> tuple[float, str]:
    """Embed one text; return the seconds to the whole answer, and the Server-Timing header."""
    started_s = time.perf_counter()
    reply = call(target, "POST", "/v1/embeddings", {"model": MODEL, "input": "How long does this take?"})
    return time.perf_counter() - started_s, reply.headers.get("server-timing", "")


def main_request(argv: Sequence[str]) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lifecycle.cold_start request", description=__doc__)
    parser.add_argument("--model", default="minilm")
    parser.add_argument("--rounds", type=int, default=10)
    add_save_option(parser)
    asked = parser.parse_args(argv)
    publish(run_request(resolve(asked.model), asked.rounds), asked.results)


SHARE_LIMIT = 0.2


class CheckedLoad(Struct, frozen=True):
    """Seconds of one load: building the engine, and its check and canary."""

    load_s: float
    check_s: float

    @property
    def share(self) -> float:
        return self.check_s / self.load_s


def measure_selfcheck(loader: TorchLoader, folder: Path) -> CheckedLoad:
    """Load, check and free the model of a folder."""
    spec = ModelSpec(model_id="model", source=str(folder))
    begun_s = time.perf_counter()
    engine = loader.load(spec, ModelFiles(path=str(folder), revision="r", size_bytes=0))
    loaded_s = time.perf_counter()
    asyncio.run(engine.warm_up())
    checked_s = time.perf_counter()
    engine.close()
    return CheckedLoad(loaded_s - begun_s, checked_s - loaded_s)


def run_selfcheck(model: str, rounds: int, cores: int) -> Report:
    """Measure a model of `benchmarks.lib.folders`, or a folder."""
    watch, folder = Watch(), resolve(model)
    warn_if_busy(watch.machine)
    scheduler = DeviceScheduler("bench", lambda: torch.set_num_threads(cores))
    with TemporaryDirectory() as state, closing(TokenizerThreads(cores)) as threads:
        loader = TorchLoader("cpu", scheduler, threads, LoaderSettings(canary_folder=Path(state)))
        first, *rest = [measure_selfcheck(loader, folder) for _ in with_progress(range(rounds + 1), "round")]
    scheduler.close()
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


def main_selfcheck(argv: Sequence[str]) -> None:
    """Print the table; exit with 1 when the check takes more than its share."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lifecycle.cold_start selfcheck", description=__doc__)
    parser.add_argument("--model", default="minilm")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=num_usable_cores(), help="of the forward pass")
    add_save_option(parser)
    asked = parser.parse_args(argv)
    report = run_selfcheck(asked.model, asked.rounds, asked.threads)
    publish(report, asked.results)
    if report.samples["share"] > SHARE_LIMIT:
        sys.exit(f"the self-check takes more than {SHARE_LIMIT:.0%} of the load")


def main() -> None:
    """Run the requested command."""
    run_command({"request": main_request, "selfcheck": main_selfcheck})


if __name__ == "__main__":
    main()
