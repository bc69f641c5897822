"""Tests the Dockerfile and the compose file with the parsers of their tools; `make image-steps` builds the image."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from engines.types import Budget
from router.config.settings import VARIABLES, Settings, read_settings
from tests.deploy.image_steps import OWN_SETTINGS, example_settings, ignored, read_env_file, read_steps
from tests.deploy.proxies import DEPLOY

ROOT = DEPLOY.parent
DOCKERFILE = (ROOT / "Dockerfile").read_text()
STEPS = read_steps(DOCKERFILE)
TOOLS = Path(sys.executable).parent


def compose(*words: str, folder: Path = ROOT) -> dict[str, Any]:
    """Return the file as Docker Compose reads it: checked against its schema, merged, with variables replaced."""
    done = subprocess.run(
        [TOOLS / "docker-compose", "--file", ROOT / "docker-compose.yml", "--project-directory", folder, *words,
         "config", "--format", "json"],
        capture_output=True, text=True, timeout=60, check=False, env={"PATH": "/usr/bin:/bin", "HOME": str(folder)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_the_dockerfile_has_nothing_that_its_linter_would_change() -> None:
    done = subprocess.run([TOOLS / "hadolint", ROOT / "Dockerfile"], capture_output=True, text=True, check=False)

    assert (done.returncode, done.stdout) == (0, "")


def test_the_image_is_what_the_last_stage_says_and_no_more() -> None:
    last = STEPS[max(at for at, step in enumerate(STEPS) if step.instruction == "FROM") :]
    values = {step.instruction: step.value for step in last}
    env = next(step.value for step in last if step.instruction == "ENV")

    assert values["USER"] == "10001:10001"
    assert values["VOLUME"] == "/models"
    assert json.loads(values["ENTRYPOINT"]) == ["embedyard"]
    assert json.loads(values["CMD"]) == ["serve"]
    assert "/health" in values["HEALTHCHECK"]
    assert [step.value for step in last if step.instruction == "COPY"] == [
        "--from=build /opt/embedyard /opt/embedyard",
        "registry.yaml ./",
    ]
    assert not re.search(r"apt-get|pip|gcc", " ".join(step.value for step in last if step.instruction == "RUN"))
    for name in re.findall(r"\b([A-Z_]+)=", env):
        assert name in {v.name for v in VARIABLES} | {"PATH", "HOME", "HF_HOME", "PYTHONDONTWRITEBYTECODE"}


def test_both_kinds_of_wheels_can_be_had_and_no_other() -> None:
    install = next(step.value for step in STEPS if "torch" in step.value and step.instruction == "RUN")

    for kind, status in (("cpu", 0), ("cuda", 0), ("rocm", 1)):
        script = f'COMPUTE={kind}; python() {{ echo "$@"; }}; set -eu; {install}'
        done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
        assert done.returncode == status
        assert ("--index-url https://" in done.stdout) == (status == 0)


def test_the_context_holds_what_is_copied_and_nothing_secret() -> None:
    is_ignored = ignored(ROOT / ".dockerignore")
    copied = [word for step in STEPS if step.instruction == "COPY" and "--from" not in step.value
              for word in step.value.split()[:-1]]  # fmt: skip

    assert copied
    assert [name for name in copied if is_ignored(ROOT / name)] == []
    assert not is_ignored(ROOT / "router/dashboard/page/index.html")
    for name in (".env", "keys.yaml", ".git", ".venv", "tests", "benchmarks", "router/__pycache__"):
        assert is_ignored(ROOT / name), name


GPU = ("--file", str(ROOT / "docker-compose.gpu.yml"))


@pytest.mark.parametrize(("more", "compute"), [((), "cpu"), (GPU, "cuda")])
def test_compose_serves_on_loopback_with_a_key(more: tuple[str, ...], compute: str, tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("PORT=7000\nHOST=127.0.0.1\nAPI_KEY=hunter2\n")
    services = compose(*more, folder=tmp_path)["services"]
    server = services["embedyard"]
    (port,) = server["ports"]

    assert services.keys() == {"embedyard"}
    assert (port["host_ip"], port["published"], port["target"]) == ("127.0.0.1", "7000", 6008)
    assert server["environment"]["API_KEY"] == "hunter2"
    assert (server["environment"]["HOST"], server["environment"]["PORT"]) == ("0.0.0.0", "6008")
    assert server["build"]["args"]["COMPUTE"] == compute
    assert (server["read_only"], server["cap_drop"]) == (True, ["ALL"])
    assert server["restart"] == "always"
    assert server["stop_grace_period"] == "50s"
    assert ("deploy" in server) == (compute == "cuda")


def test_compose_opens_the_port_and_mounts_models_as_the_env_file_says(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("BIND=0.0.0.0\nMODEL_PATH=./models/bge-m3\n")
    server = compose(folder=tmp_path)["services"]["embedyard"]
    workdir = next(step.value for step in reversed(STEPS) if step.instruction == "WORKDIR")
    mounts = {volume["target"]: volume["source"] for volume in server["volumes"]}

    assert server["ports"][0]["host_ip"] == "0.0.0.0"  # what the file asks for
    assert server["environment"]["MODEL_PATH"] == "./models/bge-m3"
    assert mounts[f"{workdir}/models"] == str(tmp_path / "models")


def test_compose_needs_no_env_file_and_redis_comes_only_when_asked_for(tmp_path: Path) -> None:
    assert compose(folder=tmp_path)["services"].keys() == {"embedyard"}
    assert compose("--profile", "redis", folder=tmp_path)["services"].keys() == {"embedyard", "redis"}


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("# a comment\n\n  A=1\nB=\n", {"A": "1", "B": ""}),
        ("A='x y' # not a comment\n", {"A": "'x y' # not a comment"}),
        ("A=b=c\nFROM_THE_CALLER\n", {"A": "b=c"}),
    ],
)
def test_an_env_file_is_read_as_docker_run_reads_it(text: str, found: dict[str, str]) -> None:
    assert read_env_file(text) == found


@pytest.mark.parametrize("line", ["export A=1", "A =1", "=1"])
def test_an_env_file_that_docker_run_refuses_is_refused(line: str) -> None:
    with pytest.raises(ValueError, match="empty or contains a space"):
        read_env_file(line)


def test_the_example_of_settings_serves_the_image() -> None:
    """With every value in it, as `docker run --env-file` gives them: its defaults are those of the image."""
    env = next(step.value for step in reversed(STEPS) if step.instruction == "ENV")
    settings = example_settings()

    assert all(f"{name}=" in env for name in OWN_SETTINGS)
    assert len(settings) > 30
    assert read_settings(settings) == Settings(memory_budget=Budget(fraction=0.8))


def test_docker_run_of_the_docs_has_the_port_the_volume_and_the_tags_of_the_image() -> None:
    pages = [ROOT / name for name in ("deploy/README.md", "docs/operations.md", "docs/zh/operations.md")]
    values = {step.instruction: step.value for step in STEPS}
    built = (ROOT / "Makefile").read_text()

    assert "docker build --tag embedyard$(if $(filter cuda,$(COMPUTE)),:cuda)" in built
    for page in pages:
        runs = re.findall(r"^docker run -d (.*?)(?:  +#.*)?$", page.read_text(), re.MULTILINE)
        assert runs, page
        for line in runs:
            words = shlex.split(line)
            assert f"127.0.0.1:{values['EXPOSE']}:{values['EXPOSE']}" in words
            assert f"embedyard:{values['VOLUME']}" in words
            assert "API_KEY=$API_KEY" in words
            assert words[-1] == ("embedyard:cuda" if "--gpus" in words else "embedyard")


def make(*words: str, gpu: str = "", folder: Path) -> str:
    """What make would run, on a machine whose `nvidia-smi -L` prints `gpu`."""
    tool = folder / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\necho '{gpu}'\n")
    tool.chmod(0o755)
    done = subprocess.run(
        ["make", "--dry-run", "--always-make", *words], cwd=ROOT, capture_output=True, text=True, check=True,
        env={"PATH": f"{folder}:/usr/bin:/bin"},
    )  # fmt: skip
    return done.stdout


CPU_WHEELS = "--index-url https://download.pytorch.org/whl/cpu torch"


def test_make_installs_the_cpu_build_of_pytorch_where_there_is_no_gpu(tmp_path: Path) -> None:
    assert CPU_WHEELS in make("install", folder=tmp_path)
    assert CPU_WHEELS in make("install", "COMPUTE=cpu", gpu="GPU 0: H200", folder=tmp_path)
    assert "--index-url https://mirror/cpu torch" in make("install", "TORCH_INDEX=https://mirror/cpu", folder=tmp_path)


def test_make_installs_pytorch_with_cuda_where_there_is_a_gpu(tmp_path: Path) -> None:
    for told in (make("install", gpu="GPU 0: H200", folder=tmp_path), make("install", "COMPUTE=cuda", folder=tmp_path)):
        assert "--index-url" not in told
        assert "installing PyTorch for cuda (5 GB" in told


@pytest.mark.parametrize(
    ("script", "told"),
    [
        ("exit 1", "is not Python 3.11 or newer"),  # what the version check of an old one gives
        ("case $1 in -c) exit 0;; --version) echo Python 3.12.1;; -m) mkdir -p $3/bin; exit 1;; esac", "3.12.1"),
    ],
)
def test_make_stops_at_a_python_that_cannot_do_it_and_leaves_nothing(script: str, told: str, tmp_path: Path) -> None:
    for name in ("Makefile", "constraints.txt", "pyproject.toml"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)

    done = subprocess.run(
        ["make", "serve", f"PYTHON={python}"], cwd=tmp_path, capture_output=True, text=True, check=False
    )

    assert done.returncode == 2
    assert told in done.stdout + done.stderr
    assert "installing" not in done.stdout
    assert not (tmp_path / ".venv").exists()


def test_make_refuses_hardware_that_it_does_not_know() -> None:
    done = subprocess.run(["make", "serve", "COMPUTE=rocm"], cwd=ROOT, capture_output=True, text=True, check=False)

    assert done.returncode == 2
    assert "COMPUTE=rocm: needs cpu or cuda" in done.stderr


@pytest.mark.parametrize(("version", "status"), [("2.13.0+cpu", 1), ("2.13.0", 0)])
def test_make_says_that_pytorch_is_there_in_its_other_build(version: str, status: int, tmp_path: Path) -> None:
    line = next(line for line in make("install", "COMPUTE=cuda", folder=tmp_path).splitlines() if "+cpu" in line)
    script = re.findall(r"-c '(.*?)'", line)[0].replace('m.version("torch")', repr(version))

    done = subprocess.run([sys.executable, "-c", script], check=False)

    assert done.returncode == status
    assert "+cpu" not in make("install", gpu="GPU 0: H200", folder=tmp_path), "only where it is asked for"


def test_make_builds_the_image_for_cpus_unless_told_otherwise(tmp_path: Path) -> None:
    plain, cuda = make("image", gpu="GPU 0: H200", folder=tmp_path), make("image", "COMPUTE=cuda", folder=tmp_path)

    assert "docker build --tag embedyard --build-arg COMPUTE=cpu ." in plain
    assert "docker build --tag embedyard:cuda --build-arg COMPUTE=cuda ." in cuda


def test_a_server_is_stopped_no_sooner_than_it_may_drain() -> None:
    """The grace time, and the 15 s that router/server/uvicorn_server.py adds for threads and last bytes."""
    compose_s = 50
    kubernetes = (DEPLOY / "kubernetes/base/deployment.yaml").read_text()
    kubernetes_s = int(re.findall(r"terminationGracePeriodSeconds: (\d+)", kubernetes)[0])
    first_s = int(re.findall(r"sleep: \{seconds: (\d+)\}", kubernetes)[0])
    systemd_s = int(re.findall(r"TimeoutStopSec=(\d+)", (DEPLOY / "systemd/embedyard.service").read_text())[0])

    assert compose_s >= 45
    assert kubernetes_s >= 45 + first_s
    assert systemd_s >= 45
