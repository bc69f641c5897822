"""Runs test modules in a process of their own, because Ray changes the one that imports it."""

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

_ROOT = Path(__file__).parents[2]

_MAIN = "import os, sys, pytest; code = pytest.main(sys.argv[1:]); sys.stdout.flush(); os._exit(code)"
"""Without the interpreter's own end, which waits for threads of Ray's."""

_OPTIONS = [
    "-v",
    "-o",
    "asyncio_mode=strict",
    "-o",
    "filterwarnings=default",
    "--show-capture=no",
    "--disable-warnings",
]
"""Ray warns of itself when it is imported."""


def num_passed(*suites: Path, log: Path, timeout_s: int) -> Counter[str]:
    """Runs the tests of `suites`, each for `timeout_s` at most, and returns how many passed, by folder. All have to.

    Args:
        log: where the output goes: no pipe, which daemons of Ray would keep open.
    """
    command = [sys.executable, "-c", _MAIN, *_OPTIONS, "-o", f"timeout={timeout_s}", *map(str, suites)]
    environ = os.environ | {"PYTHONPATH": str(_ROOT)}
    with log.open("w") as out, subprocess.Popen(command, cwd=_ROOT, env=environ, stdout=out, stderr=out) as running:
        try:
            code = running.wait(540)
        except subprocess.TimeoutExpired:
            running.terminate()  # pytest ends its cluster then
            code = running.wait(50)
    printed = log.read_text()
    assert code == 0, printed[-12000:]
    return Counter(re.findall(r"(\w+)/\w+\.py::.* PASSED", printed))
