"""Infinity's client, from the environment that it shares with LiteLLM: it is pinned to an older httpx."""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from engines.testing.fakes import fake_vector
from tests.contract.conftest import KEY
from tests.contract.test_litellm import PYTHON

SCRIPT = Path(__file__).with_name("infinity_script.py")
TEXTS = ("the first text", "another one")


def test_infinitys_client(url: str) -> None:
    """It sends `dimensions: 0` and the model `default/not-specified` unless it is told otherwise."""
    environ = os.environ | {"BASE_URL": url, "API_KEY": KEY}
    if not PYTHON.exists() or subprocess.run([PYTHON, "-c", "import infinity_client"], check=False).returncode:
        pytest.skip("infinity_client is not installed: make install-test")
    done = subprocess.run([PYTHON, SCRIPT], env=environ, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])

    assert [model for model in seen["models"] if model[0] == "mini"] == [["mini", "infinity", 0]]
    for name, model, width in (("named", "org/other", 16), ("unnamed", "mini", 16), ("narrow", "mini", 4)):
        found, tokens, vectors = seen[name]
        assert (found, tokens) == (model, 9)
        assert np.array_equal(np.array(vectors, np.float32), [fake_vector(model, text, width) for text in TEXTS])
