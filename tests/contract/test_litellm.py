"""Tests LiteLLM in its own environment: its pins would change openai, huggingface_hub and filelock of this one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from engines.testing.fakes import fake_vector
from tests.contract.conftest import KEY

PYTHON = Path(sys.prefix) / "clients" / "litellm" / "bin" / "python"
SCRIPT = Path(__file__).with_name("litellm_client.py")


def test_litellm(url: str) -> None:
    if not PYTHON.exists():
        pytest.skip("litellm is not installed: make install-test")
    environ = os.environ | {"BASE_URL": url, "API_KEY": KEY, "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    done = subprocess.run([PYTHON, SCRIPT], env=environ, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    expected = np.array([fake_vector("mini", text) for text in ("the first text", "another one")])

    assert np.array_equal(np.array(seen["vectors"], np.float32), expected)
    assert np.array_equal(np.array(seen["narrow"], np.float32), fake_vector("mini", "a b", 4))
    assert (seen["tokens"], seen["refusal"]) == (9, 404)
