"""Keeps a job's output so that a kill at any moment loses no finished window, and publishes it whole.

Beside `OUT` there are, until the job is done:

- `OUT.partial`, `OUT.ids.partial`, `OUT.errors.partial`: what was written so far, and perhaps a torn rest.
- `OUT.journal`: one line for the job, then one for each window, each with its own CRC-32. A window counts from the
  moment when its line is on the disk, after its data; `open_journal` cuts the files off behind the last one.
- `OUT.ready`, `OUT.ids.ready`: the finished files. Once all are on the disk the journal says so, and they are renamed.
"""

import fcntl
import os
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
from msgspec import Struct, structs

from router.bulk.records import BulkError, Cursor

DATA, IDS, ERRORS = "", ".ids", ".errors"
_PARTS = (DATA, IDS, ERRORS)

SPACE = "space"
"""The part of a job's description that may be unknown, and is then empty: the space of a server's vectors."""


class JobState(Struct, frozen=True, kw_only=True):
    """The state of a job behind its last finished window.

    Args:
        cursor: where the next window begins.
        sizes: bytes of each partial file.
        rows, refused, tokens: counts of records and tokens so far.
        is_ready: the finished files are there and need only be renamed.
    """

    cursor: Cursor = Cursor()
    sizes: tuple[int, int, int] = (0, 0, 0)
    rows: int = 0
    refused: int = 0
    tokens: int = 0
    is_ready: bool = False


class Disk:
    """What a job does to its files: every change that a kill can leave half done is one method."""

    def append(self, file: BinaryIO, data: bytes) -> None:
        """Write to an unbuffered file."""
        view = memoryview(data)
        while view:
            view = view[file.write(view) :]

    def sync(self, file: BinaryIO) -> None:
        """Wait until a file is on the disk."""
        os.fsync(file.fileno())

    def truncate(self, file: BinaryIO, size: int) -> None:
        """Cut a file off."""
        file.truncate(size)
        file.seek(size)

    def rename(self, old: Path, new: Path) -> None:
        """Replace a file."""
        old.replace(new)

    def remove(self, path: Path) -> None:
        """Remove a file that need not be there."""
        path.unlink(missing_ok=True)

    def sync_folder(self, folder: Path) -> None:
        """Wait until the names in a folder are on the disk."""
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


