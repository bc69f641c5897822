"""What a machine without a network is sent: all that it lacks, proven by an installation without an index."""

import subprocess
import sys
import zipfile
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from benchmarks.gpu import environment, wheels
from benchmarks.gpu.wheels import Closure, closure, prove, read_installed, requirements_of, write_stand_in

HERE: dict[str, tuple[str, list[str]]] = {
    "server": ("2.0", ["http>=1", "torch>=2", 'old; python_version < "3.12"', "dict-tools"]),
    "http": ("1.1", ["sniff", 'brotli; extra == "fast"']),
    "sniff": ("0.3", []),
    "dict-tools": ("4", ["server"]),
}


def look_up(name: str) -> tuple[str, Sequence[str]]:
    if name not in HERE:
        raise PackageNotFoundError(name)
    return HERE[name]


def test_what_is_missing_is_the_closure_without_what_the_machine_has() -> None:
    found = closure(["Server>=1", "torch"], {"torch": "2.11"}, look_up)

    assert found == Closure({"dict-tools": "4", "http": "1.1", "server": "2.0", "sniff": "0.3"}, ())


def test_a_version_that_the_machine_has_and_that_does_not_do_is_said() -> None:
    found = closure(["hub>=2.4", "click>=8"], {"hub": "1.33.0", "click": ""}, look_up)

    assert found == Closure({}, ("hub>=2.4: the machine has 1.33.0",))


def test_a_package_whose_needs_are_unknown_is_an_error() -> None:
    with pytest.raises(PackageNotFoundError):
        closure(["unknown"], {}, look_up)


def test_the_list_of_the_machine_has_names_versions_and_comments() -> None:
    assert read_installed("# a comment\nTorch==2.11.0\nprometheus_client  # by name\n\n") == {
        "torch": "2.11.0", "prometheus-client": "",
    }  # fmt: skip


def test_everything_that_the_product_needs_there_is_known_here() -> None:
    machine = read_installed(wheels.INSTALLED.read_text())
    found = closure(requirements_of(), machine, wheels.installed_here)

    assert {"litestar", "msgspec", "structlog", "httptools", "limits", "uvicorn"} <= set(found.missing)
    assert not {"torch", "transformers", "numpy", "triton", "uvloop"} & set(found.missing)
    assert {line.partition(">")[0] for line in found.unmet} <= set(wheels.KEPT)


def fake_wheel(folder: Path, name: str, version: str, needs: str = "") -> Path:
    path = write_stand_in(folder, name, version)
    if needs:
        with zipfile.ZipFile(path) as wheel:
            files = {each: wheel.read(each).decode() for each in wheel.namelist()}
        metadata = next(each for each in files if each.endswith("METADATA"))
        files[metadata] += f"Requires-Dist: {needs}\n"
        with zipfile.ZipFile(path, "w") as wheel:
            for each, text in files.items():
                wheel.writestr(each, text)
    return path


def test_a_complete_set_installs_without_an_index_and_an_incomplete_one_does_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_wheel(tmp_path, "house", "1.0", "roof>=2")
    fake_wheel(tmp_path, "roof", "2.0", "ground")

    assert prove(tmp_path, ["house"], {"ground": "3"}) == 3
    with pytest.raises(subprocess.CalledProcessError):
        prove(tmp_path, ["house"], {})
    assert "ground" in capsys.readouterr().err


def test_the_environment_has_the_wheels_and_the_packages_around_it(tmp_path: Path) -> None:
    (tmp_path / "wheels").mkdir()
    fake_wheel(tmp_path / "wheels", "embedyard-only-a-test", "7.0")

    python = environment.make(tmp_path)

    seen = "from importlib.metadata import version; import numpy; print(version('embedyard-only-a-test'))"
    assert subprocess.run([python, "-c", seen], capture_output=True, text=True, check=True).stdout == "7.0\n"
    before = (tmp_path / "venv" / ".installed").stat().st_mtime_ns
    assert environment.make(tmp_path) == python
    assert (tmp_path / "venv" / ".installed").stat().st_mtime_ns == before


def test_without_wheels_the_remedy_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="make gpu-wheels"):
        environment.make(tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_collected_set_is_complete_and_small_enough_to_travel(tmp_path: Path) -> None:
    machine, requirements = read_installed(wheels.INSTALLED.read_text()), requirements_of()
    missing = closure(requirements, machine, wheels.installed_here).missing
    reaches = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(tmp_path), "sniffio"]
    if subprocess.run(reaches, capture_output=True, check=False).returncode:
        pytest.skip("no package registry is reached from here")

    wheels.download(missing, tmp_path / "wheels")

    assert prove(tmp_path / "wheels", requirements, machine) >= len(missing)
    assert wheels.size_bytes(tmp_path / "wheels") <= wheels.MAX_BYTES
    next((tmp_path / "wheels").glob("litestar-2*")).unlink()
    with pytest.raises(subprocess.CalledProcessError):
        prove(tmp_path / "wheels", requirements, machine)
