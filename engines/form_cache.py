"""Keeps quantised weights on disk between loads: one safetensors file for each model and dtype. Needs no torch.

Files are read and written by `engines/loading/form_files.py`. The metadata in a file's header says what it was made
from: `identity`, which is known without reading weights, and `content`, the hashes of everything that decides the
model's vectors. A file that says anything else is made anew, in the same place.
"""

import os
import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import msgspec
import structlog

from engines.precision import FORM_VERSIONS
from engines.spec import ModelSpec, in_dtype
from engines.storage import UNREADABLE
from engines.types import fingerprint

log = structlog.get_logger(__name__)

QUANTIZED = ("int8", "int4")
"""Dtypes that are made from float32 weights, and kept."""

HEADER_BYTES = 2**20
"""Every file begins with a header of this size, filled up with spaces: it is written last, when all is known."""

FREE_BYTES = 2**30
"""Bytes that stay free on the disk, whatever is kept."""

_VERSION = 1
"""Of the layout of the files."""

_LIBRARIES = ("torch", "transformers")
"""What names and computes the tensors."""

LENGTH_BYTES = 8
"""Of the header's length, before it."""

_SHARE = 0.5
"""Files may take this part of the disk's free bytes and their own together."""

_STALE_S = 86_400.0
"""A file that was begun so long ago is of a process that died."""


class FormCache:
    """The files of one machine. Thread-safe: they are replaced as a whole.

    Args:
        folder: where; None keeps nothing.
        cpu: the number formats that the CPU multiplies fast, which decide the form of some weights.
    """

    def __init__(self, folder: Path | None, cpu: str = "") -> None:
        self._folder = folder
        self._cpu = cpu

    def path(self, spec: ModelSpec) -> Path | None:
        """Returns the place of a model's file in its dtype, whether there is one or not; None where none is kept."""
        if self._folder is None or spec.dtype not in QUANTIZED or spec.trust_remote_code:
            return None
        return self._folder / f"{fingerprint([spec.model_id, spec.dtype])}.safetensors"

    def identity(self, spec: ModelSpec, revision: str) -> str:
        """Returns a fingerprint over what the form of a model's files follows from, but their content."""
        made_from = [spec.model_id, spec.source, spec.adapter, revision, spec.dtype]
        return fingerprint([_VERSION, *made_from, FORM_VERSIONS.get(spec.dtype, 1), self._cpu, *_library_versions()])

    def is_kept(self, spec: ModelSpec, revision: str) -> bool:
        """Tells whether a load of these files will find their form; reads a header."""
        path = self.path(spec)
        return path is not None and read_metadata(path).get("identity") == self.identity(spec, revision)

    def mark_used(self, path: Path) -> None:
        """Makes a file the last one that is removed to make room."""
        with suppress(OSError):
            os.utime(path)

    def make_room(self, size_bytes: int, keep: Path) -> bool:
        """Removes the files that were not used for longest, until one of this size may be added or replace `keep`.

        Returns:
            False where it may not be: the disk has too little room for it alone.
        """
        assert self._folder is not None, "it has a path"
        now_s = time.time()
        for begun in self._folder.glob(".*"):
            with suppress(OSError):
                if begun.stat().st_mtime < now_s - _STALE_S:
                    begun.unlink()
        others = sorted(_sizes(self._folder, but=keep), key=lambda item: item[1])
        taken = sum(size for _, _, size in others)
        # The new file is on the disk already, beside them.
        limit = _SHARE * (shutil.disk_usage(self._folder).free + taken + size_bytes)
        if size_bytes > limit:
            return False
        while others and taken + size_bytes > limit:
            path, _, size = others.pop(0)
            path.unlink(missing_ok=True)
            taken -= size
            log.info("form.removed", file=path.name, bytes=size, reason="the disk has no room for all of them")
        return True

    def remove(self, spec: ModelSpec) -> None:
        """Removes a model's file, if there is one; blocks on the disk."""
        path = self.path(spec)
        if path is not None:
            with suppress(OSError):
                path.unlink(missing_ok=True)

    def remove_unused(self, old: Mapping[str, ModelSpec], new: Mapping[str, ModelSpec]) -> None:
        """Removes the files of models, and of their dtypes, that a registry had and has no more; blocks on the disk."""
        kept = {self.path(form) for spec in new.values() for form in _forms_of(spec)}
        for spec in old.values():
            for form in _forms_of(spec):
                if self.path(form) not in kept:
                    self.remove(form)


def _forms_of(spec: ModelSpec) -> list[ModelSpec]:
    return [in_dtype(spec, dtype) for dtype in (spec.dtype, *spec.smaller_dtypes)]


def read_metadata(path: Path) -> dict[str, str]:
    """Returns what the header of a file says about it; nothing where that is no file of ours."""
    try:
        with path.open("rb") as opened:
            head = opened.read(HEADER_BYTES)
        if int.from_bytes(head[:LENGTH_BYTES], "little") != HEADER_BYTES - LENGTH_BYTES:
            return {}
        header = msgspec.json.decode(head[LENGTH_BYTES:], type=dict[str, msgspec.Raw])
        return msgspec.json.decode(header.get("__metadata__", b"{}"), type=dict[str, str])
    except (OSError, *UNREADABLE):
        return {}


def _sizes(folder: Path, but: Path) -> list[tuple[Path, float, int]]:
    """Returns the files with the times of their last use (Unix) and their bytes."""
    found = []
    for path in folder.glob("*.safetensors"):
        with suppress(OSError):
            stat = path.stat()
            if path != but:
                found.append((path, stat.st_mtime, stat.st_size))
    return found


@cache
def _library_versions() -> tuple[str, ...]:
    found = []
    for name in _LIBRARIES:
        try:
            found.append(version(name))
        except PackageNotFoundError:
            found.append("none")
    return tuple(found)
