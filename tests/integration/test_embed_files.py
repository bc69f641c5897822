"""`embedyard embed` with a real model, killed in its midst."""

import json
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import httpx
import numpy as np
import pytest

from tests.testkit.servers import MODULE, environment, serve_here

pytestmark = pytest.mark.slow

MODEL = "all-MiniLM-L6-v2"
WORDS = (
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "a",
    "lazy",
    "dog",
    "and",
    "an",
    "old",
    "river",
    "runs",
    "down",
)


def write_input(path: Path, lines: int) -> list[str]:
    texts = [" ".join(WORDS[(n * k) % 15] for k in range(1, 2 + n * 7 % 60)) for n in range(lines)]
    path.write_text("".join(json.dumps({"id": f"d{n}", "text": text}) + "\n" for n, text in enumerate(texts)))
    return texts


def start(folder: Path, *arguments: str) -> "subprocess.Popen[str]":
    command = [*MODULE, "embed", MODEL, *arguments]
    return subprocess.Popen(
        command,
        cwd=folder,
        env=environment(str(folder / "state")),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(folder: Path, *arguments: str) -> None:
    process = start(folder, *arguments)
    _, log = process.communicate(timeout=100)
    assert process.returncode == 0, log


def test_a_job_killed_twice_has_the_bytes_of_an_undisturbed_one_and_the_servers_vectors(tmp_path: Path) -> None:
    texts = write_input(tmp_path / "in.jsonl", 96)
    options = ("in.jsonl", "--id-column", "id", "--window", "16")
    run(tmp_path, *options, "-o", "whole.jsonl")

    for commits in (2, 4):
        process = start(tmp_path, *options, "-o", "out.jsonl")
        journal = tmp_path / "out.jsonl.journal"
        while not journal.exists() or journal.read_bytes().count(b"\n") <= commits:
            assert process.poll() is None, process.communicate()
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert not (tmp_path / "out.jsonl").exists()
    run(tmp_path, *options, "-o", "out.jsonl")

    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == [f"d{n}" for n in range(96)]

    with tempfile.TemporaryDirectory() as folder, serve_here(Path(folder)) as server:
        body = {"model": MODEL, "input": texts}
        data = httpx.post(f"{server.url}/v1/embeddings", json=body, timeout=60).json()["data"]
        run(tmp_path, *options, "-o", "remote.npy", "--url", server.url)
    served = np.array([item["embedding"] for item in data], np.float32)

    # The last bit of float32 depends on which texts share a batch, also on the server.
    assert np.abs(np.array([row["embedding"] for row in rows], np.float32) - served).max() < 1e-6
    assert np.abs(np.load(tmp_path / "remote.npy") - served).max() < 1e-6
