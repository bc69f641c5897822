"""Starts the server as a process on the device: with worker processes, and for the latency of a single text."""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.gpu.folders import BASE, folder_of
from benchmarks.gpu.rig import Rig
from benchmarks.gpu.runner import PartContext
from benchmarks.lib import servers, workloads
from benchmarks.lib.engine_kit import cosines
from benchmarks.lib.measure import percentile
from router import loadgen
from router.loadgen.http_client import encode, vectors

MODEL = "model"
LEAST_COSINE = {True: 0.999, False: 0.999999}
NUM_WARM_UPS, NUM_REQUESTS = 100, {"full": 1000, "small": 200}

_KEPT = ("LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES", "CUDA_HOME", "NVIDIA_VISIBLE_DEVICES", "OMP_NUM_THREADS")
"""Variables without which a process may find no GPU; servers under test are given no others of this shell."""

WITHOUT_GRAPHS = ("-m", "benchmarks.gpu.serve_without_graphs", "serve")


def process_backend(context: PartContext) -> None:
    """Start `BACKEND=process`, and compare its vectors with those of an engine in this process."""
    folder = folder_of(BASE[context.settings["size"]], context.device)
    texts = list(workloads.make("passages", 16, workloads.counter(folder)).texts)
    with _own(context, folder, BACKEND="process") as server:
        got = vectors(server.target, texts)
        start_s = server.start_s
    rig = Rig(context.device)
    engine = rig.load(folder, max_batch_tokens=2048)
    worst = float(cosines(got, rig.embed(engine, texts)).min())
    engine.close()
    rig.close()
    context.record(seconds_to_first_vector=start_s, worst_cosine=worst, ok=worst >= LEAST_COSINE[context.is_cuda])


def http_latency(context: PartContext) -> None:
    """Send single short texts over loopback, one after the other, to a server with and one without CUDA graphs."""
    folder = folder_of(BASE[context.settings["size"]], context.device)
    scripts: dict[str, Sequence[str]] = {"with graphs": ("-m", "router", "serve"), "without graphs": WITHOUT_GRAPHS}
    if not context.is_cuda:
        del scripts["with graphs"]
    for name, script in scripts.items():
        with _own(context, folder, script=script) as server:
            context.record(what=name, model=folder.name, start_s=server.start_s, **_latency(context, server, folder))


def _latency(context: PartContext, server: servers.Server, folder: Path) -> dict[str, Any]:
    num_requests = NUM_REQUESTS[context.settings["size"]]
    texts = workloads.make("short", num_requests, workloads.counter(folder)).texts
    requests = [encode(server.target, [text]) for text in texts]

    def send(count: int) -> loadgen.Outcome:
        return loadgen.run(lambda: loadgen.closed(server.target, requests, 1, until=loadgen.after(count)))

    send(NUM_WARM_UPS)
    outcome = send(num_requests)
    milliseconds = [1000 * sample.latency_s for sample in outcome.samples if sample.status == 200]
    return {
        "requests": len(outcome.samples), "failed": outcome.num_failed, "p50_ms": median(milliseconds),
        "p95_ms": percentile(milliseconds, 0.95), "p99_ms": percentile(milliseconds, 0.99),
        "ok": outcome.num_failed == 0,
    }  # fmt: skip


def _own(
    context: PartContext, folder: Path, *, script: Sequence[str] = ("-m", "router", "serve"), **settings: str
) -> Any:
    """Return a server of one folder on the device of this part."""
    draft = Path(tempfile.mkdtemp(prefix="gpu-registry-"))
    registry = servers.write_registry(draft / "registry.yaml", {MODEL: folder})
    kept = {name: os.environ[name] for name in _KEPT if name in os.environ}
    plan = servers.own(registry, MODEL, script=script, **kept, DEVICE=context.device, **settings)
    return servers.serving(plan)
