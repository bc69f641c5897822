"""Tests the units with systemd."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.deploy.proxies import DEPLOY

UNITS = sorted((DEPLOY / "systemd").iterdir())
MOST_EXPOSED = 2.5
"""Of ten, in systemd's own count; 9.6 is a unit that says nothing."""

pytestmark = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="there is no systemd-analyze")


def test_systemd_understands_every_unit(tmp_path: Path) -> None:
    """Only the paths of programs are replaced."""
    for unit in UNITS:
        text = unit.read_text().replace("/opt/embedyard/bin/embedyard", "/bin/true")
        (tmp_path / unit.name).write_text(text)
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *(tmp_path / unit.name for unit in UNITS)],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    assert [line for line in done.stderr.splitlines() if str(tmp_path) in line] == []


def test_the_server_gives_up_what_it_does_not_need() -> None:
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=yes", "--no-pager", DEPLOY / "systemd/embedyard.service"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    level = re.search(r"exposure level for embedyard.service: ([\d.]+)", done.stdout)

    assert level is not None, done.stdout + done.stderr
    assert float(level[1]) <= MOST_EXPOSED


def test_a_server_that_says_it_must_be_restarted_is() -> None:
    health = (DEPLOY / "systemd/embedyard-health.service").read_text()
    script = re.search(r"ExecStart=/bin/sh -c '(.*)'", health)

    assert script is not None
    for answer, restarted in (("true", ""), ("false", "restart embedyard.service\n")):
        fakes = f'curl() {{ {answer}; }}; systemctl() {{ echo "$@"; }}; '
        done = subprocess.run(["sh", "-c", fakes + script[1]], capture_output=True, text=True, check=True)
        assert done.stdout == restarted
