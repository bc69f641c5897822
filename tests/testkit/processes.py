"""A server of fakes in a process of its own."""

import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import httpx
from msgspec import Struct

ROOT = Path(__file__).parents[2]


class Process(Struct):
    """A server of its own, where it listens, and its log: a file, because a full pipe would hold it up."""

    popen: subprocess.Popen[str]
    url: str
    log: IO[str]

    def tell(self, number: signal.Signals) -> None:
        self.popen.send_signal(number)

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=10)

    def logged(self) -> list[str]:
        """The events of its log, once it has ended."""
        self.log.seek(0)
        return [json.loads(line)["event"] for line in self.log]

    def running(self, client: httpx.Client) -> float:
        """Requests that are being embedded."""
        return float(sum(slot["leases"] for slot in client.get("/admin/models").json()["data"]))

    def wait_for_leases(self, number: int) -> None:
        with self.client() as client:
            while self.running(client) < number:
                time.sleep(0.005)


@contextmanager
def process(*arguments: str) -> Iterator[Process]:
    command = [sys.executable, "-m", "tests.testkit.serve_fake", *arguments]
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=log, text=True) as child,
    ):
        try:
            assert child.stdout is not None
            yield Process(child, child.stdout.readline().strip(), log)
        finally:
            child.kill()
