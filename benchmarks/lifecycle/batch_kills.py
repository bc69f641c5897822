"""Kills the processes that run one batch, at random moments, and compares its output with that of an undisturbed run.

The server is `BACKEND=process embedyard serve` with a small model of random weights. Each time one of its processes is
killed by SIGKILL: the server, its worker, or both; while it runs the batch, or while it starts. A dead server is
started anew. Its lease is ended by hand, which spares half a minute each time; nothing else is done to the database.
One text a forward pass (MAX_BATCH_SIZE=1), because float32 sums differ in the last bit with the shape of a batch.
"""

import json
import random
import re
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, Literal, NamedTuple

import httpx
import psutil
from msgspec import Struct, field

from benchmarks.lib.machine import ROOT, Watch
from benchmarks.lib.models import RECIPES, quiet
from benchmarks.lib.report import Report
from benchmarks.lib.servers import bare_environment, free_port, write_registry
from benchmarks.lib.workloads import mixed
from router.batches.journal import line_id
from router.batches.records import UNFINISHED

Victim = Literal["server", "worker", "both", "starting"]
MODEL = "small"
RECIPE = "bert-cls"
START_S = 120.0
_WORKER_DEATHS = 2
"""In a row: after a third the server takes the model for the cause, and quarantines it for ten minutes."""
_WORKER_STARTS_S = 3.0
_STARTING_SHARE = 0.15
INPUTS = 8
"""Texts of one line, so that 20,000 lines take minutes, and a second between two deaths does not do them all."""
_ORPHAN_S = 30.0
_END_S = 1800.0
_LINE_IDS = re.compile(rb"batch_req_[0-9a-f]{32}")


class Kills(Struct, kw_only=True):
    """What happened. `journaled`: lines in the journal at each death; `starts_s`: of each server until it was ready."""

    victims: Counter[str] = field(default_factory=Counter)
    journaled: list[int] = field(default_factory=list)
    starts_s: list[float] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    epoch: int = 0
    still_s: float = 0.0
    wall_s: float = 0.0


class Site(Struct, frozen=True, kw_only=True):
    """Where servers run: one registry, one folder for state and logs, one for files and batches.

    `settings`: in addition to, or instead of those of this module.
    """

    registry: Path
    root: Path
    data: Path
    settings: Mapping[str, str] = {}


class Life:
    """One server process and its workers, from its start to its death."""

    def __init__(self, site: Site) -> None:
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self.log = site.root / f"log-{port}"
        self._log = self.log.open("ab")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "router", "serve", "--registry", str(site.registry), "--port", str(port)],
            cwd=ROOT,
            env=bare_environment(str(site.root)) | _SETTINGS | {"DATA_DIR": str(site.data), **site.settings},
            stdout=self._log,
            stderr=self._log,
        )

    def wait(self) -> float:
        """Wait until the server is ready; return after how many seconds it was.

        Raises:
            RuntimeError: it ended, or was not ready in time.
        """
        began_s = time.monotonic()
        while time.monotonic() - began_s < START_S and self.process.poll() is None:
            try:
                if httpx.get(f"{self.url}/ready", timeout=5).status_code == 200:
                    return time.monotonic() - began_s
            except httpx.TransportError:
                time.sleep(0.02)
        raise RuntimeError(f"the server did not start: see {self.log}")

    def workers(self) -> list[psutil.Process]:
        """Return the worker processes: children of the fork server, which is a child of the server."""
        return [child for child in self._children() if _is_worker(child)]

    def kill(self, victim: Victim) -> str:
        """Kill; return a fault: what outlived the server."""
        workers, everyone = self.workers(), self._children()
        if victim in ("worker", "both"):
            for worker in workers:
                worker.kill()
        if victim == "worker":
            return ""
        self.process.kill()
        self.process.wait()
        self._log.close()
        _, alive = psutil.wait_procs(everyone, timeout=_ORPHAN_S)
        for orphan in alive:
            orphan.kill()
        return f"{len(alive)} processes outlived their server by {_ORPHAN_S:g} s" if alive else ""

    def _children(self) -> list[psutil.Process]:
        try:
            return psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []


_SETTINGS = {
    "PYTHONPATH": str(ROOT), "BACKEND": "process", "MEMORY_BUDGET": "512MiB", "MAX_BATCH_SIZE": "1",
    "BATCH_CONCURRENCY": "2", "LOG_LEVEL": "warning", "LOG_FORMAT": "json",
}  # fmt: skip


