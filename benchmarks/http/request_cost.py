"""Counts what one warm request costs the server itself: function calls, and CPU time at the least.

    python -m benchmarks.http.request_cost --against 5eee7b9

The application is called without sockets, one request after the other: `{"model": "all-MiniLM-L6-v2", "input": "The cat
sits outside"}`. Calls of Python and C functions on the event loop are the same in every run, however busy the machine
is; of the times the smallest of forty batches counts, which a busy machine disturbs least. `--against` runs the same in
the tree of another commit, in turns.
"""

import argparse
import asyncio
import importlib
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import MutableMapping, Sequence
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

import structlog
from msgspec import Struct

from benchmarks.lib.machine import ROOT, Watch
from benchmarks.lib.report import Report, add_save_option, publish

_NOW = "working tree"
BODY = json.dumps({"model": "all-MiniLM-L6-v2", "input": "The cat sits outside"}).encode()
_WARM_UP, _BATCHES, _REQUESTS, _TRACED = 200, 40, 25, 50
_NAMES = {
    "Settings": ("router.config.settings", "router.settings"),
    "open_registry": ("router.registry.opening", "router.registry.registry", "router.registry"),
    "open_local_backend": ("router.backends.local", "router.local"),
}
"""Where each is: today, and before the packages of docs/architecture.md."""


class Cost(Struct, frozen=True):
    """The cost of one request. Times in milliseconds: of all threads, and of the event loop's."""

    python_calls: float
    c_calls: float
    cpu_ms: float
    loop_ms: float


def named(name: str) -> Any:
    """Return what a layout has under this name."""
    for module in _NAMES[name]:
        with suppress(ModuleNotFoundError):
            if (found := getattr(importlib.import_module(module), name, None)) is not None:
                return found
    raise ImportError(f"no {name} in {' or '.join(_NAMES[name])}: a layout that {__name__} does not know")


async def _request(app: Any) -> int:
    """Sends one request; returns the status."""
    sent: list[MutableMapping[str, Any]] = []
    bodies = [{"type": "http.request", "body": BODY, "more_body": False}]

    async def receive() -> MutableMapping[str, Any]:
        if bodies:
            return bodies.pop()
        await asyncio.Event().wait()
        raise AssertionError("nothing more is received")

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message)

    headers = {"host": "127.0.0.1:6008", "content-type": "application/json", "content-length": str(len(BODY))}
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http",
        "path": "/v1/embeddings", "raw_path": b"/v1/embeddings", "query_string": b"", "root_path": "",
        "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
        "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 6008), "state": {},
    }  # fmt: skip
    await app(scope, receive, send)
    return int(sent[0]["status"])


async def started(app: Any) -> asyncio.Task[None]:
    """Returns the task of the application's lifespan, once that has begun."""
    received: asyncio.Queue[Any] = asyncio.Queue()
    sent: asyncio.Queue[Any] = asyncio.Queue()
    await received.put({"type": "lifespan.startup"})
    lifespan = asyncio.create_task(
        app({"type": "lifespan", "asgi": {"version": "3.0"}, "state": {}}, received.get, sent.put)
    )
    assert (await sent.get())["type"] == "lifespan.startup.complete"
    return lifespan


async def _measure(app: Any) -> Cost:
    lifespan = await started(app)
    for _ in range(_WARM_UP):
        assert await _request(app) == 200
    cpu_s, loop_s = [], []
    for _ in range(_BATCHES):
        cpu, loop = time.process_time(), time.thread_time()
        for _ in range(_REQUESTS):
            await _request(app)
        cpu_s.append(time.process_time() - cpu)
        loop_s.append(time.thread_time() - loop)
    calls: Counter[str] = Counter()

    def count(_frame: object, event: str, _argument: object) -> None:
        calls[event] += 1

    sys.setprofile(count)
    for _ in range(_TRACED):
        await _request(app)
    sys.setprofile(None)
    lifespan.cancel()
    return Cost(
        calls["call"] / _TRACED,
        calls["c_call"] / _TRACED,
        1000 * min(cpu_s) / _REQUESTS,
        1000 * min(loop_s) / _REQUESTS,
    )


def child(tree: str) -> None:
    """Print the cost in a tree, as JSON. Nothing of the product has been imported before."""
    assert "router" not in sys.modules
    sys.path.insert(0, tree)
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    with tempfile.TemporaryDirectory() as folder:
        settings = named("Settings")(state_dir=Path(folder), device=("cpu",), registry=Path(tree) / "registry.yaml")
        registry = named("open_registry")(settings)
        create_app = importlib.import_module("router.app").create_app
        structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
        cost = asyncio.run(_measure(create_app(settings, registry, named("open_local_backend")(settings, registry))))
    print(json.dumps([cost.python_calls, cost.c_calls, cost.cpu_ms, cost.loop_ms]), flush=True)
    os._exit(0)  # threads of the device need not be joined


def cost_in(tree: Path) -> Cost:
    """Return the cost of a request to the server of a tree."""
    script = f"from benchmarks.http.request_cost import child; child({str(tree)!r})"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], cwd=ROOT, capture_output=True, text=True, check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=120,
    )  # fmt: skip
    return Cost(*json.loads(done.stdout.splitlines()[-1]))


def _row(name: str, costs: Sequence[Cost]) -> tuple[str, ...]:
    return (
        name,
        f"{median(cost.python_calls for cost in costs):.0f}",
        f"{median(cost.c_calls for cost in costs):.0f}",
        f"{min(cost.cpu_ms for cost in costs):.3f}",
        f"{min(cost.loop_ms for cost in costs):.3f}",
    )


def run(commit: str | None, rounds: int) -> Report:
    """Measure the working tree, and another commit in turns."""
    watch = Watch()
    with tempfile.TemporaryDirectory() as folder:
        trees = {_NOW: ROOT}
        if commit is not None:
            archive = subprocess.run(["git", "archive", commit], cwd=ROOT, capture_output=True, check=True).stdout
            subprocess.run(["tar", "--extract", "--directory", folder], input=archive, check=True)
            trees[commit] = Path(folder)
        costs: dict[str, list[Cost]] = {name: [] for name in trees}
        for number in range(rounds):
            for name, tree in trees.items():
                costs[name].append(cost_in(tree))
            print(f"round {number + 1} of {rounds}", flush=True)
    return Report(
        name="request-cost",
        title="The cost of a warm request without sockets",
        machine=watch.machine,
        settings={"rounds": rounds, "against": commit or ""},
        header=("tree", "Python calls", "C calls", "CPU ms", "of these the event loop"),
        rows=[_row(name, each) for name, each in costs.items()],
        samples={name: {"cpu_ms": [cost.cpu_ms for cost in each]} for name, each in costs.items()},
        notes=("calls on the event loop: medians; times: the least of all rounds",),
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.http.request_cost",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--against", help="a commit to compare with")
    parser.add_argument("--rounds", type=int, default=3)
    add_save_option(parser, by_default=False)
    asked = parser.parse_args()
    publish(run(asked.against, asked.rounds), asked.results)


if __name__ == "__main__":
    main()
