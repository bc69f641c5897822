"""Tests OpenAI's Node client, from npm. Skipped without node, or when npm cannot fetch it the first time."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engines.testing.fakes import fake_vector
from tests.contract.conftest import KEY

VERSION = "6.49.0"
SCRIPT = Path(__file__).with_name("openai_client.mjs")
FOLDER = Path(sys.prefix) / "clients" / "node"
"""Inside the virtual environment: kept between runs, ignored by git, gone with the environment."""


@pytest.fixture(scope="module")
def node() -> str:
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        pytest.skip("node and npm are not installed")
    package = FOLDER / "node_modules" / "openai" / "package.json"
    if not package.is_file() or json.loads(package.read_text())["version"] != VERSION:
        FOLDER.mkdir(parents=True, exist_ok=True)
        quiet = ["--no-audit", "--no-fund", "--silent", "--fetch-retries=0", "--fetch-timeout=20000"]
        done = subprocess.run(
            [npm, "install", *quiet, f"openai@{VERSION}"], cwd=FOLDER, capture_output=True, check=False
        )
        if done.returncode != 0:
            pytest.skip(f"npm cannot fetch openai {VERSION} from here")
    return node


@pytest.fixture(scope="module")
def seen(node: str, url: str) -> dict[str, Any]:
    """Return the script's output. Node finds packages beside the script, so a copy of the script is put there."""
    script = FOLDER / SCRIPT.name
    shutil.copyfile(SCRIPT, script)
    environ = os.environ | {"BASE_URL": url, "API_KEY": KEY}
    done = subprocess.run([node, script], env=environ, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_vectors_and_usage_arrive(seen: dict[str, Any]) -> None:
    expected = np.array([fake_vector("mini", text) for text in ("the first text", "another one")])

    assert np.array_equal(np.array(seen["vectors"], np.float32), expected)
    assert np.array_equal(np.array(seen["narrow"], np.float32), fake_vector("mini", "a b", 4))
    assert (seen["model"], seen["usage"]) == ("mini", {"prompt_tokens": 9, "total_tokens": 9})
    assert "forward;dur=" in seen["timing"]


def test_models_are_listed_and_found(seen: dict[str, Any]) -> None:
    assert seen["models"] == ["mini", "org/other", "openais-ids"]
    assert seen["other"] == "org/other"


def test_a_batch_runs_from_upload_to_download(seen: dict[str, Any]) -> None:
    assert seen["batch"]["status"] == "completed"
    assert seen["batch"]["request_counts"] == {"total": 2, "completed": 2, "failed": 0}
    expected = [fake_vector("mini", text) for text in ("the first text", "another one")]
    assert np.allclose(np.array(seen["batchVectors"], np.float32), np.array(expected), atol=1e-6)
    assert seen["batchListed"]
    assert seen["cancelled"] == {"kind": "ConflictError", "status": 409, "code": "batch_finished", "param": None}


def test_bad_lines_land_in_the_error_file(seen: dict[str, Any]) -> None:
    assert seen["bad"] == {
        "counts": {"total": 3, "completed": 1, "failed": 2},
        "errors": [[None, "invalid_json", None], ["0", "duplicate_custom_id", None]],
    }


def test_a_cancelled_batch_stops_and_keeps_what_is_done(seen: dict[str, Any]) -> None:
    stopped = seen["stopped"]

    assert stopped["status"] == "cancelled"
    assert stopped["rows"] == stopped["completed"] < 3000
    assert stopped["ms"] < 1000
    assert seen["fileListed"]


def test_refusals_become_the_clients_own_errors(seen: dict[str, Any]) -> None:
    assert seen["badWidth"] == {
        "kind": "BadRequestError", "status": 400, "code": "dimensions_not_supported", "param": "dimensions"
    }  # fmt: skip
    assert seen["noModel"]["kind"] == "NotFoundError"
    assert seen["badKey"]["kind"] == "AuthenticationError"
