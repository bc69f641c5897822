"""Runs every step of the Dockerfile in a clean root, up to a first vector (`python -m tests.deploy.image_steps`).

    make image-steps                                        PyTorch from its own index
    make image-steps TORCH_INDEX=https://pypi.org/simple    from this one

Needs root and Linux, and no Docker. What Docker would do and this does not: fetch the base image (it is this machine's
Python), and keep layers.
"""

import argparse
import fnmatch
import io
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from dockerfile_parse import DockerfileParser
from msgspec import Struct

from tests.deploy.image_stage import Stage

ROOT = Path(__file__).parents[2]
_READY_S = 120.0
_KEY = "image-steps"
OWN_SETTINGS = ("HOST", "PORT", "HF_HOME", "STATE_DIR")
"""The image sets them: they are where it listens and what it may write."""


class Step(Struct, frozen=True):
    """One instruction of the Dockerfile."""

    instruction: str
    value: str


def read_steps(dockerfile: str) -> list[Step]:
    """Return the instructions, with continuation lines joined."""
    found = DockerfileParser(fileobj=io.BytesIO(dockerfile.encode())).structure
    return [Step(one["instruction"], one["value"]) for one in found if one["instruction"] != "COMMENT"]


class Image:
    """The stages of a Dockerfile as they are built; the last stage is the image."""

    def __init__(self, folder: Path, args: Mapping[str, str]) -> None:
        self._folder = folder
        self._args = args
        self._stages: dict[str, Stage] = {}
        self.stage: Stage
        self.volumes: list[str] = []
        self.health: list[str] = []
        self.entrypoint: list[str] = []
        self.command: list[str] = []

    def build(self, steps: list[Step]) -> None:
        """Run all steps.

        Raises:
            RuntimeError: a step failed or is not supported.
        """
        known: dict[str, Callable[[str], None]] = {
            "FROM": self._from, "ARG": self._arg, "ENV": self._env, "SHELL": self._shell, "RUN": self._run,
            "COPY": self._copy, "WORKDIR": self._workdir, "USER": self._user, "VOLUME": self.volumes.append,
            "HEALTHCHECK": self._healthcheck,
            "ENTRYPOINT": lambda value: self.entrypoint.extend(json.loads(value)),
            "CMD": lambda value: self.command.extend(json.loads(value)),
        }  # fmt: skip
        for step in steps:
            print(f"--> {step.instruction} {step.value[:100]}", flush=True)
            if step.instruction in ("LABEL", "EXPOSE", "STOPSIGNAL"):
                continue  # only noted down
            if step.instruction not in known:
                raise RuntimeError(f"{step.instruction} is not known here: teach it to tests/deploy/image_steps.py")
            known[step.instruction](step.value)

    def _from(self, value: str) -> None:
        name = value.split(" AS ")[-1] if " AS " in value else "image"
        folder = self._folder / name
        folder.mkdir()
        self.stage = self._stages[name] = Stage(folder)

    def _arg(self, value: str) -> None:
        """Set an argument; those before the first FROM select the base image, which must be this machine's Python."""
        name, _, default = value.partition("=")
        if self._stages:
            self.stage.env[name] = self._args.get(name, default)
        elif not default.startswith(wanted := f"{sys.version_info.major}.{sys.version_info.minor}"):
            raise RuntimeError(f"the image is made of Python {default}, and this is {wanted}: run it with that one")

    def _env(self, value: str) -> None:
        for word in shlex.split(value):
            name, _, text = word.partition("=")
            self.stage.env[name] = text.replace("$PATH", self.stage.env["PATH"])

    def _shell(self, value: str) -> None:
        self.stage.shell = json.loads(value)

    def _run(self, value: str) -> None:
        if self.stage.run([*self.stage.shell, value]):
            raise RuntimeError(f"this step failed: {value}")

    def _copy(self, value: str) -> None:
        *sources, target = value.split()
        origin: Path = ROOT
        if sources[0].startswith("--from="):
            origin = self._stages[sources.pop(0).removeprefix("--from=")].root
        wanted = ignored(ROOT / ".dockerignore") if origin == ROOT else lambda _: False
        for source in sources:
            _copy(origin / source.lstrip("/"), self.stage.path(target), target.endswith("/"), wanted)

    def _workdir(self, value: str) -> None:
        self.stage.workdir = value
        self.stage.path(value).mkdir(parents=True, exist_ok=True)

    def _user(self, value: str) -> None:
        self.stage.user = value

    def _healthcheck(self, value: str) -> None:
        self.health = json.loads(value.partition(" CMD ")[2])


def ignored(file: Path) -> Callable[[Path], bool]:
    """Tell whether .dockerignore excludes a file: the last pattern that matches it or a folder above decides."""
    patterns = [line.strip() for line in file.read_text().splitlines() if line.strip() and line[0] != "#"]

    def is_ignored(path: Path) -> bool:
        inside = PurePosixPath(path.relative_to(ROOT))
        places = [inside, *list(inside.parents)[:-1]]
        is_out = False
        for pattern in patterns:
            glob = pattern.lstrip("!").rstrip("/")
            if any(_fits(place, glob) for place in places):
                is_out = not pattern.startswith("!")
        return is_out

    return is_ignored


def _fits(place: PurePosixPath, glob: str) -> bool:
    if glob.startswith("**/"):
        return fnmatch.fnmatchcase(place.name, glob.removeprefix("**/"))
    return "/" not in str(place) and fnmatch.fnmatchcase(str(place), glob)