class OutputFiles:
    """The paths of a job's files."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.journal = out.with_name(f"{out.name}.journal")

    def final(self, part: str) -> Path:
        """Return the path of a finished file: `OUT`, `OUT.ids.jsonl`, `OUT.errors.jsonl`."""
        return self.out.with_name(f"{self.out.name}{part}.jsonl") if part else self.out

    def partial(self, part: str) -> Path:
        """Return the path of the file that windows are appended to."""
        return self.out.with_name(f"{self.out.name}{part}.partial")

    def ready(self, part: str) -> Path:
        """Return the path of a finished file before it is published."""
        return self.out.with_name(f"{self.out.name}{part}.ready")


class Journal:
    """An open job: it alone writes the job's files.

    Args:
        files: their paths.
        disk: writes them.
        handle: the journal file, locked, at its end.
        state: behind the last finished window.
    """

    def __init__(self, files: OutputFiles, disk: Disk, handle: BinaryIO, state: JobState) -> None:
        self.state = state
        self._files, self._disk, self._handle = files, disk, handle
        self._data = {part: files.partial(part).open("ab", buffering=0) for part in _PARTS}
        try:
            self._cut_off()
        except BaseException:
            self.close()
            raise

    def _cut_off(self) -> None:
        for part, size in zip(_PARTS, self.state.sizes, strict=True):
            if self._data[part].tell() < size and not self.state.is_ready:
                raise BulkError(
                    f"{self._files.partial(part)} is shorter than its journal says: remove the journal to begin anew"
                )
            if not self.state.is_ready:
                self._disk.truncate(self._data[part], size)

    def append(self, part: str, data: bytes) -> None:
        """Append to a partial file; it counts from the next `commit` on."""
        if data:
            self._disk.append(self._data[part], data)

    def commit(self, cursor: Cursor, *, rows: int, refused: int, tokens: int) -> None:
        """Make everything appended so far part of the job.

        Args:
            cursor: the place behind the window.
            rows, refused, tokens: of the window.
        """
        for file in self._data.values():
            self._disk.sync(file)
        sizes = tuple(self._data[part].tell() for part in _PARTS)
        old = self.state
        self._write(
            structs.replace(
                old, cursor=cursor, sizes=sizes, rows=old.rows + rows, refused=old.refused + refused,
                tokens=old.tokens + tokens,
            )
        )  # fmt: skip

    def publish(self, writers: Mapping[str, Callable[[Path, BinaryIO], None]]) -> None:
        """Write the finished files and give them their names; may be called again after a kill.

        Args:
            writers: for each part that is published, what writes it from its partial file.
        """
        if not self.state.is_ready:
            for part, write in writers.items():
                with self._files.ready(part).open("wb") as target:
                    write(self._files.partial(part), target)
                    target.flush()
                    self._disk.sync(target)
            self._write(structs.replace(self.state, is_ready=True))
        for part in writers:
            if self._files.ready(part).exists():
                self._disk.rename(self._files.ready(part), self._files.final(part))
        for part in _PARTS:
            if part not in writers:
                self._disk.remove(self._files.final(part))  # of an earlier job
                self._disk.remove(self._files.ready(part))
            self._disk.remove(self._files.partial(part))
        self._disk.sync_folder(self._files.out.parent)
        self._disk.remove(self._files.journal)

    def close(self) -> None:
        """Close the files; the lock ends."""
        for file in self._data.values():
            file.close()
        self._handle.close()

    def _write(self, state: JobState) -> None:
        self._disk.append(self._handle, _line(state))
        self._disk.sync(self._handle)
        self.state = state


def open_journal(out: Path, job: Mapping[str, Any], disk: Disk, *, overwrite: bool = False) -> Journal:
    """Begin a job, or continue the one of the same description.

    Args:
        out: the output's path.
        job: all that its bytes depend on, as JSON.
        overwrite: replace an output that exists, and what another job has left.

    Raises:
        BulkError: the output exists, another job has left its files there, or a process runs it now.
    """
    files = OutputFiles(out)
    if not out.parent.is_dir():
        raise BulkError(f"{out.parent} is not a folder: create it first")
    if not overwrite and out.exists() and not files.journal.exists():
        raise BulkError(f"{out} exists: --overwrite replaces it")
    handle = files.journal.open("a+b", buffering=0)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        handle.close()
        raise BulkError(f"another process writes {out} now") from None
    try:
        return Journal(files, disk, handle, _read_or_begin(files, job, handle, disk, overwrite=overwrite))
    except BaseException:
        handle.close()
        raise


def journaled_cursor(out: Path) -> Cursor:
    """Return where the job of an output will probably go on; only `open_journal` tells whether it is the same job."""
    try:
        return _read(OutputFiles(out).journal.read_bytes())[1].cursor
    except FileNotFoundError:
        return Cursor()


def _read_or_begin(
    files: OutputFiles, job: Mapping[str, Any], handle: BinaryIO, disk: Disk, *, overwrite: bool
) -> JobState:
    handle.seek(0)
    known, state, size = _read(handle.read())
    differing = [] if known is None else [name for name, value in job.items() if _differs(name, known.get(name), value)]
    if known is None or (overwrite and differing):
        disk.truncate(handle, 0)
        disk.append(handle, _line(job))
        disk.sync(handle)
        disk.sync_folder(files.out.parent)
        return JobState()
    for name in differing[:1]:
        raise BulkError(
            f"{files.journal} is of another job ({name} was {known.get(name)!r}, is {job[name]!r}): finish it with the "
            "same command, or discard it with --overwrite"
        )
    disk.truncate(handle, size)
    return state


def _differs(name: str, known: object, value: object) -> bool:
    return known != value and not (name == SPACE and not (known and value))


def _line(content: object) -> bytes:
    body = msgspec.json.encode(content)
    return b"%08x %s\n" % (zlib.crc32(body), body)


def _read(content: bytes) -> tuple[dict[str, Any] | None, JobState, int]:
    """Return the job, its last state, and the bytes of the whole lines: what follows was torn."""
    job, state, size = None, JobState(), 0
    for line in content.splitlines(keepends=True):
        body = line[9:-1]
        if not line.endswith(b"\n") or line[:9] != b"%08x " % zlib.crc32(body):
            break
        size += len(line)
        if job is None:
            job = msgspec.json.decode(body, type=dict[str, Any])
        else:
            state = msgspec.json.decode(body, type=JobState)
    return job, state, size
