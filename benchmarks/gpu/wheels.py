"""Collects the wheels that a GPU machine without a network lacks (`make gpu-wheels`).

    python -m benchmarks.gpu.wheels             collect into .gpu/wheels, then prove that the set is complete
    python -m benchmarks.gpu.wheels --list      only print what would be collected

What to collect is computed: the dependencies of `pyproject.toml` and of sentence-transformers, as far as they reach
from here, without what `installed.txt` says the machine has, each in the version that is installed here. The proof is
an installation without an index into an empty folder, in which the machine's own packages are empty stand-ins: pip
fails where a package or a version is missing.
"""

import argparse
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from msgspec import Struct
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / ".gpu" / "wheels"
INSTALLED = Path(__file__).with_name("installed.txt")

PYTHON = "3.12"
TARGET = {"python_version": PYTHON, "python_full_version": f"{PYTHON}.3", "sys_platform": "linux", "extra": ""}
_GLIBC = ("_2_39", "_2_35", "_2_34", "_2_31", "_2_28", "_2_27", "_2_24", "_2_17", "2014", "1")
PLATFORMS = (*(f"manylinux{version}_x86_64" for version in _GLIBC), "linux_x86_64")
MAX_BYTES = 64 * 2**20
"""What may travel to the machine in one call, working tree included."""

BESIDE = ("sentence-transformers",)
"""What the measurements need besides the product: the program they compare it with."""

KEPT = {"huggingface-hub": "transformers 5.17 refuses 2.x; loading a folder needs nothing newer"}
"""Packages whose version on the machine is older than `pyproject.toml` asks, and why they stay as they are."""

Lookup = Callable[[str], tuple[str, Sequence[str]]]
"""The version of a package that is installed here, and its requirements."""


class Closure(Struct, frozen=True):
    """What must be collected, by name and version; and requirements that the machine's own packages do not meet."""

    missing: dict[str, str]
    unmet: tuple[str, ...]


def installed_here(name: str) -> tuple[str, Sequence[str]]:
    """Look a package up in this environment.

    Raises:
        PackageNotFoundError: it is not installed.
    """
    found = distribution(name)
    return found.version, found.requires or ()


def read_installed(text: str) -> dict[str, str]:
    """Parse `installed.txt`: the version by name, empty where only the name is known."""
    lines = (line.partition("#")[0].strip() for line in text.splitlines())
    pairs = (line.partition("==") for line in lines if line)
    return {canonicalize_name(name): version for name, _, version in pairs}


def closure(requirements: Iterable[str], machine: Mapping[str, str], look_up: Lookup) -> Closure:
    """Walk the requirements, and those of each package that the machine lacks.

    Args:
        machine: packages of the machine by name, their versions where known.

    Raises:
        PackageNotFoundError: a package is needed there and not installed here, so that its needs are unknown.
    """
    missing: dict[str, str] = {}
    unmet: list[str] = []
    waiting = [Requirement(requirement) for requirement in requirements]
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        if requirement.marker is not None and not requirement.marker.evaluate(dict(TARGET)):
            continue
        if name in machine:
            if machine[name] and not requirement.specifier.contains(machine[name], prereleases=True):
                unmet.append(f"{name}{requirement.specifier}: the machine has {machine[name]}")
        elif name not in missing:
            missing[name], needs = look_up(name)
            waiting += [Requirement(need) for need in needs]
    return Closure(dict(sorted(missing.items())), tuple(unmet))


def requirements_of(pyproject: Path = ROOT / "pyproject.toml") -> list[str]:
    """Return what the product and the measurements need."""
    return [*tomllib.loads(pyproject.read_text())["project"]["dependencies"], *BESIDE]


