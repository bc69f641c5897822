"""Starts servers under test as processes on loopback: ours, Infinity, and FastAPI around sentence-transformers.

Also makes their requests. `embedyard bench` puts load on any server by its URL.
"""

import http.client
import json
import os
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from email.message import Message
from pathlib import Path
from typing import IO, Any

import psutil
from msgspec import Struct

from benchmarks.lib import workloads
from benchmarks.lib.machine import ROOT, core_seconds
from benchmarks.lib.peers import OURS, interpreter, is_installed, model_folder
from benchmarks.lib.worker import OFFLINE, PEER_SCRIPTS, WorkerFailed
from router.loadgen import Outcome
from router.loadgen.http_client import Request, Target, encode, vectors

START_S = 300.0
_LOG_LINES = 25
_MODEL = "model"

Start = Callable[[int], subprocess.Popen[bytes]]
"""Starts a server on a port."""


class Server(Struct, frozen=True):
    """A running server that has answered at least once. `start_s`: from the process's start to that answer."""

    name: str
    target: Target
    pid: int
    start_s: float

    @property
    def core_s(self) -> float:
        """Return the core seconds that it has used so far."""
        return core_seconds(psutil.Process(self.pid))


class Plan(Struct, frozen=True):
    """How to start a server: environment (None: ours), command for a port, working folder and variables."""

    name: str
    model: str
    command: Callable[[int], list[str]]
    environment: str | None = None
    folder: Path = ROOT
    variables: Mapping[str, str] = {}


def infinity(folder: Path, engine: str, *, warms_up: bool = True) -> Plan:
    """Plan Infinity with its defaults, on its torch or ONNX engine; or without the trials that it runs at start."""
    is_onnx = engine == "optimum"
    model = model_folder(folder, "onnx-plain") if is_onnx else folder
    program = str(interpreter("infinity").with_name("infinity_emb"))
    options = ["--engine", engine, "--device", "cpu", "--served-model-name", _MODEL, "--host", "127.0.0.1"]
    if is_onnx:
        options += ["--pooling-method", "mean"]
    if not warms_up:
        options.append("--no-model-warmup")
    return Plan(
        f"Infinity ({'ONNX' if is_onnx else 'torch'})",
        _MODEL,
        lambda port: [program, "v2", "--model-id", ".", "--port", str(port), *options],
        "infinity",
        model,
        {"INFINITY_ANONYMOUS_USAGE_STATS": "0", "INFINITY_URL_PREFIX": "/v1"},
    )


def fastapi(folder: Path) -> Plan:
    """Plan FastAPI around sentence-transformers."""
    script = str(PEER_SCRIPTS / "fastapi_app.py")
    return Plan(
        "FastAPI + sentence-transformers",
        _MODEL,
        lambda port: [str(interpreter("fastapi")), script, str(folder), str(port)],
        "fastapi",
    )


def own(registry: Path, model: str, *, script: Sequence[str] = ("-m", "router", "serve"), **variables: str) -> Plan:
    """Plan our server with a registry and default settings, except for `variables`."""
    return Plan(
        OURS,
        model,
        lambda port: [str(interpreter(None)), *script, "--registry", str(registry), "--port", str(port)],
        variables={"PYTHONPATH": str(ROOT), "LOG_FORMAT": "json", **variables},
    )


def write_registry(path: Path, models: Mapping[str, Path], *, preload: bool = True) -> Path:
    """Write a registry that serves these folders under these names."""
    lines = ["version: 1", "models:"]
    for name, folder in models.items():
        lines += [f"  - name: {name}", f"    source: {folder}", f"    preload: {str(preload).lower()}"]
    path.write_text("\n".join(lines) + "\n")
    return path


@contextmanager
def serving(plan: Plan, *, first: Callable[[Target], object] | None = None) -> Iterator[Server]:
    """Run a server until the block ends.

    Args:
        first: called until it no longer raises OSError; then the server is up. Default: one embedding.

    Raises:
        WorkerFailed: it is not installed, ended, or did not answer within START_S.
    """
    if not is_installed(plan.environment):
        raise WorkerFailed(f"{plan.name} is not installed: python -m benchmarks.lib.peers")
    port = free_port()
    target = Target(f"http://127.0.0.1:{port}", plan.model)
    with tempfile.TemporaryDirectory() as state, tempfile.TemporaryFile("w+") as log:
        started_s = time.perf_counter()
        process = subprocess.Popen(
            plan.command(port),
            cwd=plan.folder,
            env=bare_environment(state) | dict(plan.variables),
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            _wait(process, plan.name, lambda: (first or _embed)(target), log)
            yield Server(plan.name, target, process.pid, time.perf_counter() - started_s)
        finally:
            _stop(process)


def _embed(target: Target) -> None:
    vectors(target, ["The server is up."])


def bare_environment(state: str) -> dict[str, str]:
    """Return an environment without this shell's settings, and with its own state folder."""
    base = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
    return base | OFFLINE | {"STATE_DIR": state}


def _wait(process: subprocess.Popen[bytes], name: str, first: Callable[[], object], log: IO[str]) -> None:
    deadline_s = time.monotonic() + START_S
    while True:
        try:
            first()
            return
        except OSError as error:
            if process.poll() is not None or time.monotonic() > deadline_s:
                log.seek(0)
                last = "".join(log.readlines()[-_LOG_LINES:])
                raise WorkerFailed(f"{name} did not come up ({error}):\n{last}") from None
            time.sleep(0.02)


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


class Reply(Struct, frozen=True):
    """An answer with status 200."""

    headers: Message
    body: bytes


def call(target: Target, method: str, path: str, body: object = None) -> Reply:
    """Send a request and return the answer.

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
    return Reply(answer.headers, text)


def free_port() -> int:
    """Return a port of loopback that nothing listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def num_requests(texts_per_request: int) -> int:
    """Return the number of different requests, sent cyclically: enough that no two in flight are the same."""
    return max(64, 512 // texts_per_request)


def make_requests(
    target: Target, folder: Path, workload: str, texts_per_request: int, encoding_format: str = "base64"
) -> list[Request]:
    """Make requests of one workload, with lengths as the model in `folder` counts them."""
    num_texts = num_requests(texts_per_request) * texts_per_request
    texts = workloads.make(workload, num_texts, workloads.counter(folder))
    return [encode(target, call, encoding_format) for call in texts.calls(texts_per_request)]


def summary(outcome: Outcome) -> dict[str, Any]:
    """Return the part of an outcome that is saved."""
    succeeded = [sample.latency_s for sample in outcome.samples if sample.status == 200]
    return {
        "texts_per_s": outcome.texts_per_s,
        "wall_s": outcome.wall_s,
        "client_cores": outcome.client_cores,
        "errors": outcome.errors,
        "latencies_s": [round(latency, 6) for latency in succeeded],
    }


@contextmanager
def own_server(folder: Path, model: str = "minilm", **variables: str) -> Iterator[Target]:
    """Run our server with one model and default settings, except for `variables`, until the block ends."""
    with tempfile.TemporaryDirectory() as draft:
        registry = write_registry(Path(draft) / "registry.yaml", {model: folder})
        with serving(own(registry, model, **variables)) as server:
            yield server.target
