"""The one file in which all parts of a run are kept: rewritten whole and atomically, whenever a part tells something.

A later run reads it, and runs only what is not in it yet. Knows neither torch nor what the parts measure.
"""

import hashlib
import os
import re
import time
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import msgspec
from msgspec import Struct

from benchmarks.lib.machine import ROOT

State = Literal["not yet", "running", "done", "failed", "timed out", "skipped"]
"""`not yet`: not begun, for want of time. `running` in a file means that the run was ended from outside."""

Record = dict[str, Any]
"""One finding: JSON values by name."""

SOURCES = ("engines", "router", "benchmarks/gpu", "benchmarks/lib")


class Device(Struct, frozen=True, kw_only=True):
    """What was measured on. `name` names the file; `facts`: memory, driver and the like, empty on a CPU."""

    kind: Literal["cuda", "cpu"]
    name: str
    facts: dict[str, Any] = {}
    python: str = ""
    packages: dict[str, str] = {}

    @property
    def slug(self) -> str:
        """The name as a part of a file's name."""
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")


class PartResult(Struct, kw_only=True):
    """What one part found, complete or not.

    `sources`: fingerprint of the code that it ran; `records` stay also where the part failed after them.
    """

    state: State = "not yet"
    reason: str = ""
    seconds: float = 0.0
    measured_at: str = ""
    commit: str = ""
    sources: str = ""
    records: list[Record] = []


class RunResult(Struct, kw_only=True):
    """Everything known of one device."""

    device: Device
    started_at: str = ""
    settings: dict[str, Any] = {}
    parts: dict[str, PartResult] = {}

    def records(self, part: str) -> list[Record]:
        """What a part found; nothing where it never ran."""
        return self.parts[part].records if part in self.parts else []


class ResultFile:
    """Keeps one device's results in a folder.

    Args:
        folder: where `gpu-NAME.json` lies, or will.
        device: names the file.
    """

    def __init__(self, folder: Path, device: Device) -> None:
        self.path = folder / f"gpu-{device.slug}.json"
        self.result = RunResult(device=device)

    def resume(self, places: Iterable[Path], settings: Mapping[str, Any]) -> None:
        """Take over what an earlier run has kept, from the first of these folders that has it.

        Results of another size or of other packages are no results of this run: the file is begun anew then.
        """
        device = self.result.device
        paths = (place / self.path.name for place in places)
        kept = next((read(path) for path in paths if path.exists()), None)
        if kept is not None and (kept.settings, kept.device.packages) == (dict(settings), device.packages):
            self.result.parts = kept.parts
            for part in self.result.parts.values():
                if part.state == "running":
                    part.state, part.reason = "failed", "the run was ended from outside"
        self.result.settings, self.result.started_at = dict(settings), now()

    def save(self) -> None:
        """Write the file: a reader finds the old one or the new one, never a piece."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        draft = self.path.with_suffix(f".{os.getpid()}.part")
        draft.write_bytes(msgspec.json.format(msgspec.json.encode(self.result), indent=1) + b"\n")
        draft.replace(self.path)


def read(path: Path) -> RunResult:
    """Read a result file.

    Raises:
        MsgspecError: it is none.
    """
    return msgspec.json.decode(path.read_bytes(), type=RunResult)


def now() -> str:
    """The date and time, as results have it."""
    return datetime.fromtimestamp(time.time(), UTC).strftime("%Y-%m-%d %H:%M UTC")


def fingerprint(root: Path = ROOT, sources: Iterable[str] = SOURCES) -> str:
    """Twelve hex digits that change with any line of the code under measurement; a lent machine has no git."""
    digest = hashlib.sha256()
    for path in sorted(path for source in sources for path in (root / source).rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]