def download(missing: Mapping[str, str], folder: Path) -> None:
    """Fetch one wheel for each package, built for the machine.

    Raises:
        CalledProcessError: pip found no such wheel, or reached no registry.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder.parent / ".gitignore").write_text("*\n")
    for old in folder.glob("*.whl"):
        old.unlink()
    pins = [f"{name}=={version}" for name, version in missing.items()]
    _pip("download", "--quiet", "--no-deps", *_for_machine(), "--dest", str(folder), *pins)


def size_bytes(folder: Path) -> int:
    """Return the bytes of all wheels in a folder."""
    return sum(wheel.stat().st_size for wheel in folder.glob("*.whl"))


def prove(folder: Path, requirements: Sequence[str], machine: Mapping[str, str], kept: Iterable[str] = KEPT) -> int:
    """Install everything without an index into an empty folder; return how many packages that were.

    Args:
        kept: packages whose version is not checked.

    Raises:
        CalledProcessError: a package is missing, or a version does not fit.
    """
    asked = [_without_version(requirement, set(kept)) for requirement in requirements]
    with tempfile.TemporaryDirectory() as name:
        stand_ins, target = Path(name) / "stand-ins", Path(name) / "site"
        stand_ins.mkdir()
        for package, version in machine.items():
            write_stand_in(stand_ins, package, version or _fitting_version(package))
        links = ["--no-index", "--find-links", str(folder), "--find-links", str(stand_ins)]
        _pip("install", "--quiet", "--no-compile", *links, *_for_machine(), "--target", str(target), *asked)
        return len(list(target.glob("*.dist-info")))


def write_stand_in(folder: Path, name: str, version: str) -> Path:
    """Write an empty wheel, which stands for a package that the machine has."""
    stem = f"{name.replace('-', '_')}-{version}"
    files = {
        "METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        "WHEEL": "Wheel-Version: 1.0\nGenerator: embedyard\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    records = "".join(f"{stem}.dist-info/{file},,\n" for file in (*files, "RECORD"))
    path = folder / f"{stem}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for file, text in {**files, "RECORD": records}.items():
            wheel.writestr(f"{stem}.dist-info/{file}", text)
    return path


def _without_version(requirement: str, kept: set[str]) -> str:
    parsed = Requirement(requirement)
    return parsed.name if canonicalize_name(parsed.name) in kept else requirement


def _fitting_version(name: str) -> str:
    """Return the version installed here for a package of which only the name is known there."""
    try:
        return installed_here(name)[0]
    except PackageNotFoundError:
        return "0"


def _for_machine() -> list[str]:
    platforms = [f"--platform={platform}" for platform in PLATFORMS]
    return ["--only-binary=:all:", "--python-version", PYTHON, "--implementation", "cp", *platforms]


def _pip(command: str, *arguments: str) -> None:
    """Run pip; it warns of this environment's own packages and of mirrors, which matters only where it fails.

    Raises:
        CalledProcessError: it failed; what it said is printed.
    """
    run = [sys.executable, "-m", "pip", "--disable-pip-version-check", command, *arguments]
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    if done.returncode:
        print(done.stdout, done.stderr, sep="\n", file=sys.stderr)
        done.check_returncode()


def main() -> None:
    """Print the list and its size; exit with 1 where the set is incomplete or too large to travel."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.wheels", description=__doc__)
    parser.add_argument("--list", action="store_true", help="only print what would be collected")
    parser.add_argument("--folder", type=Path, default=FOLDER)
    asked = parser.parse_args()
    machine, requirements = read_installed(INSTALLED.read_text()), requirements_of()
    found = closure(requirements, machine, installed_here)
    for name, version in found.missing.items():
        print(f"{name}=={version}")
    for line in found.unmet:
        print(f"{line}; kept, because {KEPT.get(line.partition('>')[0], '?? nothing says why')}")
    if asked.list:
        return
    download(found.missing, asked.folder)
    size = size_bytes(asked.folder)
    num_packages = prove(asked.folder, requirements, machine)
    print(f"{len(found.missing)} wheels, {size / 2**20:.1f} MiB of {MAX_BYTES / 2**20:.0f}, in {asked.folder}")
    print(f"complete: {num_packages} packages installed without an index, {len(machine)} of the machine's own known")
    if size > MAX_BYTES:
        raise SystemExit("too much to travel in one call")


if __name__ == "__main__":
    main()