def _copy(source: Path, target: Path, into: bool, is_ignored: Callable[[Path], bool]) -> None:
    """Copy as COPY does: the content of a folder, or a file; `into` a folder, where the target ends with a slash."""
    if source.is_dir():
        leave_out = lambda folder, names: [name for name in names if is_ignored(Path(folder) / name)]  # noqa: E731 - one line, used once
        shutil.copytree(source, target, symlinks=True, dirs_exist_ok=True, ignore=leave_out)
        return
    if is_ignored(source):
        raise RuntimeError(f"{source.name} is needed by COPY, but .dockerignore leaves it out")
    place = target / source.name if into else target
    place.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(source, place)


def read_env_file(text: str) -> dict[str, str]:
    """Read settings as `docker run --env-file` does: a value is all that follows the first `=`, quotes and # included.

    Raises:
        ValueError: Docker would refuse the line.
    """
    found = {}
    for line in (line.lstrip() for line in text.splitlines()):
        name, is_set, value = line.partition("=")
        if not line or line.startswith("#"):
            continue
        if not name or re.search(r"\s", name):
            raise ValueError(f"{line!r}: the name of a variable is empty or contains a space")
        if is_set:
            found[name] = value
    return found


def example_settings() -> dict[str, str]:
    """Every value of .env.example, read as Docker reads it, but for those that the image sets itself."""
    example = (ROOT / ".env.example").read_text(encoding="utf-8")
    found = read_env_file(re.sub(r"^#(?=[A-Z_]+=)", "", example, flags=re.MULTILINE))
    return {name: value for name, value in found.items() if name not in OWN_SETTINGS}


@contextmanager
def running(image: Image, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """Run the image as compose does: its own user, a key, and nothing writable but its volumes and /tmp."""
    image.stage.freeze(image.volumes)
    own = {**example_settings(), "PORT": str(port), "API_KEY": _KEY}
    server = image.stage.start([*image.entrypoint, *image.command], own)
    try:
        deadline_s = time.monotonic() + _READY_S
        while image.stage.run([*_quiet, *image.health], **own):
            if server.poll() is not None or time.monotonic() > deadline_s:
                raise RuntimeError("the image did not become healthy")
            time.sleep(0.5)
        yield server
    finally:
        server.kill()


_quiet = ("sh", "-c", 'exec "$@" 2>/dev/null', "sh")


def ask(port: int, key: str) -> tuple[int, list[float]]:
    """Request a vector; return the answer's status, and the vector if there is one."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/embeddings",
        json.dumps({"model": "all-MiniLM-L6-v2", "input": "The cat sits outside"}).encode(),
        {"content-type": "application/json", "authorization": f"Bearer {key}"},
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.load(answer)["data"][0]["embedding"]
    except urllib.error.HTTPError as error:
        return error.code, []


def check(image: Image) -> None:
    """Check that the built image is healthy, requires a key, gives right vectors, has no build tools and exits cleanly.

    Raises:
        RuntimeError: it does not.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    began_s = time.monotonic()
    with running(image, port) as server:
        print(f"healthy after {time.monotonic() - began_s:.1f} s", flush=True)
        status, vector = ask(port, _KEY)
        facts = {
            "without the key it answers 401": ask(port, "wrong")[0] == 401,
            "a first vector": status == 200 and abs(vector[0] - 0.13919115) < 1e-5 and len(vector) == 384,
            "it runs as 10001": Path(f"/proc/{server.pid}").stat().st_uid == 10001,
            "it cannot write its own code": image.stage.run(["touch", "/opt/embedyard/x"], PATH="/usr/bin") != 0,
            "it keeps its state in the volume": image.stage.path("/models/state/measurements.json").is_file(),
            "there is no pip in it": not image.stage.path("/opt/embedyard/bin/pip").exists(),
        }
        server.terminate()
        facts["SIGTERM ends it with 0"] = server.wait(60) == 0
    size = subprocess.run(["du", "-csm", *image.stage.written()], capture_output=True, text=True, check=False)
    print(f"above the base image: {size.stdout.split()[-2]} MB")
    for fact, is_true in facts.items():
        print(f"{'ok' if is_true else 'NO':3} {fact}")
    if not all(facts.values()):
        raise RuntimeError("the image does not do what it should")


def main() -> None:
    """Build the image and check it; exit with 1 when a step fails."""
    parser = argparse.ArgumentParser(prog="python -m tests.deploy.image_steps", description=__doc__)
    parser.add_argument("--build-arg", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if os.geteuid() != 0:
        raise SystemExit("make image-steps needs root: it mounts, in a namespace of its own")
    if asked.inside is None:
        # The process that makes and removes the folder sees no mounts: they end with the process below.
        with tempfile.TemporaryDirectory(prefix="image-steps-", dir="/var/tmp") as folder:
            again = [sys.executable, "-m", "tests.deploy.image_steps", "--inside", folder, *sys.argv[1:]]
            raise SystemExit(subprocess.run(["unshare", "--mount", "--propagation", "private", *again]).returncode)
    image = Image(asked.inside, dict(arg.split("=", 1) for arg in asked.build_arg if arg.partition("=")[2]))
    try:
        image.build(read_steps((ROOT / "Dockerfile").read_text()))
        check(image)
    except RuntimeError as error:
        raise SystemExit(str(error)) from None
    print("the image is right")


if __name__ == "__main__":
    main()
