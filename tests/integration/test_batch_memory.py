"""Tests that a large file costs a server no memory: 160 MiB here, `BATCH_FILE_MIB=2048` in earnest."""

import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from msgspec import structs

from benchmarks.lifecycle.batch_kills import MODEL, Life, build_site

pytestmark = [pytest.mark.slow, pytest.mark.timeout(580)]
MIB = 2**20
FILE_MIB = int(os.environ.get("BATCH_FILE_MIB", "160"))
ALLOWED_MIB = 100
LINE = json.dumps(
    {"custom_id": "{}", "method": "POST", "url": "/v1/embeddings", "body": {"model": MODEL, "input": "x" * 4000}}
)
HEAD = b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n--b\r\nContent-Disposition: form-data; '
HEAD += b'name="file"; filename="a.jsonl"\r\n\r\n'


def pieces() -> Iterator[bytes]:
    """Yield a multipart body of FILE_MIB, about 1 MiB at once, without ever having it whole."""
    yield HEAD
    number, rows, num_bytes, total = 0, [], 0, 0
    while total + 2 * MIB < FILE_MIB * MIB:  # the last piece is a little longer
        rows.append(LINE.replace("{}", f"id-{number}").encode() + b"\n")
        num_bytes += len(rows[-1])
        number += 1
        if num_bytes >= MIB:
            yield b"".join(rows)
            total += num_bytes
            rows, num_bytes = [], 0
    yield b"\r\n--b--\r\n"


class Peak:
    """The most resident bytes of a process while the block runs."""

    def __init__(self, pid: int) -> None:
        self._process = psutil.Process(pid)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self.rss_bytes = self.before_bytes = self._process.memory_info().rss

    def __enter__(self) -> "Peak":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    @property
    def grown_mib(self) -> float:
        return (self.rss_bytes - self.before_bytes) / MIB

    def _watch(self) -> None:
        while not self._ended.wait(0.02):
            self.rss_bytes = max(self.rss_bytes, self._process.memory_info().rss)


def test_upload_batch_and_download_of_a_large_file_take_less_than_100_mib(tmp_path: Path) -> None:
    site = structs.replace(build_site(tmp_path), settings={"BACKEND": "process"})
    life = Life(site)
    try:
        life.wait()
        with httpx.Client(base_url=life.url, timeout=600) as client, Peak(life.process.pid) as peak:
            headers = {"content-type": "multipart/form-data; boundary=b"}
            file = client.post("/v1/files", content=pieces(), headers=headers).raise_for_status().json()
            body = {"input_file_id": file["id"], "endpoint": "/v1/embeddings"}
            batch = client.post("/v1/batches", json=body).raise_for_status().json()
            while batch["request_counts"]["completed"] == 0:
                time.sleep(0.05)
                batch = client.get(f"/v1/batches/{batch['id']}").json()
            client.post(f"/v1/batches/{batch['id']}/cancel")
            with client.stream("GET", f"/v1/files/{file['id']}/content") as answer:
                received = sum(map(len, answer.iter_raw()))
    finally:
        life.kill("server")

    assert received == file["bytes"] > (FILE_MIB - 3) * MIB
    assert peak.grown_mib < ALLOWED_MIB, f"{peak.grown_mib:.0f} MiB for a file of {FILE_MIB} MiB"
