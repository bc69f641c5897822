"""Lists the modules that a warm embedding request crosses (`python -m tests.docs.request_path`).

A server of its own serves with a profile function on every thread (`sys.setprofile`), which notes the modules of
`engines/` and `router/` whose functions are called between two signals. Modules that ran in each of several requests
are on the way; background tasks ran in some of them only.
"""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).parents[2]
BODY = b'{"model": "all-MiniLM-L6-v2", "input": "The cat sits outside"}'
NUM_WARM = 10
NUM_TRACED = 9
SETTLE_S = 0.05
"""For the signal to arrive, and for what follows an answer: the log line, metrics, the end of the connection."""


def modules_on_the_way() -> list[str]:
    """Return the paths of the modules, relative to the repository, sorted. Takes about ten seconds."""
    with tempfile.TemporaryDirectory() as folder:
        seen_file = Path(folder) / "seen.json"
        environ = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ} | {
            "STATE_DIR": folder,
            "HF_HOME": folder,
            "HF_HUB_OFFLINE": "1",
            "LOG_FORMAT": "auto",
            "MAX_BATCH_TOKENS": "1024",  # with a size that is set, no batch sizes are tried out meanwhile
        }
        command = [sys.executable, "-m", "tests.docs.request_path", str(seen_file)]
        with (Path(folder) / "log").open("w") as log:
            process = subprocess.Popen(
                command, cwd=ROOT, env=environ, stdout=subprocess.PIPE, stderr=log, text=True, bufsize=1
            )
            try:
                url = _address(process)
                for _ in range(NUM_WARM):
                    _embed(url)
                traced = [_trace(process, url, seen_file) for _ in range(NUM_TRACED)]
            finally:
                process.terminate()
                process.communicate(timeout=60)
    return sorted(set.intersection(*traced))


def packages_of(modules: list[str]) -> dict[str, list[str]]:
    """Group the modules by folder."""
    folders = dict.fromkeys(module.rpartition("/")[0] for module in modules)
    return {folder: [module for module in modules if module.rpartition("/")[0] == folder] for folder in folders}


def _address(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    for line in process.stdout:
        found = re.search(r"Embedyard serves (http://\S+)", line)
        if found:
            return found[1]
    raise RuntimeError("the server ended before it served")


def _embed(url: str) -> None:
    request = urllib.request.Request(f"{url}/v1/embeddings", BODY, {"Content-Type": "application/json"})
    urllib.request.urlopen(request, timeout=60).read()


def _trace(process: subprocess.Popen[str], url: str, seen_file: Path) -> set[str]:
    seen_file.unlink(missing_ok=True)
    process.send_signal(signal.SIGUSR1)
    time.sleep(SETTLE_S)
    _embed(url)
    time.sleep(SETTLE_S)
    process.send_signal(signal.SIGUSR2)
    for _ in range(600):
        if seen_file.exists():
            return set(json.loads(seen_file.read_text()))
        time.sleep(SETTLE_S)
    raise RuntimeError("the server wrote no trace")


def _serve(seen_file: Path) -> None:
    """Run `embedyard serve` in this process: SIGUSR1 starts recording modules, SIGUSR2 writes them to `seen_file`."""
    seen: set[str] = set()
    prefixes = tuple(f"{ROOT}/{package}/" for package in ("engines", "router"))
    is_noting = False

    def profile(frame: FrameType, event: str, _: Any) -> None:
        if is_noting and event == "call" and frame.f_code.co_filename.startswith(prefixes):
            seen.add(frame.f_code.co_filename)

    def begin(*_: object) -> None:
        nonlocal is_noting
        seen.clear()
        is_noting = True

    def end(*_: object) -> None:
        nonlocal is_noting
        is_noting = False
        whole = seen_file.with_suffix(".part")
        whole.write_text(json.dumps(sorted(str(Path(path).relative_to(ROOT)) for path in seen)))
        whole.rename(seen_file)

    import engines.machine  # noqa: F401  # before recording begins, which makes the imports several times slower
    import router.app  # noqa: F401  # as above
    from router.cli.main import cli

    signal.signal(signal.SIGUSR1, begin)
    signal.signal(signal.SIGUSR2, end)
    threading.setprofile(profile)
    sys.setprofile(profile)
    cli(["serve", "--registry", str(ROOT / "registry.yaml"), "--port", "0"])


def main() -> None:
    """Print the table of docs/architecture.md, and the count."""
    if len(sys.argv) > 1:
        _serve(Path(sys.argv[1]))
        return
    packages = packages_of(modules_on_the_way())
    rows = [f"| `{folder}` | {', '.join(f'`{module}`' for module in packages[folder])} |" for folder in packages]
    total = sum(len(modules) for modules in packages.values())
    sys.stdout.write("\n".join([*rows, f"{total} modules in {len(packages)} packages", ""]))


if __name__ == "__main__":
    main()
