"""`embedyard bench` against a running server: what it prints, what it writes, and how it exits."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from engines.errors import QueueFull
from router.cli.bench import _own_key
from router.cli.main import cli
from router.config.settings import VARIABLES, Settings
from router.loadgen import Phase
from router.loadgen.progress import COLUMNS, Lines
from router.loadgen.report import Measured, Report
from tests.testkit.servers import Served, serve

ROOT = Path(__file__).parents[4]
QUICK = ("--seconds", "0.3", "--rate", "60")


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for variable in VARIABLES:
        monkeypatch.delenv(variable.name, raising=False)
    return tmp_path


@pytest.fixture(scope="module")
def keyed() -> Iterator[Served]:
    yield from serve(Settings(api_key="sesame"))


def bench(url: str, *args: str) -> Result:
    return CliRunner().invoke(cli, ["bench", url, *args], prog_name="embedyard")


def test_a_pipe_gets_one_line_a_load_and_the_report_is_a_file(served: Served, own_folder: Path) -> None:
    result = bench(served.url, *QUICK, "--clients", "2")
    rows = [line.split("\t") for line in result.stdout.splitlines()]
    report = json.loads((own_folder / "embedyard-bench.json").read_text())

    assert result.exit_code == 0, result.stderr
    assert [row[0] for row in rows] == ["60 requests/s", "2 clients"]
    assert {len(row) for row in rows} == {len(COLUMNS)}
    assert (own_folder / "embedyard-bench.png").exists()
    assert (report["model"], report["dimensions"], report["words"]) == ("mini", 8, 12)
    assert [int(row[2]) for row in rows] == [phase["requests"] for phase in report["phases"]]


def test_json_is_the_whole_report_and_nothing_else(served: Served, own_folder: Path) -> None:
    result = bench(served.url, *QUICK, "--json", "--no-report", "--texts", "3", "--model", "BAAI/bge-m3")
    found = json.loads(result.stdout)
    (phase,) = found["phases"]

    assert result.exit_code == 0
    assert found.keys() == set(Report.__struct_fields__)
    assert phase.keys() == set(Measured.__struct_fields__)
    assert phase["requests"] == sum(moment["requests"] for moment in phase["timeline"]) > 3
    assert phase["tokens_per_s"] > phase["texts_per_s"] > 2 * phase["requests"]
    assert {call.model_id for call in served.backend.calls} == {"BAAI/bge-m3"}
    assert {len(call.texts) for call in served.backend.calls} == {3}
    assert list(own_folder.iterdir()) == []


def test_the_fields_of_a_request_and_texts_of_ones_own_arrive(served: Served, own_folder: Path) -> None:
    (own_folder / "texts.txt").write_text("a cat\n\n  eine Katze\n猫\n", encoding="utf-8")
    result = bench(served.url, *QUICK, "--file", "texts.txt", "--dimensions", "4", "--no-report")

    assert result.exit_code == 0
    assert {text for call in served.backend.calls for text in call.texts} == {"a cat", "eine Katze", "猫"}
    assert {call.dimensions for call in served.backend.calls} == {4}


@pytest.mark.parametrize("route", ["rerank", "score"])
def test_a_rerank_route_is_asked_with_one_query_and_so_many_documents(served: Served, route: str) -> None:
    result = bench(served.url, *QUICK, "--route", route, "--texts", "3", "--json", "--no-report")
    found = json.loads(result.stdout)
    (phase,) = found["phases"]

    assert result.exit_code == 0, result.stderr
    assert (found["route"], found["dimensions"], found["texts_per_request"]) == (route, None, 3)
    assert phase["failed"] == 0
    assert phase["tokens_per_s"] > phase["texts_per_s"] > 2 * phase["requests"]
    assert {len(call.texts) for call in served.backend.calls} == {1, 3}, "queries and documents of an embedding model"


def test_fields_of_vectors_are_refused_for_scores(served: Served) -> None:
    result = bench(served.url, *QUICK, "--route", "rerank", "--dimensions", "4")

    assert result.exit_code == 2
    assert "fields of --route embeddings" in result.stderr
    assert served.backend.calls == []


@pytest.mark.parametrize(("bound", "exit_code"), [("60000", 0), ("0.001", 1)])
def test_a_bound_on_latency_decides_the_exit_code(served: Served, bound: str, exit_code: int) -> None:
    assert bench(served.url, *QUICK, "--no-report", "--max-p95", bound).exit_code == exit_code


@pytest.mark.parametrize(("allowed", "exit_code"), [((), 1), (("--max-errors", "99"), 0)])
def test_failed_requests_are_reported_and_decide_the_exit_code(
    served: Served, monkeypatch: pytest.MonkeyPatch, allowed: tuple[str, ...], exit_code: int
) -> None:
    answers, numbers = served.backend.run, count()

    async def all_but_some(call: object) -> object:
        if next(numbers) % 3 == 2:  # of those that count the first is answered, however few there are
            raise QueueFull("8192 texts wait already")
        return await answers(call)  # type: ignore[arg-type]

    monkeypatch.setattr(served.backend, "run", all_but_some)
    result = bench(served.url, *QUICK, "--no-report", *allowed)

    assert result.exit_code == exit_code
    assert "× 429 queue_full: 8192 texts wait already" in result.stderr


def test_a_load_without_one_answer_is_never_within_bounds(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("router.loadgen.requests.warm_up", answered)
    served.backend.failures["mini"] = QueueFull("no room")

    assert bench(served.url, *QUICK, "--no-report", "--max-errors", "100").exit_code == 1


async def answered(*_: object) -> int:
    return 8


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--model", "minni"), "404: Model 'minni' not found"),
        (("--file", "none.txt"), "none.txt: No such file"),
        (("--rate", "0"), "0.0 is not in the range"),
        (("--format", "int8"), "'int8' is not one of"),
    ],
)
def test_what_cannot_be_measured_exits_2_with_the_reason(served: Served, args: tuple[str, ...], message: str) -> None:
    result = bench(served.url, *args)

    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://127.0.0.1:9", "(Connection refused); is the server running?"),
        ("localhost:6008", "is not a server address"),
        ("http://me:secret@127.0.0.1:9", "pass the key with --api-key"),
    ],
)
def test_no_server_exits_2(url: str, message: str) -> None:
    result = bench(url)

    assert result.exit_code == 2
    assert message in result.stderr


@pytest.mark.parametrize("options", [(), ("--model", "mini")])
def test_a_server_that_wants_a_key_is_told_so(keyed: Served, options: tuple[str, ...]) -> None:
    refused = bench(keyed.url, *options)
    admitted = bench(keyed.url, *QUICK, *options, "--api-key", "sesame", "--no-report")

    assert refused.exit_code == 2
    assert "answered 401: Missing API key" in refused.stderr
    assert refused.stderr.endswith(
        "(pass the server's key with --api-key, or set API_KEY for a server on this machine)\n"
    )
    assert admitted.exit_code == 0


def test_control_c_leaves_a_report_and_prints_its_path(
    served: Served, own_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def press(self: Lines, phase: Phase) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Lines, "begin", press)
    result = bench(served.url, "--rate", "100", "--seconds", "60")
    report = json.loads((own_folder / "embedyard-bench.json").read_text())

    assert result.exit_code == 130
    assert report["is_whole"] is False
    assert report["phases"][0]["seconds"] < 10


def test_an_empty_file_and_a_folder_that_is_none_exit_2(served: Served, own_folder: Path) -> None:
    (own_folder / "empty").write_text("\n")
    empty = bench(served.url, "--file", "empty")
    nowhere = bench(served.url, *QUICK, "--report", "empty/sub/report")

    assert (empty.exit_code, nowhere.exit_code) == (2, 2)
    assert "empty: holds no text" in empty.stderr
    assert "choose another path with --report" in nowhere.stderr


def test_without_matplotlib_there_is_a_report_and_a_hint(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = bench(served.url, *QUICK)

    assert result.exit_code == 0
    assert "report: embedyard-bench.json" in result.stderr
    assert "pip install 'embedyard[bench]'" in result.stderr


def test_it_needs_no_torch_and_a_pipe_needs_no_rich(served: Served) -> None:
    program = f"""
import sys
from router.cli.main import cli
cli(["bench", {served.url!r}, "--seconds", "0.1", "--no-report"], standalone_mode=False)
heavy = {{"torch", "transformers", "huggingface_hub", "litestar", "uvicorn", "rich", "matplotlib"}} & set(sys.modules)
print("heavy:", *sorted(heavy))
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)

    assert done.stdout.splitlines()[-1] == "heavy:"


@pytest.mark.parametrize(
    ("url", "key"),
    [("http://127.0.0.1:6008", "own"), ("http://localhost/v1", "own"), ("https://api.example.com", None)],
)
def test_the_key_of_this_setup_is_not_sent_to_other_machines(
    own_folder: Path, monkeypatch: pytest.MonkeyPatch, url: str, key: str | None
) -> None:
    monkeypatch.setenv("API_KEY", "own")

    assert _own_key(url) == key
