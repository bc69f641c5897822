"""Ways from a request for a model to its answer: ours by where the weights are, and those of other programs.

A sample begins when the request arrives and ends with its vector. Files are in the page cache, all programs compute in
float32, and each has answered once before, so that bytecode, tuning and the check's result are there already.

A proxy as llama-swap ends the process of one model and starts that of another: both are in the sample, and the new
process is asked every 20 ms, without the proxy's own time.
"""

import importlib.util
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from benchmarks.lib.folders import BENCH, prepare
from benchmarks.lib.peers import interpreter
from benchmarks.lib.servers import Plan, call, fastapi, infinity, own, serving, write_registry
from benchmarks.lib.worker import Worker, WorkerFailed
from router.loadgen.http_client import Target, vectors

TEXT = "The cat sits outside."
MODEL = "m"
_HOST_BUDGET = "8GiB"


class Answer(Struct, frozen=True):
    """Seconds from a request to its answer, and the vector, float32 `[D]`."""

    seconds: float
    vector: NDArray[np.float32]


Ask = Callable[[], Answer]
Open = Callable[[Path], AbstractContextManager[Mapping[str, Ask]]]
"""Prepares a model's folder; then each sample is one call, by the name of what it shows."""


class Way(Struct, frozen=True):
    """One program. `key`: on the command line."""

    key: str
    open: Open


@contextmanager
def embedyard(folder: Path) -> Iterator[Mapping[str, Ask]]:
    """Serve a copy of the folder, whose model is ready, parked while its files are away, or not in memory."""
    prepare(BENCH)
    with TemporaryDirectory(dir=BENCH) as draft:
        served = Path(draft) / "model"
        shutil.copytree(folder, served, copy_function=_link)
        registry = write_registry(Path(draft) / "registry.yaml", {MODEL: served})
        with serving(own(registry, MODEL, DEVICE="cpu", HOST_MEMORY_BUDGET=_HOST_BUDGET)) as server:
            yield {
                "Embedyard, ready": partial(_ask, server.target),
                "Embedyard, parked": partial(_from_host, server.target, served),
                "Embedyard, page cache": partial(_from_disk, server.target),
            }


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copy2(source, target)


def _ask(target: Target) -> Answer:
    begun_s = perf_counter()
    (vector,) = vectors(target, [TEXT])
    return Answer(perf_counter() - begun_s, vector)


def _from_host(target: Target, served: Path) -> Answer:
    """Ask a parked model without its files, and put them back."""
    _evict(target, to="host", expected="parked")
    away = served.rename(served.with_name("away"))
    try:
        return _ask(target)
    finally:
        away.rename(served)


def _from_disk(target: Target) -> Answer:
    _evict(target, to="disk", expected="cold")
    return _ask(target)


def _evict(target: Target, *, to: str, expected: str) -> None:
    """Take the model from its device.

    Raises:
        OSError: it is not where it was sent.
    """
    state = json.loads(call(target, "POST", f"/admin/models/{MODEL}/evict", {"to": to}).body)["state"]
    if state != expected:
        raise OSError(f"the model is {state} and not {expected} after its eviction to {to}")


@contextmanager
def warm_process(folder: Path) -> Iterator[Mapping[str, Ask]]:
    """Load with sentence-transformers in a process that has imported it."""
    _need_sentence_transformers()
    with _loader(folder) as worker:
        worker.wait_until_warm()
        yield {"sentence-transformers, imported": partial(_load, worker)}


@contextmanager
def new_process(folder: Path) -> Iterator[Mapping[str, Ask]]:
    """Start Python, import sentence-transformers and load with it."""
    _need_sentence_transformers()

    def ask() -> Answer:
        begun_s = perf_counter()
        with _loader(folder) as worker:
            worker.wait_until_warm()
            vector = _load(worker).vector
            return Answer(perf_counter() - begun_s, vector)

    yield {"sentence-transformers, new process": ask}


def _need_sentence_transformers() -> None:
    if importlib.util.find_spec("sentence_transformers") is None:
        raise WorkerFailed("sentence-transformers is not installed: make install-bench")


def _loader(folder: Path) -> Worker:
    return Worker("sentence-transformers", "load.py", [str(folder)], python=interpreter(None))


def _load(worker: Worker) -> Answer:
    found = worker.ask(text=TEXT)
    return Answer(found["seconds"], np.asarray(found["vector"], dtype=np.float32))


@contextmanager
def replaced(name: str, plan: Plan) -> Iterator[Mapping[str, Ask]]:
    """End the server of one model and start that of the next one, which answers as soon as it can."""
    with ExitStack() as running:

        def ask() -> Answer:
            found: list[NDArray[np.float32]] = []
            begun_s = perf_counter()
            running.close()
            running.enter_context(serving(plan, first=lambda target: found.extend(vectors(target, [TEXT]))))
            return Answer(perf_counter() - begun_s, found[0])

        yield {f"{name}, process swapped": ask}


@contextmanager
def own_process(folder: Path) -> Iterator[Mapping[str, Ask]]:
    """Swap servers of ours that know what earlier ones have found out."""
    with TemporaryDirectory() as draft:
        registry = write_registry(Path(draft) / "registry.yaml", {MODEL: folder})
        with replaced("Embedyard", own(registry, MODEL, DEVICE="cpu", STATE_DIR=draft)) as asks:
            yield asks


WAYS = (
    Way("embedyard", embedyard),
    Way("sentence-transformers", warm_process),
    Way("sentence-transformers-process", new_process),
    Way("embedyard-process", own_process),
    Way("fastapi-process", lambda folder: replaced("FastAPI + sentence-transformers", fastapi(folder))),
    # What it warms up with before it listens, 32 texts of 512 tokens twice, takes a large model minutes here.
    Way("infinity-process", lambda folder: replaced("Infinity (torch)", infinity(folder, "torch", warms_up=False))),
)
"""Ours first."""
