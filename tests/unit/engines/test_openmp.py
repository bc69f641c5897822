"""Threads of OpenMP wait for the next product for some microseconds before they sleep."""

import os
import subprocess
import sys

import pytest

_SCRIPT = "import os, engines; print(os.environ['OMP_WAIT_POLICY'], os.environ['GOMP_SPINCOUNT'])"


@pytest.mark.skipif(sys.platform != "linux", reason="GNU OpenMP is Linux's")
@pytest.mark.parametrize(
    ("own", "expected"),
    [({}, "ACTIVE 3000"), ({"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "7"}, "PASSIVE 7")],
    ids=["by default", "as the operator says"],
)
def test_the_engines_say_how_long_before_torch_is_imported(own: dict[str, str], expected: str) -> None:
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}

    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT], capture_output=True, text=True, check=True, env=variables | own, timeout=60
    )

    assert done.stdout.split() == expected.split()
