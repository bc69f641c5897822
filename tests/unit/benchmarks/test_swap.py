"""The benchmark of ways from a request to an answer: its rows, its plot, and programs that are not there."""

import importlib.util
import sys
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import save_file

from benchmarks.lib import servers
from benchmarks.lib.machine import Watch
from benchmarks.lib.report import Report, can_draw, save
from benchmarks.lib.servers import Plan
from benchmarks.lib.worker import WorkerFailed
from benchmarks.lifecycle import read, swap
from benchmarks.lifecycle.swap import Swap, draw_steps, rows_of, sample
from benchmarks.lifecycle.ways import WAYS, Answer, Ask, Way, replaced

SERVER = """
import json, os, sys
from http.server import BaseHTTPRequestHandler, HTTPServer
class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        body = json.dumps({"data": [{"index": 0, "embedding": [float(os.getpid()), 1.0]}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *_): pass
HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""
"""A server whose vectors have the id of its process."""


def answer(seconds: float, *vector: float) -> Answer:
    return Answer(seconds, np.array(vector, dtype=np.float32))


def a_way(key: str, *answers: Answer) -> Way:
    @contextmanager
    def opened(folder: Path) -> Iterator[Mapping[str, Ask]]:
        waiting = iter(answers)
        yield {f"{key} of {folder.name}": lambda: next(waiting)}

    return Way(key, opened)


@contextmanager
def missing(folder: Path) -> Iterator[Mapping[str, Ask]]:
    raise WorkerFailed("Infinity is not installed: python -m benchmarks.lib.peers\nand more")
    yield {}


def test_the_first_answer_of_a_way_is_not_counted_and_a_program_that_is_missing_is_said() -> None:
    ways = [a_way("ours", answer(9.0, 1.0), answer(1.0, 1.0), answer(2.0, 1.0)), Way("infinity", missing)]

    found, notes = sample(ways, Path("minilm"), 2)

    assert {name: [each.seconds for each in answers] for name, answers in found.items()} == {
        "ours of minilm": [1.0, 2.0]
    }
    assert notes == ["left out: Infinity is not installed: python -m benchmarks.lib.peers"]


def test_every_program_that_is_not_installed_is_left_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(servers, "is_installed", lambda environment: environment is None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)

    found, notes = sample([way for way in WAYS if not way.key.startswith("embedyard")], tmp_path, 1)

    assert found == {}
    assert notes == [
        *["left out: sentence-transformers is not installed: make install-bench"] * 2,
        "left out: FastAPI + sentence-transformers is not installed: python -m benchmarks.lib.peers",
        "left out: Infinity (torch) is not installed: python -m benchmarks.lib.peers",
    ]


def test_a_row_has_the_median_the_worst_and_how_far_its_vectors_are_from_ours() -> None:
    ours = [answer(0.1, 0.0, 1.0), answer(0.2, 0.0, 1.0), answer(0.4, 0.0, 1.0)]

    assert rows_of({"ours": ours, "theirs": [answer(3.0, 0.0, 0.75)]}) == [
        ("ours", "0.200", "0.400", "0e+00"), ("theirs", "3.000", "3.000", "2e-01"),
    ]  # fmt: skip


def test_a_process_is_swapped_the_old_one_has_ended_when_the_new_one_answers() -> None:
    plan = Plan("fake", "m", lambda port: [sys.executable, "-c", SERVER, str(port)])

    with replaced("fake", plan) as asks:
        (ask,) = asks.values()
        first, second = ask(), ask()
        first_pid, second_pid = int(first.vector[0]), int(second.vector[0])
        assert not psutil.pid_exists(first_pid)
        assert psutil.pid_exists(second_pid)

    assert first_pid != second_pid
    assert not psutil.pid_exists(second_pid)
    assert list(asks) == ["fake, process swapped"]
    assert second.seconds > 0


@pytest.mark.skipif(not can_draw(), reason="needs matplotlib")
def test_the_plot_has_every_model_whose_result_is_there_from_the_smallest_on(tmp_path: Path) -> None:
    for model, size in (("large", 10**9), ("small", 10**6)):
        seconds = {"Embedyard, ready": [0.01], **({"Infinity (torch), process swapped": [9.0]} if size < 10**9 else {})}
        report = Report(
            name=f"swap-{model}", title="", machine=Watch().machine, settings={"model": model, "weight_bytes": size},
            header=(), rows=[], samples={"seconds": seconds},
        )  # fmt: skip
        save(report, tmp_path)

    swap.draw(tmp_path)

    drawn = (tmp_path / "swap.svg").read_text()
    assert drawn.index("small, 1 MB") < drawn.index("large, 1,000 MB")
    assert "Infinity (torch), process swapped" in drawn


@pytest.mark.skipif(not can_draw(), reason="needs matplotlib")
def test_steps_of_a_load_lie_on_each_other_for_every_model(tmp_path: Path) -> None:
    one = Swap(
        device_s=0.1, host_s=0.2, load_s=1.0, check_s=0.5, answer_s=0.25, park_s=0.1, weight_bytes=1, moved_bytes=0
    )

    draw_steps(tmp_path / "steps.svg", {"minilm": [one, one], "minilm in bfloat16": [one]})

    drawn = (tmp_path / "steps.svg").read_text()
    assert one.disk_s == 1.75
    assert {
        text for text in ("minilm in bfloat16", "read and build", "check and warm up") if text not in drawn
    } == set()


def test_readers_that_are_not_installed_are_said_and_cost_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(read, "is_installed", lambda environment: False)

    with read.open_readers(tmp_path / "missing.safetensors", ["Run:ai streamer"]) as (workers, notes):
        assert workers == []

    assert notes == ["left out: Run:ai streamer is not installed: python -m benchmarks.lib.peers"]


def test_a_checksum_is_that_of_the_bytes_in_the_order_of_names(tmp_path: Path) -> None:
    tensors = {"b": torch.arange(6, dtype=torch.int64), "a": torch.ones(3, 2, dtype=torch.bfloat16)}
    save_file(tensors, tmp_path / "model.safetensors")
    content = b"".join(tensors[name].view(-1).view(torch.uint8).numpy().tobytes() for name in ("a", "b"))

    assert read.checksum(tmp_path / "model.safetensors") == zlib.crc32(content)
