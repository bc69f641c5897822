"""Tests that the files of deploy/ray agree with the code and its pins."""

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("ray", reason="pip install 'embedyard[ray]'")
ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy" / "ray"
SERVICE, ROUTER, _ = yaml.safe_load_all((FOLDER / "rayservice.yaml").read_text())
COMPOSE = yaml.safe_load((FOLDER / "docker-compose.ray.yml").read_text())


def variables() -> dict[str, str]:
    """Return the variables of `router/backends/ray/environment.py`, without setting them."""
    spec = importlib.util.spec_from_file_location(
        "environment", ROOT / "router" / "backends" / "ray" / "environment.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found: dict[str, str] = module.VARIABLES
    return found


def env_of(container: dict[str, Any]) -> dict[str, str]:
    return {entry["name"]: entry.get("value", "") for entry in container["env"]}


def containers() -> dict[str, dict[str, Any]]:
    cluster = SERVICE["spec"]["rayClusterConfig"]
    groups = {"head": cluster["headGroupSpec"], "host": cluster["workerGroupSpecs"][0]}
    made = {name: group["template"]["spec"]["containers"][0] for name, group in groups.items()}
    return made | {"router": ROUTER["spec"]["template"]["spec"]["containers"][0]}


@pytest.mark.parametrize("name", ["head", "host"])
def test_every_node_has_the_variables_that_bite(name: str) -> None:
    env = env_of(containers()[name])

    assert {variable: env.get(variable) for variable in variables()} == variables()


def test_routers_speak_to_the_hosts_as_the_hosts_expect() -> None:
    env = env_of(containers()["router"])

    assert env["BACKEND"] == "ray"
    shared = variables().keys() - {"RAY_worker_niceness"}  # of nodes that host
    assert {variable: env.get(variable) for variable in shared} == {name: variables()[name] for name in shared}


def test_the_compose_file_sets_the_same_everywhere() -> None:
    env = COMPOSE["x-ray"]["environment"]

    assert {variable: env.get(variable) for variable in variables()} == variables()
    assert {name for name, service in COMPOSE["services"].items() if service["profiles"] != ["ray"]} == set()


def test_the_deployment_is_found_where_the_manifest_says() -> None:
    config = yaml.safe_load(SERVICE["spec"]["serveConfigV2"])
    module, function = config["applications"][0]["import_path"].split(":")

    assert f"def {function}(" in (ROOT / f"{module.replace('.', '/')}.py").read_text()
    assert config["applications"][0]["name"] == "embedyard"


def test_the_manifest_names_the_version_that_is_pinned() -> None:
    pinned = re.search(r"^ray==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    extra = re.search(r'^ray = \["ray\[data,serve\]==(.+)\.\*"\]$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)

    assert pinned is not None
    assert extra is not None
    assert SERVICE["spec"]["rayClusterConfig"]["rayVersion"] == pinned[1]
    assert pinned[1].startswith(f"{extra[1]}.")
