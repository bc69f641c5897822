"""Tests the backup of deploy/README.md, made and restored by its commands: the restored cache serves without a hub."""

import re
import subprocess
from pathlib import Path

import pytest

from benchmarks.lib.hub import LoopbackHub
from benchmarks.lib.small_memory import Truth, build_truths, hub_config, real_server, specs_of
from tests.deploy.proxies import DEPLOY

NAME = "bert-cls"
COMMANDS = re.findall(r"^tar .*?(?=\s+#|$)", (DEPLOY / "README.md").read_text(), re.MULTILINE)


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory) -> Truth:
    return build_truths(tmp_path_factory.mktemp("backup"), [NAME])[NAME]


def run(command: str, home: Path) -> None:
    home.mkdir(exist_ok=True)
    subprocess.run(
        ["bash", "-euc", command], cwd=home.parent, env={"HF_HOME": str(home), "PATH": "/usr/bin:/bin"}, check=True
    )


async def test_a_restored_cache_serves_without_the_hub(truth: Truth, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    specs = {NAME: specs_of({NAME: truth}, source="org/model")[NAME]}
    with LoopbackHub() as hub:
        hub.add("org/model", truth.folder)
        async with real_server(specs, hub=hub_config(hub, first / "hub")) as server:
            fetched = await server.embed(NAME, truth.texts[:3])
            run(COMMANDS[0], first)  # while it serves
        run(COMMANDS[1], second)
        num_requests = len(hub.requests)
        async with real_server(specs, hub=hub_config(hub, second / "hub", offline=True)) as server:
            restored = await server.embed(NAME, truth.texts[:3])

    assert len(COMMANDS) == 2
    assert len(hub.requests) == num_requests, "nobody was asked"
    for answer in (fetched, restored):
        truth.check(range(3), answer.json()["data"])
