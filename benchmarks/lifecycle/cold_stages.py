"""Measures where the time of a cold load goes, from a request to its answer, with the files in the page cache.

    python -m benchmarks.lifecycle.cold_stages [--model minilm] [--rounds 5] [--threads N]
        [--kind first|restart|again]

The engine is built in the process, again and again from the same folder. `again`: as a server does that evicts a model
and loads it once more. `restart`: as one that has been restarted meanwhile, with what earlier loads have kept on disk
(`engines/models/load_records.py`, `engines/loading/recorded_tokenizer.py`, the canary). `first`: without that. Stages
on several threads overlap, and some contain others; each line is the median of its begin and of its seconds.
"""

import argparse
import asyncio
import importlib
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from functools import wraps
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, Literal, get_args
from unittest.mock import patch

import torch
from msgspec import Struct

from benchmarks.lib import unigram_folder
from benchmarks.lib.folders import resolve
from benchmarks.lib.machine import Watch, warn_if_busy
from benchmarks.lib.report import Report, add_save_option, publish
from benchmarks.lifecycle.read import FILE, _plain
from engines.device import torch_runtime
from engines.device.memory import device_memory
from engines.device.scheduler import DeviceScheduler
from engines.hub.content_digests import ContentDigests
from engines.inputs.tokenizer_threads import TokenizerThreads
from engines.loading.builders import Knowledge
from engines.loading.loader import LoaderSettings, TorchLoader
from engines.loading.recorded_tokenizer import BUILT_SHARE, TokenizerRecords
from engines.models.load_records import LoadRecords
from engines.spec import ModelSpec
from engines.types import EmbedCall, ModelFiles

_LOADING, _MODELS = "engines.loading", "engines.models"

STAGES: Mapping[str, str] = {
    "read the configuration": f"{_LOADING}.builders:read_config",
    "compare config.json with the files": f"{_LOADING}.builders:check_proportions",
    "  read headers": f"{_LOADING}.weight_reader:WeightReader.__init__",
    "  begin to read ahead": f"{_LOADING}.weight_reader:WeightReader.read_ahead",
    "  read bytes (threads)": f"{_LOADING}.weight_reader:_Part.read",
    "build the model and put weights in place": f"{_LOADING}.builders:load_weights",
    "  hash the tokenizer's files (thread)": f"{_LOADING}.recorded_tokenizer:_key",
    "  build the tokenizer (thread)": f"{_LOADING}.recorded_tokenizer:_compose",
    "observe a pass": f"{_MODELS}.load_records:observe",
    "build the tokenizer by transformers": f"{_LOADING}.tokenizer:load_theirs",
    "keep the tokenizer": f"{_LOADING}.recorded_tokenizer:RecordedTokenizer._keep",
    "wait for the tokenizer": f"{_LOADING}.recorded_tokenizer:RecordedTokenizer.reference",
    "fuse layers": f"{_MODELS}.transformer:fuse",
    "replace products": f"{_MODELS}.transformer:replace_products",
    "prepack weights": f"{_MODELS}.prepacked:PrepackedWeights.make",
    "check": f"{_MODELS}.self_check:SelfCheck.run",
    "wait for hashes of the files": "engines.batching.spaces:ModelSpaces.settled_within",
}
"""Stages by name: a module, and a function or method in it. Those that begin with a space are part of another one."""


Kind = Literal["first", "restart", "again"]


class Span(Struct, frozen=True):
    """One call of a stage: seconds since the request, and how long it took."""

    stage: str
    begun_s: float
    seconds: float


class Round(Struct, frozen=True):
    """One load. `load_s`, `check_s` and `answer_s` follow one another."""

    load_s: float
    check_s: float
    answer_s: float
    spans: tuple[Span, ...]

    @property
    def total_s(self) -> float:
        return self.load_s + self.check_s + self.answer_s

    def begun_s(self, stage: str) -> float | None:
        """Return when a stage began; None where it did not run."""
        return min((span.begun_s for span in self.spans if span.stage == stage), default=None)

    def seconds(self, stage: str) -> float:
        """Return the seconds from a stage's first begin to its last end."""
        own = [span for span in self.spans if span.stage == stage]
        return max(span.begun_s + span.seconds for span in own) - min(span.begun_s for span in own)


