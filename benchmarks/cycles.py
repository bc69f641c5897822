"""`python -m benchmarks.cycles`: a model is loaded, used and evicted 200 times; the server must not grow.

The server is a process of its own. Its resident memory is read after each eviction, and after the tenth it may not move
by more than 5 %: exits with 1 when it does.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from statistics import median

import httpx
import psutil

from benchmarks.folders import resolve
from benchmarks.machine import Watch
from benchmarks.report import RESULTS, Report, publish
from benchmarks.servers import write_registry
from engines.types import format_bytes
from tests.testkit.live_server import serve_live

MODEL = "cycled"
SETTLED = 10
LIMIT = 0.05


def cycle(client: httpx.Client, process: psutil.Process) -> int:
    """Load, use, evict; the process's resident bytes then.

    Raises:
        httpx.HTTPStatusError: any of the three was refused.
    """
    client.post("/v1/embeddings", json={"model": MODEL, "input": ["a text", "another one"]}).raise_for_status()
    client.post(f"/admin/models/{MODEL}/evict").raise_for_status()
    return int(process.memory_info().rss)


def spread(rss_bytes: list[int]) -> float:
    """How far memory moved after the first `SETTLED` cycles, as a share of what it was then."""
    base = rss_bytes[SETTLED - 1]
    return max(abs(rss - base) for rss in rss_bytes[SETTLED - 1 :]) / base


def run(folder: Path, cycles: int) -> Report:
    """Measure a model folder."""
    watch = Watch()
    with tempfile.TemporaryDirectory() as draft:
        registry = write_registry(Path(draft) / "registry.yaml", {MODEL: folder}, preload=False)
        with serve_live(registry) as server, httpx.Client(base_url=server.url, timeout=60) as client:
            process = psutil.Process(server.process.pid)
            found = [cycle(client, process) for _ in range(cycles)]
            machine = watch.machine
    moved = spread(found)
    return Report(
        name=f"cycles-{folder.name}",
        title=f"{folder.name} loaded, used and evicted {cycles} times",
        machine=machine,
        settings={"model": folder.name, "cycles": cycles},
        header=("resident memory of the server", "bytes"),
        rows=[
            ("after the first cycle", format_bytes(found[0])),
            (f"after cycle {SETTLED}", format_bytes(found[SETTLED - 1])),
            (f"median of the last {SETTLED}", format_bytes(round(median(found[-SETTLED:])))),
            (f"after cycle {cycles}", format_bytes(found[-1])),
            (f"largest after cycle {SETTLED}", format_bytes(max(found[SETTLED - 1 :]))),
        ],
        samples={"rss_bytes": found, "spread": moved},
        notes=(f"moved by {moved:.1%} at the most after cycle {SETTLED} (wanted: {LIMIT:.0%})",),
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cycles", description=__doc__)
    parser.add_argument("--model", default="minilm")
    parser.add_argument("--cycles", type=int, default=200)
    parser.add_argument("--no-save", dest="results", action="store_const", const=None, default=RESULTS)
    asked = parser.parse_args()
    report = run(resolve(asked.model), asked.cycles)
    publish(report, asked.results)
    if report.samples["spread"] > LIMIT:
        sys.exit(f"the server's memory moved by more than {LIMIT:.0%}")


if __name__ == "__main__":
    main()
