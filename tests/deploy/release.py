"""Builds a release into dist/ and checks it up to a first vector: `python -m tests.deploy.release` (`make release`).

It checks that nothing is uncommitted and that the changelog has the version, builds sdist and wheel from the tracked
files alone, installs the wheel into an empty environment outside of the repository, serves there without a registry,
asks for a vector, and prints the commands that tag the release.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
import urllib.request
import venv
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import distribution
from pathlib import Path

from tests.deploy.supply_chain import DEMO, shipped

ROOT = Path(__file__).parents[2]
TORCH_INDEX = "https://download.pytorch.org/whl/cpu"

_BUILD = """
import sys
from setuptools import build_meta
out = sys.argv[1]  # setuptools changes sys.argv
print(build_meta.build_sdist(out))
print(build_meta.build_wheel(out))
"""
_ADDRESS = re.compile(r"Embedyard serves (http://\S+)")
_PAGES = ("/", "/docs", "/health")
"""Paths that answer 200 only if the wheel has its files beside the code."""


class ReleaseError(Exception):
    """The release must not be made; the message names the remedy."""


def read_version(root: Path = ROOT) -> str:
    """Return the version in pyproject.toml."""
    return str(tomllib.loads((root / "pyproject.toml").read_text())["project"]["version"])


def check_changelog(text: str, version: str) -> None:
    """Raise ReleaseError unless the changelog describes the version, and holds nothing unreleased."""
    sections = dict(re.findall(r"^## \[([^\]]+)\][^\n]*\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL))
    if not sections.get(version, "").strip():
        raise ReleaseError(f"CHANGELOG.md says nothing of {version}: add a section ## [{version}]")
    if sections.get("Unreleased", "").strip():
        raise ReleaseError(
            f"CHANGELOG.md has unreleased changes: move them to ## [{version}], or raise the version in pyproject.toml"
        )


def check_committed(root: Path = ROOT) -> None:
    """Raise ReleaseError when the working tree differs from its commit."""
    changed = _output(["git", "status", "--porcelain"], cwd=root)
    if changed:
        raise ReleaseError(f"commit or remove these first:\n{changed}")


def build(out: Path, root: Path = ROOT) -> tuple[Path, Path]:
    """Build sdist and wheel of the tracked files of a tree, and of those that git does not ignore; returns their paths.

    A copy is built, so that neither leftovers of earlier builds nor ignored files get in.
    """
    out.mkdir(parents=True, exist_ok=True)
    names = _output(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=root).split("\0")
    with tempfile.TemporaryDirectory() as folder:
        for name in filter(None, names):
            if (root / name).is_file():
                (Path(folder) / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(root / name, Path(folder) / name)
        environ = {**os.environ, "SOURCE_DATE_EPOCH": _output(["git", "log", "-1", "--format=%ct"], cwd=root)}
        printed = _output([sys.executable, "-W", "ignore", "-c", _BUILD, str(out)], cwd=Path(folder), environ=environ)
    files = [out / line for line in printed.splitlines() if (out / line).is_file()]
    sdist = next(file for file in files if file.name.endswith(".tar.gz"))
    return sdist, next(file for file in files if file.suffix == ".whl")


def make_environment(folder: Path, wheel: Path, *, is_borrowing: bool) -> Path:
    """Install a wheel into a new virtual environment; returns its `embedyard`.

    Args:
        folder: of the environment.
        is_borrowing: link the dependencies from this environment instead of installing them. Those of extras, and what
            only tests use, are left out, as a plain installation has none of them.
    """
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(python), "install", "--quiet"]
    if is_borrowing:
        site = next((folder / "lib").glob("python*")) / "site-packages"
        _link_dependencies(site)
        _run([*pip, "--no-index", "--no-deps", "--force-reinstall", str(wheel)])
    else:
        constraints = ["-c", str(ROOT / "constraints.txt")]
        index = os.environ.get("TORCH_INDEX", TORCH_INDEX)
        _run([*pip, *constraints, "--no-deps", *(["--index-url", index] if index else []), "torch"])
        _run([*pip, *constraints, str(wheel)])
        _run([*pip, "--no-deps", DEMO])
    return folder / "bin" / "embedyard"


def _link_dependencies(site: Path) -> None:
    """Link the packages that a plain installation has, with their metadata, into an empty site-packages."""
    for name in shipped(extras=()):
        one = distribution(name)
        for top in {file.parts[0] for file in one.files or () if file.parts[0] not in ("..", "__pycache__")}:
            if not (site / top).exists():
                (site / top).symlink_to(Path(str(one.locate_file(top))))


def first_vector(embedyard: Path, cwd: Path) -> list[float]:
    """Serve the embedded model from an empty folder, look at the pages, and return the vector of a text.

    Raises:
        ReleaseError: the code is not the environment's, or the server does not start.
    """
    code = _output([str(embedyard.parent / "python"), "-c", "import router; print(router.__file__)"], cwd=cwd)
    if not Path(code).is_relative_to(embedyard.parents[1]):
        raise ReleaseError(f"the environment imports router from {code}")
    with _served(embedyard, cwd) as url:
        for path in _PAGES:
            urllib.request.urlopen(url + path, timeout=30).close()
        body = json.dumps({"input": "The cat sits outside"}).encode()
        request = urllib.request.Request(f"{url}/v1/embeddings", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=120) as response:
            vector: list[float] = json.load(response)["data"][0]["embedding"]
    return vector


@contextmanager
def _served(embedyard: Path, cwd: Path) -> Iterator[str]:
    """Run `embedyard serve` and yield its address."""
    command = [str(embedyard), "serve", "--port", "0"]
    with (cwd / "log").open("w+") as log:
        process = subprocess.Popen(command, cwd=cwd, env=_clean_environ(cwd), stdout=log, stderr=log)
        try:
            yield _wait_for_address(process, cwd / "log")
        finally:
            process.terminate()
            process.wait(60)


def _wait_for_address(process: "subprocess.Popen[bytes]", log: Path) -> str:
    while True:
        try:
            process.wait(0.2)
        except subprocess.TimeoutExpired:
            found = _ADDRESS.search(log.read_text())
            if found:
                return found[1]
        else:
            raise ReleaseError(f"the server did not start:\n{log.read_text()}")


def _clean_environ(home: Path) -> dict[str, str]:
    """Return an environment without settings and without this repository."""
    kept = {name: os.environ[name] for name in ("PATH", "LANG") if name in os.environ}
    return kept | {"HOME": str(home), "HF_HUB_OFFLINE": "1"}


def tag_commands(version: str) -> list[str]:
    """Return the commands that publish the release."""
    tag = f"v{version}"
    return [f'git tag --annotate {tag} --message "Embedyard {version}"', f"git push origin {tag}"]


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ReleaseError(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")


def _output(command: Sequence[str], *, cwd: Path, environ: Mapping[str, str] | None = None) -> str:
    done = subprocess.run(
        command, cwd=cwd, env=environ or _clean_environ(cwd), capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise ReleaseError(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    return done.stdout.strip()


def release(out: Path, *, is_borrowing: bool) -> list[str]:
    """Check and build; returns the lines to print.

    Raises:
        ReleaseError: the release must not be made.
    """
    version = read_version()
    check_committed()
    check_changelog((ROOT / "CHANGELOG.md").read_text(), version)
    sdist, wheel = build(out)
    with tempfile.TemporaryDirectory() as folder:
        embedyard = make_environment(Path(folder) / "venv", wheel, is_borrowing=is_borrowing)
        (Path(folder) / "empty").mkdir()
        vector = first_vector(embedyard, Path(folder) / "empty")
    built = [f"{file}  {file.stat().st_size / 1e6:.2f} MB" for file in (sdist, wheel)]
    checked = f"checked in an empty environment: a vector of {len(vector)}, beginning with {vector[0]:.6f}"
    return [*built, checked, "Next:", *(f"  {command}" for command in tag_commands(version))]


def main() -> None:
    """Make a release, or exit with 1 and the reason."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="folder of sdist and wheel (default: dist)")
    parser.add_argument(
        "--borrow", action="store_true", help="take the dependencies from this environment, not from a package index"
    )
    options = parser.parse_args()
    try:
        lines = release(options.out, is_borrowing=options.borrow)
    except ReleaseError as error:
        sys.exit(str(error))
    print(*lines, sep="\n")  # noqa: T201 - a program, whose output people read


if __name__ == "__main__":
    main()
