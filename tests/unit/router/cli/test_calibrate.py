"""`embedyard calibrate`: its output is valid in the registry, and makes a single text quantizable."""

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from router.app import create_app
from router.cli import calibrate as calibration
from router.cli.client import RemoteError, get
from router.cli.main import cli
from router.config.settings import VARIABLES, Settings
from router.registry.registry import parse_registry
from tests.testkit.backends import ScriptedBackend, vector
from tests.testkit.servers import REGISTRY, serving_in_thread

TEXTS = [f"text number {index * index}" for index in range(150)]


@pytest.fixture
def url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A server with a key, a file of texts, and no other settings."""
    monkeypatch.chdir(tmp_path)
    for variable in VARIABLES:
        monkeypatch.delenv(variable.name, raising=False)
    monkeypatch.setenv("API_KEY", "sk-1")
    Path("texts.txt").write_text("\n \n".join(TEXTS))
    with serving_in_thread(create_app(Settings(api_key="sk-1"), REGISTRY, ScriptedBackend("mini"))) as url:
        yield url


def calibrate(*args: str) -> Result:
    return CliRunner().invoke(cli, ["calibrate", *args], prog_name="embedyard")


def test_what_it_prints_goes_into_the_registry(url: str) -> None:
    result = calibrate("text-embedding-3-small", "texts.txt", "--url", url)
    spec = parse_registry(f"version: 1\nmodels:\n  - name: mini\n    source: o/mini\n{result.stdout}").models["mini"]
    vectors = np.array([vector(text) for text in TEXTS])

    assert (result.exit_code, result.stderr) == (0, "")
    assert "of mini, from 150 texts" in result.stdout
    assert spec.calibration is not None
    assert spec.calibration.lowest == pytest.approx(vectors.min(axis=0), abs=1e-5)
    assert spec.calibration.highest == pytest.approx(vectors.max(axis=0), abs=1e-5)


def test_width_and_prompt_are_those_that_clients_will_use(url: str) -> None:
    result = calibrate("mini", "texts.txt", "--url", url, "--dimensions", "4", "--input-type", "query")

    assert result.exit_code == 0
    assert result.stdout.count(",") == 1 + 3 + 3


def test_few_texts_are_warned_of(url: str) -> None:
    Path("texts.txt").write_text("one\ntwo\n")

    result = calibrate("mini", "texts.txt", "--url", url)

    assert result.exit_code == 0
    assert result.stderr == "warning: 2 texts are too few for the ranges of 8 components\n"


@pytest.mark.parametrize(
    ("model", "texts", "words"),
    [
        ("mnii", "texts.txt", "did you mean mini?"),
        ("mini", "nothing.txt", "nothing.txt cannot be read: No such file"),
        ("mini", "binary", "binary cannot be read: not UTF-8"),
        ("mini", "short", "short has 1 lines with text; at least 2 are required"),
    ],
)
def test_a_mistake_is_reported_with_its_remedy(url: str, model: str, texts: str, words: str) -> None:
    Path("binary").write_bytes(b"\xff\xfe\x00")
    Path("short").write_text("one\n\n")

    result = calibrate(model, texts, "--url", url)

    assert (result.exit_code, result.stdout) == (2, "")
    assert words in result.stderr


def test_a_wrong_key_and_a_silent_address_are_reported(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("API_KEY", "sk-2")
    refused = calibrate("mini", "texts.txt", "--url", url)
    silent = calibrate("mini", "texts.txt", "--url", "http://127.0.0.1:9")

    assert (refused.exit_code, silent.exit_code) == (2, 2)
    assert "set ADMIN_API_KEY or API_KEY to the server's key" in refused.stderr
    assert "no server answers at http://127.0.0.1:9" in silent.stderr


def test_a_model_may_be_loaded_for_the_first_request(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []

    def get_and_note(*args: Any, timeout_s: float = 30.0, **more: Any) -> Any:
        waits.append(timeout_s)
        return get(*args, timeout_s=timeout_s, **more)

    monkeypatch.setattr(calibration, "get", get_and_note)

    assert calibrate("mini", "texts.txt", "--url", url).exit_code == 0
    assert min(waits) > Settings().load_timeout_s


def test_a_server_that_takes_too_long_is_not_called_absent() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with pytest.raises(RemoteError, match=r"has not answered within 0\.05 s"):
            get(url, "/v1/models", dict[str, Any], timeout_s=0.05)
