"""Reads and writes one repository's folder in the hub cache: huggingface_hub's layout plus a manifest of our own.

    models--ORG--NAME/
        blobs/ETAG                      contents, named by their hash
        snapshots/COMMIT/NAME           links to blobs
        refs/REVISION                   the commit that a branch or tag resolved to
        .embedyard/REVISION.json        our manifest: all files of this revision were present with the right hashes
        .embedyard/ETAG.part            a download in progress, or an interrupted one

A model counts as complete only with a manifest, which is written last and atomically: the remains of a killed process
are never taken for a model. Does not use the network.
"""

import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from urllib.parse import quote

import msgspec
from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]  # as in engines/hub/client.py
from msgspec import Struct

from engines.hub.partial_file import FileEntry
from engines.hub.weight_files import ReadRange, read_range
from engines.storage import temporary_path, write_atomically

_COMMIT = re.compile("[0-9a-f]{40}")
_LOCK_POLL_S = 1.0


class Manifest(Struct, frozen=True, kw_only=True):
    """The files of one commit that were verified together. `with_code`: Python files are included."""

    commit: str
    files: tuple[FileEntry, ...]
    weights: tuple[str, ...]
    with_code: bool = False


class RepoCache:
    """The cached files of one repository at one revision.

    `unwritten` keeps, by path, manifests of caches that cannot be written (an image layer, a read-only mount).
    """

    def __init__(self, cache_dir: Path, repo_id: str, revision: str, unwritten: dict[Path, Manifest]) -> None:
        name = "--".join(("models", *repo_id.split("/")))
        self.repo_id = repo_id
        self.revision = revision
        self._cache_dir = cache_dir
        self._folder = cache_dir / name
        self._private_folder = self._folder / ".embedyard"
        self._lock = cache_dir / ".locks" / name / "embedyard.lock"
        self._manifest = self._private_folder / f"{quote(revision, safe='')}.json"
        self._unwritten = unwritten

    @property
    def folder(self) -> str:
        return str(self._folder)

    def path(self, commit: str, name: str = "") -> Path:
        """Returns the path of a snapshot or of a file in it, which need not exist."""
        return self._folder / "snapshots" / commit / name

    def reader(self, commit: str) -> ReadRange:
        """Returns a function that reads byte ranges of the snapshot's files."""
        return partial(read_range, self.path(commit))

    def partial_bytes(self, file: FileEntry) -> int:
        """Returns the size of the partial file that an interrupted download left; 0 without one."""
        try:
            return (self._private_folder / f"{file.etag}.part").stat().st_size
        except OSError:
            return 0

    def partial_path(self, file: FileEntry) -> Path:
        """Returns the path of the partial file for a download of `file`."""
        self._private_folder.mkdir(parents=True, exist_ok=True)
        return self._private_folder / f"{file.etag}.part"

    def manifest(self) -> Manifest | None:
        """Returns the manifest of this revision; None if there is none or it is unreadable."""
        try:
            return msgspec.json.decode(self._manifest.read_bytes(), type=Manifest)
        except (OSError, msgspec.DecodeError):
            return self._unwritten.get(self._manifest)

    def write_manifest(self, manifest: Manifest) -> None:
        """Marks the model as complete: writes the manifest, and the ref for other tools."""
        self._unwritten.pop(self._manifest, None)
        try:
            write_atomically(self._manifest, msgspec.json.encode(manifest))
            if self.revision != manifest.commit:
                write_atomically(self._folder / "refs" / self.revision, manifest.commit.encode())
        except OSError:
            self._unwritten[self._manifest] = manifest

    def delete_manifest(self) -> None:
        """Marks the model as no longer known to be complete."""
        self._unwritten.pop(self._manifest, None)
        self._manifest.unlink(missing_ok=True)

    def known_commit(self) -> str | None:
        """Returns the commit that another tool resolved this revision to when it filled the cache."""
        if is_commit(self.revision):
            return self.revision
        try:
            commit = (self._folder / "refs" / self.revision).read_text().strip()
        except OSError:
            return None
        return commit if is_commit(commit) else None

    def listed_files(self, commit: str) -> Mapping[str, object] | None:
        """Returns the repository's full list of files if `hf download` cached it, else None."""
        try:
            listing = msgspec.json.decode((self._folder / "trees" / f"{commit}.json").read_bytes())
        except (OSError, msgspec.DecodeError):
            return None
        files = listing.get("files") if isinstance(listing, dict) else None
        return files if isinstance(files, dict) else None

    def is_known_absent(self, commit: str, name: str) -> bool:
        """Returns whether another tool has recorded that the hub does not have this file."""
        return (self._folder / ".no_exist" / commit / name).exists()

    def entries(self, commit: str) -> Mapping[str, FileEntry]:
        """Returns the files of a snapshot; etags are empty where the cache holds copies instead of links to blobs."""
        root = self.path(commit)
        entries = {}
        for path in root.rglob("*"):
            if path.is_file():
                name = path.relative_to(root).as_posix()
                etag = path.readlink().name if path.is_symlink() else ""
                entries[name] = FileEntry(name=name, size_bytes=path.stat().st_size, etag=etag)
        return entries

    def link_blob(self, commit: str, file: FileEntry) -> bool:
        """Links an existing blob into the snapshot; returns whether the snapshot has the file."""
        blob, link = self._folder / "blobs" / file.etag, self.path(commit, file.name)
        if not link.exists() and blob.exists():
            _link(blob, link)
        return link.exists()

    def commit_blob(self, part: Path, commit: str, file: FileEntry) -> None:
        """Moves a finished download to the blobs and links it into the snapshot."""
        blob = self._folder / "blobs" / file.etag
        blob.parent.mkdir(parents=True, exist_ok=True)
        part.replace(blob)
        _link(blob, self.path(commit, file.name))

    def remove(self, commit: str, name: str) -> None:
        """Deletes a file from the snapshot together with the blob that it links to."""
        path = self.path(commit, name)
        while path.is_relative_to(self._cache_dir):
            target = Path(os.path.normpath(path.parent / path.readlink())) if path.is_symlink() else None
            path.unlink(missing_ok=True)
            if target is None:
                break
            path = target

    def remove_partial_files(self) -> None:
        """Deletes the partial files, once no download of this repository will resume them."""
        for part in self._private_folder.glob("*.part"):
            part.unlink(missing_ok=True)

    @contextmanager
    def locked(self, check: Callable[[], None]) -> Iterator[None]:
        """Locks the repository against downloads by other processes; calls `check`, which may raise, while waiting."""
        self._lock.parent.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            while True:
                check()
                try:
                    stack.enter_context(WeakFileLock(self._lock, timeout=_LOCK_POLL_S))
                    break
                except TimeoutError:
                    continue
            yield


def is_commit(revision: str) -> bool:
    """Returns whether a revision is a full commit hash, which can never move."""
    return _COMMIT.fullmatch(revision) is not None


def _link(blob: Path, link: Path) -> None:
    """Creates `link` as a relative link to `blob`, so that the cache can be moved; moves the blob where links fail.

    The replacement is atomic: another process that reads `link` never finds it missing.
    """
    link.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_path(link)
    try:
        temporary.symlink_to(os.path.relpath(blob, link.parent))
    except OSError:
        temporary = blob
    temporary.replace(link)
