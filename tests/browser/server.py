"""Starts and stops the server process of the browser tests, on the same port each time."""

import subprocess
import sys
from pathlib import Path

KEY = "secret-of-the-tests"
ROOT = Path(__file__).parent.parent.parent


class ServerProcess:
    """A process of `tests/browser/serve.py`. `arguments` are its options."""

    def __init__(self, *arguments: str) -> None:
        self._arguments = arguments
        self._process: subprocess.Popen[str] | None = None
        self.url = ""

    def start(self) -> None:
        """Start the server and return when it listens; later starts use the same port."""
        port = self.url.rpartition(":")[2] or "0"
        command = [sys.executable, "-W", "ignore", "-m", "tests.browser.serve", "--port", port, *self._arguments]
        self._process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self.url = self._process.stdout.readline().strip()
        assert self.url.startswith("http://"), "the server did not start"

    def stop(self) -> None:
        assert self._process is not None
        self._process.terminate()
        self._process.communicate(timeout=30)
