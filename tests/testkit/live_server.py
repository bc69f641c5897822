"""`embedyard serve` as a process of its own: what a user runs, on a free port, with no settings of this machine."""

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from msgspec import Struct

_ADDRESS = re.compile(r"Embedyard serves (http://\S+)")


class LiveServer(Struct, frozen=True):
    """A running server; `banner` is what it printed when it was ready."""

    url: str
    process: subprocess.Popen[str]
    banner: str


@contextmanager
def serve_live(registry: Path, **environ: str) -> Iterator[LiveServer]:
    """Serve a registry until the block ends, then stop as SIGTERM does.

    Args:
        environ: settings of this server; those of the test run are not inherited. Without PORT it takes a free one.
    """
    with tempfile.TemporaryDirectory() as folder, (Path(folder) / "log").open("w+") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "router", "serve", "--registry", str(registry), "--port", environ.get("PORT", "0")],
            env=_environment(folder) | environ,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
        try:
            yield _wait(process, Path(folder) / "log")
        finally:
            process.terminate()
            process.communicate(timeout=60)


def _environment(folder: str) -> dict[str, str]:
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
    own = {"STATE_DIR": folder, "HF_HOME": folder, "LOG_FORMAT": "json", "HF_HUB_OFFLINE": "1"}
    return kept | own | {"PYTHONPATH": str(Path(__file__).parents[2])}


def _wait(process: subprocess.Popen[str], log: Path) -> LiveServer:
    assert process.stdout is not None
    lines: list[str] = []
    url: str | None = None
    for line in process.stdout:
        lines.append(line)
        match = _ADDRESS.search(line)
        url = match[1] if match else url
        if url is not None and "curl " in line:
            return LiveServer(url, process, "".join(lines))
    raise AssertionError(f"the server did not start:\n{''.join(lines)}\n{log.read_text()}")
