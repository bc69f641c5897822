"""Describes the machine of a measurement and how much other processes used it: figures cannot be judged without."""

import os
import platform
import subprocess
import time
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
from msgspec import Struct, structs

from engines.affinity import num_usable_cores

ROOT = Path(__file__).parents[2]

PACKAGES = ("embedyard", "torch", "transformers", "tokenizers", "sentence-transformers", "numpy", "litestar", "uvicorn")
_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_tile")

BUSY_SHARE = 0.25
"""Figures are not quoted when other processes use more than this share of the cores."""


class Machine(Struct, frozen=True, kw_only=True):
    """The machine of one measurement. Loads are one-minute averages; `cores` are those that this process may use.

    `other_cores`: cores used by processes that are not ours, on average from start to end.
    """

    cpu: str
    cores: int
    instructions: tuple[str, ...]
    memory_bytes: int
    system: str
    python: str
    packages: dict[str, str]
    commit: str
    started_at: str
    load_at_start: float
    load_at_end: float = 0.0
    seconds: float = 0.0
    other_cores: float = 0.0

    @property
    def is_quiet(self) -> bool:
        """Tell whether other processes hardly used the cores; measured, as a load average covers earlier time."""
        return self.other_cores <= BUSY_SHARE * self.cores

    def describe(self) -> str:
        """Return two to four lines for people."""
        packages = ", ".join(f"{name} {number}" for name, number in self.packages.items())
        lines = [
            f"{self.cpu}, {self.cores} cores ({', '.join(self.instructions) or 'no vector extensions'}), "
            f"{self.system}, Python {self.python}, commit {self.commit}",
            f"{packages}; {self.started_at}, {self.seconds:.0f} s",
            f"load {self.load_at_start:.2f} at the start, {self.load_at_end:.2f} at the end; others used "
            f"{self.other_cores:.2f} cores meanwhile",
        ]
        if not self.is_quiet:
            lines.append("THE MACHINE WAS BUSY WITH OTHER WORK: do not quote these figures")
        return "\n".join(lines)


class Watch:
    """Observes the machine during a measurement; `machine` may be read at any time, and again at the end."""

    def __init__(self) -> None:
        self._before = _describe()
        self._started_s = time.monotonic()
        self._busy_s, self._own_s = _busy_core_s(), _own_core_s()

    @property
    def machine(self) -> Machine:
        """Return the machine, as observed since this object was made."""
        seconds = time.monotonic() - self._started_s
        others_s = _busy_core_s() - self._busy_s - (_own_core_s() - self._own_s)
        return structs.replace(
            self._before,
            load_at_end=round(os.getloadavg()[0], 2),
            seconds=round(seconds, 1),
            other_cores=round(max(0.0, others_s / seconds), 2) if seconds else 0.0,
        )


def warn_if_busy(machine: Machine) -> None:
    """Print a warning at the start when the machine is busy: minutes of measuring would be wasted."""
    if machine.load_at_start > BUSY_SHARE * machine.cores:
        print(f"warning: the load is {machine.load_at_start:.2f} on {machine.cores} cores before the start", flush=True)


def core_seconds(process: psutil.Process) -> float:
    """Return the core seconds that a process and its running descendants have used; 0 when it has ended."""
    total = 0.0
    try:
        for one in (process, *process.children(recursive=True)):
            times = one.cpu_times()
            total += times.user + times.system
    except psutil.NoSuchProcess:
        return total
    return total


def _own_core_s() -> float:
    """Return the core seconds of this process, its running descendants, and those that ended and were waited for."""
    ended = psutil.Process().cpu_times()
    return core_seconds(psutil.Process()) + ended.children_user + ended.children_system


def _busy_core_s() -> float:
    times = psutil.cpu_times()
    idle = times.idle + getattr(times, "iowait", 0.0)
    guest = getattr(times, "guest", 0.0) + getattr(times, "guest_nice", 0.0)  # counted in user and nice already
    return float(sum(times) - idle - guest)


def _describe() -> Machine:
    model, flags = _cpu()
    return Machine(
        cpu=model,
        cores=num_usable_cores(),
        instructions=tuple(flag for flag in _FLAGS if flag in flags),
        memory_bytes=psutil.virtual_memory().total,
        system=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
        packages={name: number for name in PACKAGES if (number := _version(name))},
        commit=_commit(),
        started_at=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        load_at_start=round(os.getloadavg()[0], 2),
    )


def _cpu() -> tuple[str, frozenset[str]]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine(), frozenset()
    facts = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return facts.get("model name", platform.machine()), frozenset(facts.get("flags", "").split())


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _commit() -> str:
    """Return the commit, with a plus when the working tree differs from it; empty outside a checkout."""
    commit = _git("rev-parse", "--short", "HEAD")
    return f"{commit}+" if commit and _git("status", "--porcelain", "--untracked-files=no") else commit


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip()
