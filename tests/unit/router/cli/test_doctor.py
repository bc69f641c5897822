"""`embedyard doctor`: every check, passing and failing, and the JSON output."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from huggingface_hub import constants

from engines import planner
from engines.testing.fakes import FakeMemory
from router.app import create_app
from router.cli import doctor
from router.cli import doctor as diagnosis
from router.cli.main import cli
from router.config.settings import VARIABLES, Settings
from tests.testkit.backends import ScriptedBackend
from tests.testkit.servers import REGISTRY, serving_in_thread

LOCAL = "version: 1\nmodels:\n  - {name: here, source: ./here}\n"
REMOTE = "version: 1\nmodels:\n  - {name: away, source: org/away}\n"


class Refusal(BaseHTTPRequestHandler):
    """A hub that responds 403."""

    def do_HEAD(self) -> None:
        self.send_error(403)

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing."""


@pytest.fixture
def refusing_hub() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), Refusal)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://user:password@127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(autouse=True)
def setup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a registry of one remote model, an empty cache, and no hub."""
    monkeypatch.chdir(tmp_path)
    for variable in VARIABLES:
        monkeypatch.delenv(variable.name, raising=False)
    monkeypatch.setenv("DEVICE", "cpu")
    monkeypatch.setenv("STATE_DIR", str(tmp_path))
    monkeypatch.setenv("PORT", "0")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "not" / "yet"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(planner, "device_memory", lambda device: FakeMemory(10 * 10**9))
    (tmp_path / "registry.yaml").write_text(REMOTE)
    return tmp_path


def run(*args: str) -> Result:
    return CliRunner().invoke(cli, ["doctor", *args], prog_name="embedyard")


def findings() -> dict[str, diagnosis.Finding]:
    return {finding.name: finding for finding in diagnosis.run_checks()}


def test_a_sound_setup_prints_plain_lines_and_exits_0() -> None:
    result = run()
    lines = [line.split("\t") for line in result.stdout.splitlines()]

    assert result.exit_code == 0
    names = ["packages", "settings", "cpu", "hardware", "registry", "precision", "disk", "hub"]
    assert [line[1] for line in lines] == names
    assert lines[2][2].startswith("9.3 GiB, budget 7.5 GiB")
    assert lines[4][2] == "1 models, 0 of them on disk"


def test_json_holds_what_the_lines_hold() -> None:
    result = run("--json")
    found = json.loads(result.stdout)

    assert {"name", "verdict", "detail", "cure"} == set(found[0])
    assert [entry["name"] for entry in found][:2] == ["packages", "settings"]


def test_a_terminal_gets_a_table_with_the_cures(setup: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "is_terminal", lambda: True)
    monkeypatch.setenv("COLUMNS", "200")
    (setup / "registry.yaml").write_text("version: 1\nmodels: [{name: [bold]a, source: o/a}]\n")
    result = run()

    assert result.exit_code == 1
    assert "→ correct the named keys" in result.stdout


def test_wrong_settings_end_the_examination_with_every_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PORT", "99999")
    monkeypatch.setenv("LOG_LEVEL", "loud")
    result = run()

    assert result.exit_code == 1
    assert "PORT=99999" in result.stdout
    assert "LOG_LEVEL=loud" in result.stdout
    assert "registry" not in result.stdout


def test_a_setting_that_is_misspelt_is_a_warning(setup: Path) -> None:
    (setup / ".env").write_text("API_KEYS=secret\n")
    result = run()

    assert result.exit_code == 0
    assert "warn\tsettings\tAPI_KEYS is not a setting, and is ignored: did you mean API_KEY?" in result.stdout
    assert "secret" not in result.stdout


def test_a_key_is_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("API_KEY", "hush-hush-hush")
    result = run()

    assert "guarded by API_KEY" in result.stdout
    assert "hush" not in result.stdout


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnosis, "PACKAGES", ("torch", "no-such-package-of-ours"))
    found = diagnosis.check_packages()

    assert (found.verdict, found.detail) == ("fail", "not installed: no-such-package-of-ours")
    assert found.cure


def test_a_port_that_another_process_has_is_a_failure(monkeypatch: pytest.MonkeyPatch, refusing_hub: str) -> None:
    monkeypatch.setenv("PORT", refusing_hub.rpartition(":")[2])
    found = findings()["address"]

    assert found.verdict == "fail"
    assert "Address already in use" in found.detail
    assert "choose another PORT" in found.cure


def test_a_server_that_runs_already_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    app = create_app(Settings(), REGISTRY, ScriptedBackend("mini"))
    with serving_in_thread(app) as url:
        monkeypatch.setenv("PORT", url.rpartition(":")[2])
        found = findings()["address"]

    assert (found.verdict, found.detail.endswith("in use, by Embedyard")) == ("warn", True)


def test_a_gpu_that_pytorch_does_not_use_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    without = diagnosis.check_hardware()
    monkeypatch.setattr(diagnosis, "count_nvidia_gpus", lambda: 2)
    monkeypatch.setattr("engines.machine.find_devices", lambda names: ("cpu",))
    unused = diagnosis.check_hardware()
    monkeypatch.setattr("engines.machine.find_devices", lambda names: ("cuda:0", "cuda:1"))
    used = diagnosis.check_hardware()

    assert (without.verdict, unused.verdict, used.verdict) == ("ok", "warn", "ok")
    assert "does not use the 2 NVIDIA GPUs here" in unused.detail
    assert "COMPUTE=cuda" in unused.cure


def test_a_device_that_is_not_here_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEVICE", "cuda:77")
    found = findings()["devices"]

    assert found.verdict == "fail"
    assert "cuda:77" in found.detail


def test_memory_that_others_hold_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    device = FakeMemory(10 * 10**9)
    device.ceiling_bytes = 10**9
    monkeypatch.setattr(planner, "device_memory", lambda name: device)
    result = run()

    assert result.exit_code == 0
    assert "warn\tcpu\t9.3 GiB, budget 7.5 GiB" in result.stdout
    assert "only 954 MiB are free now" in result.stdout


def test_a_local_model_without_its_files_is_a_failure(setup: Path) -> None:
    (setup / "registry.yaml").write_text(LOCAL)
    found = findings()["registry"]

    assert found.verdict == "fail"
    assert "files not found: here" in found.detail


def test_a_broken_keys_file_is_a_failure(setup: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (setup / "keys.yaml").write_text("- {id: a}\n")
    monkeypatch.setenv("KEYS_FILE", "keys.yaml")

    assert findings()["keys"].verdict == "fail"


@pytest.mark.parametrize(("free_bytes", "verdict"), [(5 * 10**8, "fail"), (5 * 10**9, "warn"), (10**11, "ok")])
def test_disk_space_is_judged(free_bytes: int, verdict: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage:
        free = free_bytes

    monkeypatch.setattr("shutil.disk_usage", lambda path: Usage)

    assert findings()["disk"].verdict == verdict


def test_folders_that_cannot_be_written_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: False)
    found = findings()

    assert (found["disk"].verdict, found["state"].verdict) == ("fail", "warn")


def test_a_hub_that_answers_with_a_refusal_is_reachable(refusing_hub: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", refusing_hub)
    found = diagnosis.check_hub()

    assert found.verdict == "ok"
    assert "password" not in found.detail


def test_a_hub_that_is_not_there_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    found = diagnosis.check_hub()

    assert found.verdict == "warn"
    assert "HF_ENDPOINT" in found.cure