def _is_worker(process: psutil.Process) -> bool:
    try:
        parent = process.parent()
        return parent is not None and all("forkserver" in " ".join(one.cmdline()) for one in (process, parent))
    except psutil.NoSuchProcess:
        return False


def make_lines(number: int, inputs: int = 1) -> list[str]:
    """Return the lines of a batch of embeddings."""
    texts = mixed(number + inputs, seed=5, longest_words=12)
    return [
        json.dumps({
            "custom_id": f"id-{at}", "method": "POST", "url": "/v1/embeddings",
            "body": {"model": MODEL, "input": texts[at : at + inputs]},
        })
        for at in range(number)
    ]  # fmt: skip


def submit(url: str, rows: Sequence[str]) -> str:
    """Upload the lines and begin their batch; return its id."""
    with httpx.Client(base_url=url, timeout=60) as client:
        made = client.post("/v1/files", files={"file": "\n".join(rows)}, data={"purpose": "batch"}).raise_for_status()
        body = {"input_file_id": made.json()["id"], "endpoint": "/v1/embeddings"}
        return str(client.post("/v1/batches", json=body).raise_for_status().json()["id"])


def fetch(url: str, batch_id: str, limit_s: float = _END_S, poll_s: float = 0.2) -> tuple[dict[str, Any], bytes]:
    """Wait until a batch has ended; return it and its output.

    Raises:
        TimeoutError: it has not ended in time.
    """
    deadline_s = time.monotonic() + limit_s
    with httpx.Client(base_url=url, timeout=60) as client:
        while time.monotonic() < deadline_s:
            batch: dict[str, Any] = client.get(f"/v1/batches/{batch_id}").raise_for_status().json()
            if batch["status"] not in UNFINISHED:
                output = batch["output_file_id"]
                return batch, client.get(f"/v1/files/{output}/content").content if output else b""
            time.sleep(poll_s)
    raise TimeoutError(f"batch {batch_id} has not ended after {limit_s:g} s")


class Row(NamedTuple):
    """What the database says of the batch."""

    status: str
    done: int
    output: str | None
    epoch: int


def look(data: Path, *, free: bool = False) -> Row:
    """Read the batch from the database. `free`: end its lease, as half a minute without its server would."""
    database = sqlite3.connect(data / "batches.db", timeout=60)
    try:
        with database:
            if free:
                database.execute("UPDATE batches SET lease_until = 0")
            found = database.execute("SELECT status, completed + failed, output_file_id, epoch FROM batches").fetchone()
        return Row(*found)
    finally:
        database.close()


def with_ids_of(output: bytes, batch_id: str) -> bytes:
    """Return the output as that of another batch: ids of lines are made from the batch's."""
    rows = output.splitlines(keepends=True)
    return b"".join(
        _LINE_IDS.sub(line_id(batch_id, number).encode(), row, count=2) for number, row in enumerate(rows, 1)
    )


def build_site(root: Path) -> Site:
    """Make a small model and its registry below a folder."""
    with quiet():
        RECIPES[RECIPE].build(root / "model")
    registry = write_registry(root / "registry.yaml", {MODEL: root / "model"})
    return Site(registry=registry, root=root, data=root / "data")


def endure(at: Site, rows: Sequence[str], kills: int, rng: random.Random) -> Kills:
    """Run the lines undisturbed, and again with that many deaths, and compare."""
    found = Kills()
    expected, found.still_s = _undisturbed(at, rows)
    began_s = time.monotonic()
    life = Life(at)
    found.starts_s.append(life.wait())
    batch_id = submit(life.url, rows)
    is_running = True
    while found.victims.total() < kills:
        if not is_running:
            life = Life(at)
            if rng.random() < _STARTING_SHARE:
                time.sleep(rng.uniform(0.0, median(found.starts_s)))
                _kill(at, life, "starting", found)
                continue
            found.starts_s.append(life.wait())
        is_running = True
        for deaths in range(_WORKER_DEATHS + 1):
            left = (len(rows) - look(at.data).done) / (kills - found.victims.total() + 1)
            mean_s = left * found.still_s / len(rows)
            time.sleep(rng.uniform(0.0, 2 * mean_s))
            victim: Victim = "server" if deaths == _WORKER_DEATHS else rng.choice(("server", "worker", "both"))
            _kill(at, life, victim, found)
            is_running = victim == "worker"
            if not is_running or found.victims.total() >= kills:
                break
            time.sleep(rng.uniform(0.0, _WORKER_STARTS_S))
    if not is_running:
        life = Life(at)
        found.starts_s.append(life.wait())
    try:
        batch, output = fetch(life.url, batch_id)
    finally:
        found.faults += [fault for fault in (life.kill("server"),) if fault]
    found.epoch, found.wall_s = look(at.data).epoch, time.monotonic() - began_s
    found.faults += compare(batch, output, with_ids_of(expected, batch_id), len(rows))
    return found