class Spans:
    """Collects calls of stages, on any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._begun_s = 0.0
        self.found: list[Span] = []

    def begin(self) -> None:
        """Forget what was found, and count from now."""
        self.found, self._begun_s = [], time.perf_counter()

    def add(self, stage: str, begun_s: float) -> None:
        """Add a call that ends now."""
        with self._lock:
            self.found.append(Span(stage, begun_s - self._begun_s, time.perf_counter() - begun_s))


@contextmanager
def watching(spans: Spans) -> Iterator[None]:
    """Time every call of a stage inside the block."""
    with ExitStack() as stack:
        for stage, place in STAGES.items():
            module, _, name = place.partition(":")
            owner: Any = importlib.import_module(module)
            *parents, last = name.split(".")
            for parent in parents:
                owner = getattr(owner, parent)
            stack.enter_context(patch.object(owner, last, _timed(getattr(owner, last), stage, spans)))
        yield


def _timed(function: Callable[..., Any], stage: str, spans: Spans) -> Callable[..., Any]:
    @wraps(function)
    def timed(*args: Any, **options: Any) -> Any:
        begun_s = time.perf_counter()
        try:
            return function(*args, **options)
        finally:
            spans.add(stage, begun_s)

    @wraps(function)
    async def awaited(*args: Any, **options: Any) -> Any:
        begun_s = time.perf_counter()
        try:
            return await function(*args, **options)
        finally:
            spans.add(stage, begun_s)

    return awaited if asyncio.iscoroutinefunction(function) else timed


async def measure(loader: TorchLoader, folder: Path, spans: Spans) -> Round:
    """Load a model, and use it once."""
    spans.begin()
    begun_s = time.perf_counter()
    spec = ModelSpec(model_id="m", source=str(folder))
    engine = await asyncio.to_thread(loader.load, spec, ModelFiles(path=str(folder), revision="r", size_bytes=0))
    loaded_s = time.perf_counter()
    await engine.warm_up()
    checked_s = time.perf_counter()
    await engine.run(EmbedCall(model_id="m", texts=("The cat sits outside.",)))
    answered_s = time.perf_counter()
    await asyncio.to_thread(engine.close)
    return Round(loaded_s - begun_s, checked_s - loaded_s, answered_s - checked_s, tuple(spans.found))


def run(model: str, rounds: int, threads: int, kind: Kind) -> Report:
    """Measure a model; a round before the first one is not counted."""
    folder = unigram_folder.build() if model == unigram_folder.NAME else resolve(model)
    watch, spans = Watch(), Spans()
    warn_if_busy(watch.machine)
    scheduler = DeviceScheduler(
        "bench", torch_runtime.prepare, num_threads=threads, use_cores=torch_runtime.set_threads
    )
    found: list[Round] = []
    with TemporaryDirectory() as state, closing(TokenizerThreads(threads)) as tokenizers, watching(spans):
        for _ in range(rounds + 1):
            if kind == "first":
                shutil.rmtree(state)
            if kind != "again" or not found:
                loader = TorchLoader("cpu", scheduler, tokenizers, settings_of(Path(state)))
            found.append(asyncio.run(measure(loader, folder, spans)))
    scheduler.close()
    mapped = torch.zeros((folder / FILE).stat().st_size, dtype=torch.uint8)
    bytes_s = median(_plain(folder, mapped) for _ in range(3))
    return Report(
        name=f"cold-stages-{folder.name}-{kind}",
        title=f"Stages of a load of {folder.name} ({kind})",
        machine=watch.machine,
        settings={"model": model, "rounds": rounds, "threads": threads, "kind": kind},
        header=("stage", "begins at", "takes"),
        rows=list(_rows(found[1:], bytes_s)),
        samples={"rounds": found[1:], "bytes_s": bytes_s},
        notes=("medians; stages overlap, and indented ones are part of others or run beside them",),
    )


def settings_of(state: Path) -> LoaderSettings:
    """Return the settings of a server that keeps its state in a folder, without trials of batch sizes."""
    max_bytes = device_memory("cpu").read().total_bytes // BUILT_SHARE
    knowledge = Knowledge(LoadRecords(state), TokenizerRecords(state / "tokenizers", max_bytes))
    return LoaderSettings(canary_folder=state / "canaries", knowledge=knowledge, content_digests=ContentDigests(state))


def _rows(found: Sequence[Round], bytes_s: float) -> Iterator[tuple[str, str, str]]:
    for stage in STAGES:
        begins = [begun_s for each in found if (begun_s := each.begun_s(stage)) is not None]
        if len(begins) == len(found):
            yield stage, f"{median(begins):.3f}", f"{median(each.seconds(stage) for each in found):.3f}"
    for name in ("load_s", "check_s", "answer_s", "total_s"):
        yield f"{name.removesuffix('_s')}, whole", "", f"{median(getattr(each, name) for each in found):.3f}"
    yield "bytes alone, into memory in use", "", f"{bytes_s:.3f}"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lifecycle.cold_stages", description=__doc__)
    parser.add_argument("--model", default="minilm", help="of benchmarks.lib.folders, xlmr-large-unigram, or a folder")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the forward pass")
    parser.add_argument("--kind", choices=get_args(Kind), default="again", help="what earlier loads have left")
    add_save_option(parser)
    asked = parser.parse_args()
    publish(run(asked.model, asked.rounds, asked.threads, asked.kind), asked.results)


if __name__ == "__main__":
    main()
