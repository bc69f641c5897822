"""Tests that `kill -9` of a serving process loses, repeats and tears no line of a batch."""

import json
import os
import random
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from tests.testkit.batches import line
from tests.testkit.servers import ROOT

pytestmark = pytest.mark.slow
KILLS = int(os.environ.get("BATCH_KILLS", "8"))
"""`BATCH_KILLS=200 pytest tests/integration/test_batch_kills.py` takes minutes."""
LINES = max(3000, 250 * KILLS)
SERVER = """
import sys
from pathlib import Path
from engines.testing.fakes import FakeLoader, fake_host, fake_specs
from router.app import create_app
from router.backends.local import LocalBackend
from router.config.settings import Settings
from router.observability.logs import configure_logging
from router.registry.registry import Registry
from router.server.uvicorn_server import listen, run_server

configure_logging("json", "error")
listener = listen("127.0.0.1", 0)
specs = fake_specs("mini")
backend = LocalBackend([fake_host("mini", loader=FakeLoader())], specs)
registry = Registry(models=specs, default_model="mini")
app = create_app(Settings(data_dir=Path(sys.argv[1])), registry, backend)
run_server(app, listener, lambda: print(f"http://127.0.0.1:{listener.getsockname()[1]}", flush=True))
"""


def start(folder: Path) -> tuple[subprocess.Popen[str], str]:
    command = [sys.executable, "-c", SERVER, str(folder)]
    child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stdout is not None
    return child, child.stdout.readline().strip()


def expire_leases(folder: Path) -> None:
    """Let half a minute pass: nobody renews the leases of a dead server."""
    with sqlite3.connect(folder / "batches.db", timeout=30) as database:
        database.execute("UPDATE batches SET lease_until = 0")
    database.close()


def test_no_line_is_lost_repeated_or_torn(tmp_path: Path) -> None:
    rng = random.Random(7)
    rows = [line(f"id-{number}", f"text {number}") for number in range(LINES)]
    child, url = start(tmp_path)
    with httpx.Client(base_url=url, timeout=60) as client:
        file_id = client.post("/v1/files", files={"file": "\n".join(rows)}, data={"purpose": "batch"}).json()["id"]
        body = {"input_file_id": file_id, "endpoint": "/v1/embeddings"}
        batch_id = client.post("/v1/batches", json=body).json()["id"]
    kills = 0
    while kills < KILLS:
        time.sleep(rng.uniform(0.0, 0.4))
        child.kill()
        child.communicate()
        kills += 1
        expire_leases(tmp_path)
        child, url = start(tmp_path)
    try:
        with httpx.Client(base_url=url, timeout=60) as client:
            while (batch := client.get(f"/v1/batches/{batch_id}").json())["status"] != "completed":
                assert batch["status"] in ("validating", "in_progress", "finalizing"), batch
                time.sleep(0.05)
            output = client.get(f"/v1/files/{batch['output_file_id']}/content").content
            bodies = {
                name: client.post("/v1/embeddings", json={"model": "mini", "input": f"text {name}"}).json()
                for name in (0, LINES // 2, LINES - 1)
            }
    finally:
        child.kill()
        child.communicate()
    found = [json.loads(row) for row in output.splitlines()]
    assert [row["custom_id"] for row in found] == [f"id-{number}" for number in range(LINES)]
    assert batch["request_counts"] == {"total": LINES, "completed": LINES, "failed": 0}
    for name, expected in bodies.items():
        assert found[name]["response"]["body"] == expected
    with sqlite3.connect(tmp_path / "batches.db") as database:
        (epoch,) = database.execute("SELECT epoch FROM batches").fetchone()
    database.close()
    assert epoch > 1  # it was taken over, not finished before the first death
