"""`python -m benchmarks.cold_start`: the files are on disk, the server is warm, the model is not in memory.

Each round evicts the model and sends one request: the time to its answer, and how much of it was loading, as the
server's own `Server-Timing` says. The first round is the process's first load of any model, and stands by itself.
"""

import argparse
import http.client
import json
import re
import tempfile
import time
from pathlib import Path
from statistics import median

from msgspec import Struct

from benchmarks.folders import resolve
from benchmarks.machine import Machine, Watch, warn_if_busy
from benchmarks.report import RESULTS, Report, publish
from benchmarks.servers import Server, own, serving, write_registry
from router.loadgen.http_client import Target

MODEL = "cold"
_LOAD = re.compile(r"\bload;dur=([0-9.]+)")


class Round(Struct, frozen=True):
    """One cold request, and one warm one right after it, in seconds."""

    cold_s: float
    load_s: float
    warm_s: float


def ready(target: Target) -> None:
    """Whether the server takes work, with no model loaded.

    Raises:
        OSError: not yet.
    """
    _call(target, "GET", "/ready")


def measure(target: Target) -> Round:
    """Ask the absent model, then the present one, then evict it."""
    cold_s, timing = _embed(target)
    warm_s, _ = _embed(target)
    _call(target, "POST", f"/admin/models/{MODEL}/evict")
    load = _LOAD.search(timing)
    return Round(cold_s, float(load[1]) / 1000 if load else 0.0, warm_s)


def run(folder: Path, rounds: int) -> Report:
    """Measure a model folder on a server with default settings."""
    watch = Watch()
    warn_if_busy(watch.machine)
    with tempfile.TemporaryDirectory() as draft:
        registry = write_registry(Path(draft) / "registry.yaml", {MODEL: folder}, preload=False)
        with serving(own(registry, MODEL), first=ready) as server:
            found = [measure(server.target) for _ in range(rounds + 1)]
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
    """One text: seconds to the whole answer, and the Server-Timing header."""
    started_s = time.perf_counter()
    headers = _call(target, "POST", "/v1/embeddings", {"model": MODEL, "input": "How long does this take?"})
    return time.perf_counter() - started_s, headers.get("server-timing", "")


def _call(target: Target, method: str, path: str, body: object = None) -> http.client.HTTPMessage:
    """The answer's headers.

    Raises:
        OSError: no connection, or not a 200.
    """
    connection = http.client.HTTPConnection(*target.address, timeout=120)
    try:
        content = None if body is None else json.dumps(body).encode()
        connection.request(method, path, content, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        text = answer.read()
    finally:
        connection.close()
    if answer.status != 200:
        raise OSError(f"{method} {path} answered {answer.status}: {text[:300].decode(errors='replace')}")
    return answer.headers


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cold_start", description=__doc__)
    parser.add_argument("--model", default="minilm")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--no-save", dest="results", action="store_const", const=None, default=RESULTS)
    asked = parser.parse_args()
    publish(run(resolve(asked.model), asked.rounds), asked.results)


if __name__ == "__main__":
    main()
