"""Runs `ray_suite.py`, jobs of `embedyard embed --ray` on a real cluster, in a separate process."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("ray", reason="pip install 'embedyard[ray]'")
pytest.importorskip("pandas", reason="pip install 'embedyard[ray]'")
pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[4]
SUITE = Path(__file__).with_name("ray_suite.py")


@pytest.mark.timeout(600)
def test_jobs_on_a_cluster_are_those_of_the_ordinary_form(tmp_path: Path) -> None:
    # Without the interpreter's own end, which waits for threads of Ray's.
    main = "import os, sys, pytest; code = pytest.main(sys.argv[1:]); sys.stdout.flush(); os._exit(code)"
    options = ["-v", "-o", "timeout=400", "-o", "asyncio_mode=strict", "-o", "filterwarnings=default"]
    command = [sys.executable, "-c", main, *options, "--show-capture=no", "--disable-warnings", str(SUITE)]
    log = tmp_path / "log"  # and no pipe, which daemons of Ray would keep open

    environ = os.environ | {"PYTHONPATH": str(ROOT)}
    with log.open("w") as out, subprocess.Popen(command, cwd=ROOT, env=environ, stdout=out, stderr=out) as suite:
        try:
            code = suite.wait(420)
        except subprocess.TimeoutExpired:
            suite.terminate()  # pytest ends its cluster then
            code = suite.wait(60)

    printed = log.read_text()
    passed = re.search(r"(\d+) passed", printed)
    assert code == 0, printed[-12000:]
    assert passed is not None
    assert int(passed[1]) >= 11
