"""Compares hosts in the server's process with hosts in a process of their own, by the CPU time of each thread.

    python -m benchmarks.http.edges

Both servers are up at once and measured one at a time, round by round: single short texts, closed loops. CPU time of
a request is split into the server's event loop, the worker's event loop (`BACKEND=process`), and all other threads,
which run the model. Other programs on the machine change throughput, but hardly this.

What more cores and several server processes on one port (`SO_REUSEPORT`) could give follows from these times by the
bounds of operational analysis (Denning and Buzen, 1978): no more requests a second than cores over all CPU time of a
request, nor than server processes over the CPU time of a request on their event loop.
"""

import argparse
import math
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import psutil
from msgspec import Struct, structs

from benchmarks.http.backends import memory_bytes
from benchmarks.lib.folders import resolve
from benchmarks.lib.machine import Watch, warn_if_busy
from benchmarks.lib.measure import percentile, quotient
from benchmarks.lib.report import Report, add_save_option, publish
from benchmarks.lib.servers import Server, make_requests, own, serving, write_registry
from router import loadgen as load

MODEL = "minilm"
NAMES = ("local", "process")
CLIENTS = (1, 8, 32, 64, 256)
CORES = (2, 4, 8, 16, 32)


class Spent(Struct, frozen=True):
    """CPU seconds of a server: of its event loop's thread, of the workers' event loops, and of all other threads."""

    loop_s: float
    worker_s: float
    model_s: float

    def since(self, earlier: "Spent", num_requests: int) -> "Spent":
        """Return the time of one request of those since `earlier`."""
        return Spent(*((now - then) / num_requests for now, then in zip(_parts(self), _parts(earlier), strict=True)))

    @property
    def all_s(self) -> float:
        return self.loop_s + self.worker_s + self.model_s


def _parts(spent: Spent) -> tuple[float, ...]:
    return structs.astuple(spent)


def spent(pid: int) -> Spent:
    """Return the time of a server process and its descendants; an event loop runs on its process's first thread."""
    processes = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    first = [_thread_s(process.pid, process.pid) for process in processes]
    every = [_thread_s(process.pid, thread.id) for process in processes for thread in process.threads()]
    return Spent(first[0], sum(first[1:]), sum(every) - sum(first))


def _thread_s(pid: int, thread: int) -> float:
    """Return the time of a thread in nanoseconds' steps; 0 when it has ended. Linux only."""
    try:
        return int(Path(f"/proc/{pid}/task/{thread}/schedstat").read_text().split()[0]) / 1e9
    except FileNotFoundError:
        return 0.0


class Sample(Struct, frozen=True):
    """One closed loop."""

    texts_per_s: float
    latencies_s: list[float]
    spent: Spent


def measure(server: Server, folder: Path, clients: int, seconds: float) -> Sample:
    """Run one closed loop."""
    requests = make_requests(server.target, folder, "short", 1)
    before = spent(server.pid)
    outcome = load.run(lambda: load.closed(server.target, requests, clients, until=load.after_s(seconds)))
    used = spent(server.pid).since(before, max(1, len(outcome.samples)))
    return Sample(outcome.texts_per_s, [sample.latency_s for sample in outcome.samples], used)


def bound(spent: Spent, cores: int, num_servers: int) -> float:
    """Return the most requests a second on so many cores, with so many server processes."""
    return min(cores / spent.all_s, num_servers / spent.loop_s)


def servers_for(spent: Spent, cores: int) -> int:
    """Return the fewest server processes whose event loops do not bound the cores."""
    return math.ceil(cores * spent.loop_s / spent.all_s)


def _rates(found: dict[str, list[Sample]]) -> dict[str, list[float]]:
    return {name: [sample.texts_per_s for sample in samples] for name, samples in found.items()}


def _median(samples: Sequence[Sample]) -> Spent:
    return Spent(*(median(parts) for parts in zip(*(_parts(sample.spent) for sample in samples), strict=True)))


def _row(clients: int, found: dict[str, list[Sample]]) -> tuple[str, ...]:
    rates = _rates(found)
    p50 = [1000 * percentile([one for s in found[name] for one in s.latencies_s], 0.5) for name in NAMES]
    times = [" + ".join(f"{1000 * part:.2f}" for part in _parts(_median(found[name]))) for name in NAMES]
    return (
        str(clients),
        *(f"{median(rates[name]):,.0f}" for name in NAMES),
        str(quotient(rates["process"], rates["local"])),
        " / ".join(f"{one:.1f}" for one in p50),
        *times,
    )


def run(folder: Path, rounds: int, seconds: float) -> Report:
    """Measure a model folder."""
    watch = Watch()
    warn_if_busy(watch.machine)
    with tempfile.TemporaryDirectory() as draft:
        registry = write_registry(Path(draft) / "registry.yaml", {MODEL: folder})
        with (
            serving(own(registry, MODEL, BACKEND="local")) as local,
            serving(own(registry, MODEL, BACKEND="process")) as process,
        ):
            servers = dict(zip(NAMES, (local, process), strict=True))
            time.sleep(5.0)  # sizes of batches are tried out first
            found: dict[int, dict[str, list[Sample]]] = {}
            for clients in CLIENTS:
                found[clients] = {name: [] for name in NAMES}
                for number in range(rounds + 1):
                    for name, server in servers.items():
                        sample = measure(server, folder, clients, seconds)
                        found[clients][name] += [sample] if number else []
                print("; ".join(_row(clients, found[clients])), flush=True)
            memory = {name: memory_bytes([server.pid]) / 2**20 for name, server in servers.items()}
            machine = watch.machine
    busy = {name: _median(found[64][name]) for name in NAMES}
    return Report(
        name="edges",
        title=f"Hosts in the server's process, and in their own, {folder.name}, single short texts",
        machine=machine,
        settings={"model": folder.name, "rounds": rounds, "seconds": seconds},
        header=("clients", "local, texts/s", "process", "process over local", "p50 ms",
                "local: loop + worker + model, CPU ms", "process"),
        rows=[_row(clients, by) for clients, by in found.items()],
        samples={str(clients): _rates(by) for clients, by in found.items()},
        notes=(
            f"memory: local {memory['local']:,.0f} MiB, process {memory['process']:,.0f} MiB",
            *(_bounds(busy, cores) for cores in CORES),
        ),
    )  # fmt: skip


def _bounds(times: dict[str, Spent], cores: int) -> str:
    """Describe what so many cores could give."""
    local, process = (times[name] for name in NAMES)
    servers = servers_for(process, cores)
    return (
        f"at most on {cores} cores, from the times at 64 clients: local {bound(local, cores, 1):,.0f} requests/s, "
        f"process {bound(process, cores, 1):,.0f}, and {bound(process, cores, servers):,.0f} with {servers} servers "
        "on one port"
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.http.edges",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default="minilm")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each load in each round")
    add_save_option(parser, by_default=False)
    asked = parser.parse_args()
    publish(run(resolve(asked.model), asked.rounds, asked.seconds), asked.results)


if __name__ == "__main__":
    main()
