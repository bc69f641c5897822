"""Shows where the microseconds of a warm request go on the event loop.

    python -m benchmarks.http.request_profile

Runs the server's HTTP protocol and application on an in-memory transport, one request after the other, the same as
`benchmarks.http.request_cost` plus parsing and writing HTTP. A timer of the thread's own CPU time interrupts it, so
that neither other threads nor other processes shift the shares. Each sample counts for the file whose Python code runs,
C functions for their caller. Shares are of samples, microseconds are shares of the loop's CPU time without the timer.
System calls of sockets are not in it. Linux only.
"""

import argparse
import asyncio
import ctypes
import importlib
import logging
import os
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import structlog
import uvicorn
from uvicorn.server import ServerState

from benchmarks.http.request_cost import BODY, named, started
from benchmarks.lib.machine import ROOT, Watch
from benchmarks.lib.report import Report, add_save_option, publish

_WARM_UP, _BATCHES, _REQUESTS, _SAMPLE_NS = 300, 40, 25, 1_000_000
_HEAD = (
    "POST /v1/embeddings HTTP/1.1\r\nhost: 127.0.0.1:6008\r\ncontent-type: application/json\r\n"
    f"content-length: {len(BODY)}\r\n\r\n"
).encode()

LAYERS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("HTTP: parse and write", ("uvicorn/", "httptools/", "router/server/connection")),
    ("event loop, tasks, timers", ("asyncio/", "selectors", "contextlib", "uvloop/")),
    ("Litestar: route, request, response", ("litestar/", "multidict/", "urllib/", "typing.py", "fnmatch")),
    ("context of the request", ("router/server/", "router/observability/request_context")),
    ("key and limits", ("router/auth/", "router/limits/")),
    ("decode, call", ("router/api/decoding", "router/api/embeddings", "router/api/inference", "msgspec/")),
    ("encode the answer", ("router/api/encoding",)),
    ("backend, host, pool", ("router/backends/", "engines/host", "engines/pool/", "engines/types")),
    ("tokenize", ("engines/inputs/",)),
    ("queue, wake a device thread", ("engines/batching/", "engines/device/", "threading")),
    ("metrics", ("router/observability/recorder", "router/observability/traffic", "prometheus_client/")),
    ("log", ("router/observability/", "structlog/")),
)
"""Layers of a request, and what is in the paths of their files; the first that matches counts."""
_OTHER = "other"
_THREAD_CPU_CLOCK = 3  # CLOCK_THREAD_CPUTIME_ID


def layer_of(path: str) -> str:
    """Return the layer that a file's code belongs to."""
    return next((name for name, parts in LAYERS if any(part in path for part in parts)), _OTHER)


class MemoryTransport(asyncio.Transport):
    """Keeps what is written until `answered` is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self._written = bytearray()
        self._arrived = asyncio.Event()

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return {"peername": ("127.0.0.1", 1), "sockname": ("127.0.0.1", 6008)}.get(name, default)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self._written += data
        self._arrived.set()

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """Do nothing: nothing is buffered."""

    def get_write_buffer_size(self) -> int:
        return 0

    def is_closing(self) -> bool:
        return False

    def close(self) -> None:
        """Do nothing: one connection serves all requests."""

    async def answer(self) -> bytes:
        """Wait for one complete response and return it."""
        while True:
            head, separator, body = bytes(self._written).partition(b"\r\n\r\n")
            length = head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]
            if separator and len(body) >= int(length):
                self._written.clear()
                return head + separator + body
            self._arrived.clear()
            await self._arrived.wait()


class Sampler:
    """Counts samples by the file whose code runs when the timer fires."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def __call__(self, _signal: int, frame: FrameType | None) -> None:
        if frame is not None:
            self.counts[frame.f_code.co_filename] += 1


