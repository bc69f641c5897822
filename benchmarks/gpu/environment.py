"""Makes the environment in which `make gpu` runs on a machine without a network, from collected wheels.

    python3 -m benchmarks.gpu.environment       .gpu/venv: this Python, its packages, and the wheels of .gpu/wheels

Needs nothing but the standard library and pip. The new environment sees the packages of the Python that runs this, also
where that is an environment itself, of which `--system-site-packages` would show the base alone; the wheels come first.
"""

import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

HOME = Path(__file__).parents[2] / ".gpu"


def make(home: Path = HOME) -> Path:
    """Make the environment, if it is not there yet; return its interpreter.

    Raises:
        FileNotFoundError: there are no wheels.
        CalledProcessError: pip could not install them.
    """
    wheels, folder = sorted((home / "wheels").glob("*.whl")), home / "venv"
    if not wheels:
        raise FileNotFoundError(f"no wheels in {home / 'wheels'}: run `make gpu-wheels` where there is a network")
    python, is_done = folder / "bin" / "python", folder / ".installed"
    names = "\n".join(wheel.name for wheel in wheels)
    if is_done.exists() and is_done.read_text() == names:
        return python
    venv.create(folder, clear=True, with_pip=False, symlinks=True)
    options = ["--quiet", "--no-index", "--no-deps", "--no-compile", "--no-cache-dir", "--disable-pip-version-check"]
    site = _site_packages(folder)
    install = [sys.executable, "-m", "pip", "install", *options, "--target", str(site), *map(str, wheels)]
    subprocess.run(install, check=True)
    # `addsitedir` also reads the .pth files there, as an ordinary start does.
    outer = "; ".join(f"site.addsitedir({path!r})" for path in _own_site_packages())
    (site / "outer.pth").write_text(f"import site; {outer}\n")
    is_done.write_text(names)
    return python


def _site_packages(folder: Path) -> Path:
    found = sysconfig.get_path("purelib", "venv", {"base": str(folder), "platbase": str(folder)})
    return Path(found)


def _own_site_packages() -> list[str]:
    return list(dict.fromkeys((sysconfig.get_path("purelib"), sysconfig.get_path("platlib"))))


if __name__ == "__main__":
    print(make())
