"""Runs programs under test as processes with their own libraries, threads and memory, driven by JSON lines.

A worker writes one line when it is warm (`{"ready": …}`), and then answers each line with a line. It measures its own
times, so that no figure includes the pipe. `benchmarks/peers/` has the workers.
"""

import json
import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from benchmarks.lib.folders import BENCH
from benchmarks.lib.machine import ROOT

PEER_SCRIPTS = Path(__file__).parents[1] / "peers"
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(BENCH / "hf"), "DO_NOT_TRACK": "1", "PYTHONWARNINGS": "ignore"}
"""Variables for every program under test: no downloads and no telemetry."""

_LOG_LINES = 25


class WorkerFailed(Exception):
    """A worker ended or could not start; the message has the end of its output."""


class Worker:
    """One worker process. Use it as a context manager, or close it.

    Args:
        name: shown in tables.
        script: a file of `benchmarks/peers/`.
        arguments: its command line.
        python: the interpreter of its environment.
        packages: the folder from which it imports `engines` and `router`.
    """

    def __init__(
        self, name: str, script: str, arguments: Sequence[str], *, python: Path, packages: Path = ROOT
    ) -> None:
        self.name = name
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115  # closed in `close`
        self._process = subprocess.Popen(
            [str(python), str(PEER_SCRIPTS / script), *arguments],
            env=_environment(packages),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        self.facts: dict[str, Any] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def wait_until_warm(self) -> "Worker":
        """Block until the model is loaded.

        Raises:
            WorkerFailed: the worker ended.
        """
        self.facts = self._read()["ready"]
        return self

    def ask(self, **message: Any) -> dict[str, Any]:
        """Send one question and return the answer.

        Raises:
            WorkerFailed: the worker ended.
        """
        assert self._process.stdin is not None, "opened with a pipe"
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._failure() from None
        return self._read()

    def seconds(self, calls: Sequence[Sequence[str]]) -> float:
        """See `Contestant.seconds`."""
        return float(self.ask(op="time", calls=list(calls))["seconds"])

    def cpu_seconds(self, calls: Sequence[Sequence[str]]) -> float:
        """Return the processor time of the calls, of all threads: a busy machine changes it little."""
        return float(self.ask(op="time", calls=list(calls))["cpu_s"])

    def vectors(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Return the vectors of texts, `[n, D]`."""
        return np.asarray(self.ask(op="vectors", texts=list(texts))["vectors"], dtype=np.float32)

    def close(self) -> None:
        """End the process and wait for its exit."""
        assert self._process.stdin is not None, "opened with a pipe"
        self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        assert self._process.stdout is not None, "opened with a pipe"
        self._process.stdout.close()
        self._log.close()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None, "opened with a pipe"
        line = self._process.stdout.readline()
        if not line:
            raise self._failure()
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _failure(self) -> WorkerFailed:
        self._process.wait(10)
        self._log.seek(0)
        last = "".join(self._log.readlines()[-_LOG_LINES:])
        return WorkerFailed(f"{self.name} ended with {self._process.returncode}:\n{last}")


def _environment(packages: Path) -> dict[str, str]:
    """Return this environment without variables that change how a library runs."""
    base = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "OMP_", "MKL_"))}
    return base | OFFLINE | {"PYTHONPATH": str(packages)}
