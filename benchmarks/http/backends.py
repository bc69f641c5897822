"""Measures the same load on hosts in the server's process, in worker processes, and on Ray.

    python -m benchmarks.http.backends

Two hosts each for `process` and `ray`, and a model that may be on both; `local` has one with all cores. The Ray
cluster is one node on this machine, started for the measurement and ended after it. `benchmarks.http.loop_lag loading`
measures the lag of the router's event loop with each.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil
from msgspec import Struct

from benchmarks.lib import workloads
from benchmarks.lib.folders import resolve
from benchmarks.lib.machine import ROOT, Watch, warn_if_busy
from benchmarks.lib.measure import with_progress
from benchmarks.lib.report import Report, add_save_option, publish
from benchmarks.lib.servers import Server, own, serving, write_registry
from benchmarks.lib.worker import PEER_SCRIPTS
from router import loadgen as load
from router.backends.ray.environment import VARIABLES
from router.loadgen.http_client import Request, Target, encode

MODEL = "m"
NAMES = ("local", "process", "ray")
HOSTS = 2
CLIENTS = (1, 32)
RAY_PORT = 26379


class Found(Struct, frozen=True, kw_only=True):
    """One backend, in seconds and bytes. `start_s`: up to the first answer; `cold_s`: of a request that loads."""

    start_s: float
    cold_s: float
    memory_bytes: int
    texts_per_s: dict[int, float]
    latencies_s: dict[int, tuple[float, float]]
    failed: int
    call: dict[str, float]


def variables(name: str) -> dict[str, str]:
    """Return the settings of a backend."""
    ray = {"RAY_ADDRESS": f"127.0.0.1:{RAY_PORT}", "PYTHONWARNINGS": "ignore"} if name == "ray" else {}
    return {"BACKEND": name, "CPU_HOSTS": str(HOSTS), "MEMORY_BUDGET": "3GiB", **ray}


def registry_of(folder: Path, path: Path) -> Path:
    """Return a registry with the model, which may be on both hosts when it is busy."""
    write_registry(path, {MODEL: folder})
    path.write_text(path.read_text() + f"    replicas: {HOSTS}\n")
    return path


@contextmanager
def around(name: str, registry: Path, *, deploys: bool = True) -> Iterator[list[int]]:
    """Run what the backend needs beside the server: for Ray a cluster with deployed hosts; yield its process ids."""
    if name != "ray":
        yield []
        return
    environ = os.environ | VARIABLES | variables("ray") | {"REGISTRY": str(registry), "PYTHONPATH": str(ROOT)}
    program = str(Path(sys.executable).with_name("ray"))
    start = [program, "start", "--head", "--port", str(RAY_PORT), "--num-cpus", "2", "--include-dashboard", "false"]
    head = subprocess.Popen([*start, "--block", "--disable-usage-stats"], env=environ, stdout=subprocess.DEVNULL)
    try:
        deploy = [sys.executable, "-W", "ignore", "-m", "router", "ray", "deploy", "--hosts", str(HOSTS), "--cpus", "1"]
        _until_ok(deploy if deploys else [program, "status", "--address", f"127.0.0.1:{RAY_PORT}"], environ)
        yield [head.pid]
    finally:
        head.terminate()
        head.wait(60)


def _until_ok(command: Sequence[str], environ: dict[str, str]) -> None:
    """Run the command until it succeeds: a cluster takes some seconds to start."""
    for _ in range(30):
        done = subprocess.run(command, env=environ, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return
        time.sleep(1.0)
    raise RuntimeError(done.stderr[-2000:])


def measure(name: str, folder: Path, seconds: float, num_calls: int) -> Found:
    """Measure one backend with each number of clients."""
    call = call_cost(name, num_calls)
    with tempfile.TemporaryDirectory() as draft:
        registry = registry_of(folder, Path(draft) / "registry.yaml")
        began_s = time.perf_counter()
        with around(name, registry) as beside, serving(own(registry, MODEL, **variables(name))) as server:
            start_s = time.perf_counter() - began_s
            requests = make_requests(server.target, folder)
            under_load(server.target, requests, 8, 3.0)  # until the second copy is loaded
            outcomes = {clients: under_load(server.target, requests, clients, seconds) for clients in CLIENTS}
            memory = memory_bytes([server.pid, *beside])
            cold_s = cold(server)
    return Found(
        start_s=start_s,
        cold_s=cold_s,
        memory_bytes=memory,
        texts_per_s={clients: outcome.texts_per_s for clients, outcome in outcomes.items()},
        latencies_s={c: (outcome.latency_s(0.5), outcome.latency_s(0.95)) for c, outcome in outcomes.items()},
        failed=sum(outcome.num_failed for outcome in outcomes.values()),
        call=call,
    )


def under_load(target: Target, requests: Sequence[Request], clients: int, seconds: float) -> load.Outcome:
    """Send requests from `clients` clients for `seconds`."""
    return load.run(lambda: load.closed(target, requests, clients, until=load.after_s(seconds)))


def call_cost(name: str, num_calls: int) -> dict[str, float]:
    """Run `peers/call_cost.py` and return its figures."""
    command = [sys.executable, "-W", "ignore", str(PEER_SCRIPTS / "call_cost.py"), name, str(num_calls)]
    with around_calls(name) as environ:
        done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


@contextmanager
def around_calls(name: str) -> Iterator[dict[str, str]]:
    """Start a cluster without hosts; the script deploys its own."""
    environ = os.environ | variables(name) | {"PYTHONPATH": str(ROOT)}
    if name != "ray":
        yield environ
        return
    with tempfile.TemporaryDirectory() as draft:
        registry = Path(draft) / "registry.yaml"
        registry.write_text("version: 1\nmodels: []\n")
        with around(name, registry, deploys=False):
            yield environ


def make_requests(target: Target, folder: Path) -> list[Request]:
    """Make requests of eight short texts each."""
    texts = workloads.make("short", 512, workloads.counter(folder)).texts
    return [encode(target, texts[at : at + 8]) for at in range(0, 512, 8)]


def memory_bytes(pids: Sequence[int]) -> int:
    """Return the memory of these processes and their descendants; shared pages count once."""
    found = {one for pid in pids for one in (psutil.Process(pid), *psutil.Process(pid).children(recursive=True))}
    return sum(process.memory_full_info().pss for process in found)


def cold(server: Server) -> float:
    """Evict the model, request it, and return the seconds to the answer."""
    host, port = server.target.address
    subprocess.run(
        ["curl", "-sf", "-X", "POST", f"http://{host}:{port}/admin/models/{server.target.model}/evict"],
        check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    one = [encode(server.target, ["How long does this take?"])]
    return load.run(lambda: load.closed(server.target, one, 1, until=load.after(1))).latency_s(0.5)


def run(folder: Path, names: Sequence[str], seconds: float, num_calls: int) -> Report:
    """Measure all backends, one after the other."""
    watch = Watch()
    warn_if_busy(watch.machine)
    found = {name: measure(name, folder, seconds, num_calls) for name in with_progress(names, "backend")}
    return Report(
        name="backends",
        title=f"The same load on three backends, {folder.name}, requests of 8 short texts",
        machine=watch.machine,
        settings={"model": folder.name, "seconds": seconds, "hosts": HOSTS, "calls": num_calls},
        header=(
            "backend", "texts/s, 1 client", "p50, p95 ms", "texts/s, 32 clients", "p50, p95 ms", "memory MiB",
            "start s", "cold request s", "a call, 1 text ms", "256 texts ms",
        ),
        rows=[_row(name, one) for name, one in found.items()],
        samples={name: one for name, one in found.items()},  # noqa: C416 - of its own type for the encoder
        notes=("a call: to a scripted host that answers at once, without HTTP; the difference to local is the cost",),
    )  # fmt: skip


def _row(name: str, found: Found) -> tuple[str, ...]:
    phases: list[str] = []
    for clients in CLIENTS:
        p50, p95 = found.latencies_s[clients]
        phases += [f"{found.texts_per_s[clients]:,.0f}", f"{1000 * p50:.1f}, {1000 * p95:.1f}"]
    return (
        name, *phases, f"{found.memory_bytes / 2**20:,.0f}", f"{found.start_s:.1f}", f"{found.cold_s:.2f}",
        f"{1000 * found.call['one_text_s']:.2f}", f"{1000 * found.call['many_texts_s']:.2f}",
    )  # fmt: skip


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.http.backends", description=__doc__)
    parser.add_argument("--model", default="minilm")
    parser.add_argument("--backends", default=",".join(NAMES))
    parser.add_argument("--seconds", type=float, default=15.0, help="of load, for each number of clients")
    parser.add_argument("--calls", type=int, default=1000)
    add_save_option(parser)
    asked = parser.parse_args()
    names = asked.backends.split(",")
    publish(run(resolve(asked.model), names, asked.seconds, asked.calls), asked.results)


if __name__ == "__main__":
    main()
