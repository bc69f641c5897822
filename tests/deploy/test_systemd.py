"""Tests the units with systemd."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from engines.types import Budget
from router.config.settings import Settings, read_settings
from tests.deploy.proxies import DEPLOY

PARSER = Path("/usr/lib/systemd/user-environment-generators/30-systemd-environment-d-generator")
ENV_EXAMPLE = (DEPLOY.parent / ".env.example").read_text(encoding="utf-8")
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


def environment(text: str, folder: Path) -> dict[str, str]:
    """What systemd reads from a file of variables, by its own parser: the generator of environment.d has the same.

    It leaves out empty values, which count as not set anyway, and says so.
    """
    (folder / "environment.d").mkdir()
    (folder / "environment.d/50.conf").write_text(text)
    done = subprocess.run(
        [PARSER], capture_output=True, text=True, timeout=60, check=True, env={"XDG_CONFIG_HOME": str(folder)}
    )
    refused = re.findall(r'invalid syntax \(around "(.*)"\)', done.stderr)
    assert [name for name in refused if f"\n{name}=\n" not in text] == []
    return dict(line.split("=", 1) for line in done.stdout.splitlines())


@pytest.mark.skipif(not PARSER.exists(), reason="systemd's generators are not installed")
def test_the_example_of_settings_is_an_environment_file(tmp_path: Path) -> None:
    """With every value in it: systemd reads what `embedyard` reads."""
    unit = (DEPLOY / "systemd/embedyard.service").read_text()
    text = re.sub(r"^#(?=[A-Z_]+=)", "", ENV_EXAMPLE, flags=re.MULTILINE)
    found = environment(text.replace("\nAPI_KEY=\n", "\nAPI_KEY=a+/key\n"), tmp_path)

    assert "EnvironmentFile=-/etc/embedyard/env\n" in unit
    assert found["API_KEY"] == "a+/key"
    assert found["RATE_LIMIT_STORAGE"] == "async+memory://"
    settings = read_settings({**found, "API_KEY": ""})
    assert settings == Settings(memory_budget=Budget(fraction=0.8))


def test_a_server_that_says_it_must_be_restarted_is() -> None:
    health = (DEPLOY / "systemd/embedyard-health.service").read_text()
    script = re.search(r"ExecStart=/bin/sh -c '(.*)'", health)

    assert script is not None
    for answer, restarted in (("true", ""), ("false", "restart embedyard.service\n")):
        fakes = f'curl() {{ {answer}; }}; systemctl() {{ echo "$@"; }}; '
        done = subprocess.run(["sh", "-c", fakes + script[1]], capture_output=True, text=True, check=True)
        assert done.stdout == restarted