def _undisturbed(at: Site, rows: Sequence[str]) -> tuple[bytes, float]:
    """Return the output of a run without deaths, and how many seconds it took."""
    life = Life(Site(registry=at.registry, root=at.root, data=at.root / "still"))
    try:
        life.wait()
        began_s = time.monotonic()
        _, output = fetch(life.url, submit(life.url, rows))
        return output, time.monotonic() - began_s
    finally:
        life.kill("server")


def _kill(at: Site, life: Life, victim: Victim, found: Kills) -> None:
    fault = life.kill("both" if victim == "starting" else victim)
    row = look(at.data, free=victim != "worker")
    found.victims[victim] += 1
    found.journaled.append(row.done)
    found.faults += [fault] if fault else []
    if (row.output is None) != (row.status != "completed"):
        found.faults.append(f"output {row.output} is published while the batch is {row.status}")


def compare(batch: dict[str, Any], output: bytes, expected: bytes, total: int) -> list[str]:
    """Return what is wrong with a batch and its output."""
    faults = []
    if batch["status"] != "completed" or batch["request_counts"] != {"total": total, "completed": total, "failed": 0}:
        faults.append(f"the batch is {batch['status']} with {batch['request_counts']}")
    if not output.endswith(b"\n"):
        faults.append("the last line is torn")
    try:
        ids = Counter(json.loads(row)["custom_id"] for row in output.splitlines())
    except ValueError:
        return [*faults, "a line is not JSON"]
    missing = total - sum(f"id-{at}" in ids for at in range(total))
    repeated = ids.total() - len(ids)
    if missing or repeated:
        faults.append(f"{missing} lines are missing, {repeated} are repeated")
    if output != expected:
        pairs = enumerate(zip(output.splitlines(), expected.splitlines(), strict=False), 1)
        differing = [number for number, (got, wanted) in pairs if got != wanted]
        faults.append(f"the bytes of {len(differing)} lines differ from an undisturbed run, first in {differing[:3]}")
    return faults


def run_kills(kills: int, lines: int, seed: int = 11) -> tuple[Report, list[str]]:
    """Return the report and all faults."""
    watch = Watch()
    with tempfile.TemporaryDirectory() as folder:
        found = endure(build_site(Path(folder)), make_lines(lines, INPUTS), kills, random.Random(seed))
    moments = found.journaled
    during = sum(0 < done < lines for done in moments)
    report = Report(
        name="batch-kills",
        title=f"A batch of {lines} lines, and {found.victims.total()} × kill -9",
        machine=watch.machine,
        settings={"kills": kills, "lines": lines, "seed": seed},
        header=("what", "figure"),
        rows=[
            *((f"kill -9 of {_NAMES[victim]}", str(count)) for victim, count in sorted(found.victims.items())),
            ("  with some, and not all lines journaled", str(during)),
            ("leases of the batch", str(found.epoch)),
            ("servers started", str(len(found.starts_s) + found.victims["starting"])),
            ("  until one was ready (median)", f"{median(found.starts_s):.1f} s"),
            ("an undisturbed run", f"{found.still_s:.0f} s"),
            ("this run", f"{found.wall_s:.0f} s"),
            ("faults", str(len(found.faults))),
        ],
        samples={"journaled": moments},
        notes=tuple(f"WRONG: {fault}" for fault in found.faults)
        or ("every line once, byte-equal to the undisturbed run",),
    )
    return report, found.faults


_NAMES = {
    "server": "the server", "worker": "its worker", "both": "both", "starting": "both while they start",
}  # fmt: skip