@contextmanager
def sampled(sampler: Sampler) -> Iterator[None]:
    """Call `sampler` each millisecond of CPU time of this thread, which is the main thread.

    Raises:
        OSError: the system has no such timer.
    """
    library = ctypes.CDLL(None, use_errno=True)
    event = (ctypes.c_int * 16)()
    event[2] = signal.SIGPROF  # behind the value; how to notify is 0: by a signal
    timer = ctypes.c_void_p()
    signal.signal(signal.SIGPROF, sampler)
    if library.timer_create(_THREAD_CPU_CLOCK, event, ctypes.byref(timer)):
        raise OSError(ctypes.get_errno(), "timer_create")
    times = (ctypes.c_long * 4)(0, _SAMPLE_NS, 0, _SAMPLE_NS)  # interval and first, in seconds and nanoseconds
    library.timer_settime(timer, 0, times, None)
    try:
        yield
    finally:
        library.timer_delete(timer)


def table(counts: Iterable[tuple[str, int]], loop_us: float) -> list[tuple[str, ...]]:
    """Return one row for each layer that has samples: share, and microseconds of `loop_us`. This file is left out."""
    by_layer: Counter[str] = Counter()
    for path, samples in counts:
        if path != __file__:
            by_layer[layer_of(path)] += samples
    total = max(1, by_layer.total())
    rows = [
        (name, f"{100 * count / total:.0f} %", f"{loop_us * count / total:.0f}")
        for name, count in by_layer.most_common()
    ]
    return [*rows, ("all", "100 %", f"{loop_us:.0f}")]


async def _measure(app: Any, num_requests: int) -> tuple[Sampler, float]:
    from router.server.connection import TimeoutHttpProtocol

    lifespan = await started(app)
    config = uvicorn.Config(
        app, http=TimeoutHttpProtocol, ws="none", lifespan="off", log_config=None, access_log=False,
        server_header=False, proxy_headers=False, timeout_keep_alive=75,
    )  # fmt: skip
    config.load()
    protocol = TimeoutHttpProtocol(config, ServerState(), {}, asyncio.get_running_loop())
    transport = MemoryTransport()
    protocol.connection_made(transport)

    async def request() -> None:
        protocol.data_received(_HEAD + BODY)
        answer = await transport.answer()
        assert answer.startswith(b"HTTP/1.1 200"), answer

    for _ in range(_WARM_UP):
        await request()
    loop_s = [await _cpu_s(request) for _ in range(_BATCHES)]
    sampler = Sampler()
    with sampled(sampler):
        for _ in range(num_requests):
            await request()
    lifespan.cancel()
    return sampler, 1e6 * min(loop_s) / _REQUESTS


async def _cpu_s(request: Callable[[], Any]) -> float:
    began_s = time.thread_time()
    for _ in range(_REQUESTS):
        await request()
    return time.thread_time() - began_s


def run(num_requests: int) -> Report:
    """Profile the working tree."""
    watch = Watch()
    silent = structlog.make_filtering_bound_logger(logging.CRITICAL)
    structlog.configure(wrapper_class=silent)
    with tempfile.TemporaryDirectory() as folder:
        settings = named("Settings")(state_dir=Path(folder), device=("cpu",), registry=ROOT / "registry.yaml")
        registry = named("open_registry")(settings)
        create_app = importlib.import_module("router.app").create_app
        app = create_app(settings, registry, named("open_local_backend")(settings, registry))
        with asyncio.Runner(loop_factory=uvicorn.Config(app, loop="auto").get_loop_factory()) as runner:  # as served
            sampler, loop_us = runner.run(_measure(app, num_requests))
    return Report(
        name="request-profile",
        title="Where the event loop's time of a warm request goes",
        machine=watch.machine,
        settings={"requests": num_requests},
        header=("layer", "share", "µs"),
        rows=table(sampler.counts.items(), loop_us),
        samples={"files": dict(sampler.counts)},
        notes=(f"{sampler.counts.total()} samples; CPU time of the loop's thread without the timer",),
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.http.request_profile",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--requests", type=int, default=8000)
    add_save_option(parser, by_default=False)
    asked = parser.parse_args()
    publish(run(asked.requests), asked.results)
    sys.stdout.flush()
    os._exit(0)  # threads of the device need not be joined


if __name__ == "__main__":
    main()
