"""What the server and its commands do without a Ray cluster; `test_ray_suites.py` has one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("ray", reason="pip install 'embedyard[ray]'")
pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[4]


def test_a_server_that_does_not_use_ray_imports_nothing_of_it() -> None:
    code = (
        "import sys; from router.registry.registry import Registry; from router.config.settings import Settings;"
        "from router.backends.factory import open_backend; from router.app import create_app;"
        "backend = open_backend(Settings(device=('cpu',)), Registry());"
        "create_app(Settings(), Registry(), backend);"
        "ours = 'router.backends.ray';"
        "found = [name for name in sys.modules if name.partition('.')[0] == 'ray' or name.startswith(ours)];"
        "print(type(backend).__name__, found)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)

    assert done.stdout.split(maxsplit=1) == ["LocalBackend", "[]\n"]


def test_without_a_cluster_the_commands_say_what_to_do() -> None:
    """All in one process, because importing Ray takes seconds."""
    code = (
        "from click.testing import CliRunner; from router.cli.main import cli;"
        "ends = [CliRunner().invoke(cli, line.split()) for line in ('ray deploy', 'ray remove', 'serve --port 0')];"
        "print([(end.exit_code, 'no Ray cluster answers at 127.0.0.1:1: start one' in end.output) for end in ends])"
    )
    environ = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    environ |= {"BACKEND": "ray", "RAY_ADDRESS": "127.0.0.1:1"}

    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=ROOT, env=environ, capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip

    assert done.stdout.strip() == str([(2, True)] * 3)
