"""`DataFolder`: the bytes of files, and of what running batches have written so far. Blocking: call it on a thread.

    files/ID                     complete files: uploads, and the output and errors of batches that have ended
    files/FOLDER                 the identity of this folder, which its database knows
    uploads/NAME.part            uploads in progress
    batches/ID.EPOCH.output      what one lease of a running batch has written; `.errors` beside it

A lease writes to files of its own, so a server that has lost its lease and does not know it yet spoils nothing.
"""

import os
import re
import secrets
from collections.abc import Collection, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import BinaryIO, Literal

Kind = Literal["output", "errors"]
KINDS: tuple[Kind, Kind] = ("output", "errors")

_ID = re.compile(r"(?:file-|batch_)[0-9a-f]{32}", re.ASCII)
_COPY_BYTES = 2**20
_IDS_AT_ONCE = 500


def new_id(prefix: Literal["file-", "batch_"]) -> str:
    """Return a random id of 128 bits."""
    return prefix + secrets.token_hex(16)


def is_id(text: str) -> bool:
    """Whether a text has the form of our ids, so that it can be part of a path."""
    return _ID.fullmatch(text) is not None


class DataFolder:
    """Names and writes the files below one folder, which several servers may share."""

    def __init__(self, root: Path) -> None:
        self._files, self._uploads, self._batches = root / "files", root / "uploads", root / "batches"

    def create(self) -> None:
        """Create the folder, for this user only: it holds what clients have sent."""
        for folder in (self._files, self._uploads, self._batches):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    def identity(self) -> str:
        """Return the random id of this folder, the same for all servers that share it; made by the first of them."""
        path = self._files / "FOLDER"
        if not path.exists():
            draft = self.new_upload()
            draft.write_text(secrets.token_hex(16))
            try:
                os.link(draft, path)  # of several servers that start at once, one is first
            except FileExistsError:
                pass
            finally:
                draft.unlink()
        return path.read_text()

    def file(self, file_id: str) -> Path:
        """Return the path of a complete file."""
        assert is_id(file_id), "ids come from the database"
        return self._files / file_id

    def open(self, file_id: str) -> BinaryIO:
        """Open a complete file for reading."""
        return self.file(file_id).open("rb")

    def new_upload(self) -> Path:
        """Return the path of a new upload."""
        return self._uploads / f"{secrets.token_hex(16)}.part"

    def segment(self, batch_id: str, epoch: int, kind: Kind) -> Path:
        """Return the path of what one lease writes."""
        assert is_id(batch_id), "ids come from the database"
        return self._batches / f"{batch_id}.{epoch}.{kind}"

    def open_segment(self, batch_id: str, epoch: int, kind: Kind) -> BinaryIO:
        """Create a segment, whose name is on disk before any of its bytes count."""
        file = self.segment(batch_id, epoch, kind).open("wb")
        _sync_folder(self._batches)
        return file

    def append(self, file: BinaryIO, data: bytes) -> None:
        """Append to an open segment, and wait until the bytes are on disk."""
        file.write(data)
        file.flush()
        os.fsync(file.fileno())

    def publish(self, source: Path, file_id: str) -> None:
        """Move a complete file to its place, which it takes at once or not at all."""
        source.replace(self.file(file_id))
        _sync_folder(self._files)

    def join(self, parts: Sequence[tuple[Path, int]], file_id: str, name: str) -> None:
        """Copy the first bytes of each part, one after the other, into one file, and publish it.

        Args:
            parts: paths, and how many of their bytes count; those behind were written and never journaled.
            file_id: of the new file.
            name: of the temporary file; unique to this caller.
        """
        temporary = self._uploads / f"{name}.part"
        with temporary.open("wb") as target:
            for path, size in parts:
                if size:
                    with path.open("rb") as source:
                        _copy(source, target, size)
            target.flush()
            os.fsync(target.fileno())
        self.publish(temporary, file_id)

    def delete_files(self, file_ids: Collection[str]) -> None:
        """Delete complete files; those that are gone already are skipped."""
        for file_id in file_ids:
            self.file(file_id).unlink(missing_ok=True)

    def old_file_ids(self, older_than: float) -> Iterator[set[str]]:
        """Yield the ids of complete files that were written before that time, a few hundred at once."""
        found = (path.name for path in self._files.iterdir() if is_id(path.name) and _is_older(path, older_than))
        while ids := set(islice(found, _IDS_AT_ONCE)):
            yield ids

    def delete_leftovers(self, unfinished: Collection[str], older_than: float) -> None:
        """Delete segments of batches that have ended, and uploads that were last written before `older_than`."""
        for path in self._batches.iterdir():
            if path.name.partition(".")[0] not in unfinished and _is_older(path, older_than):
                path.unlink(missing_ok=True)
        for path in self._uploads.iterdir():
            if _is_older(path, older_than):
                path.unlink(missing_ok=True)

    def delete_segments(self, batch_id: str, epochs: Collection[int]) -> None:
        """Delete what the leases of one batch have written."""
        for epoch in epochs:
            for kind in KINDS:
                self.segment(batch_id, epoch, kind).unlink(missing_ok=True)


def _copy(source: BinaryIO, target: BinaryIO, size: int) -> None:
    while size:
        data = source.read(min(size, _COPY_BYTES))
        if not data:
            raise OSError("a segment is shorter than its journal says")
        target.write(data)
        size -= len(data)


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_older(path: Path, than: float) -> bool:
    try:
        return path.stat().st_mtime < than
    except FileNotFoundError:
        return False
