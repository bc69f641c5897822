"""One repository's folder in the hub cache: blobs, snapshots, refs as huggingface_hub lays them out, and our manifest.

    models--ORG--NAME/
        blobs/ETAG                      contents, named by their hash
        snapshots/COMMIT/NAME           links to them
        refs/REVISION                   the commit a branch or tag stood for
        .embedyard/REVISION.json        our manifest: this revision's files were all here, and their hashes right
        .embedyard/ETAG.part            a download that is under way, or was cut short

Only a manifest makes a model whole, and it is written last and at once: whatever a killed process leaves is not taken
for a model. Knows no network.
"""

import os
import re
import uuid
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

_COMMIT = re.compile("[0-9a-f]{40}")
_LOCK_POLL_S = 1.0


class Manifest(Struct, frozen=True, kw_only=True):
    """The files of one commit that were verified together. `with_code`: Python files are among them."""

    commit: str
    files: tuple[FileEntry, ...]
    weights: tuple[str, ...]
    with_code: bool = False


class RepoCache:
    """The cached files of one repository at one revision.

    `unwritten` holds the manifests of caches that cannot be written (an image layer, a read-only mount), by path.
    """

    def __init__(self, cache_dir: Path, repo_id: str, revision: str, unwritten: dict[Path, Manifest]) -> None:
        name = "--".join(("models", *repo_id.split("/")))
        self.repo_id = repo_id
        self.revision = revision
        self._cache_dir = cache_dir
        self._folder = cache_dir / name
        self._own = self._folder / ".embedyard"
        self._lock = cache_dir / ".locks" / name / "embedyard.lock"
        self._manifest = self._own / f"{quote(revision, safe='')}.json"
        self._unwritten = unwritten

    @property
    def folder(self) -> str:
        return str(self._folder)

    def path(self, commit: str, name: str = "") -> Path:
        """Where a snapshot, or a file of it, is or will be."""
        return self._folder / "snapshots" / commit / name

    def reader(self, commit: str) -> ReadRange:
        """Reads pieces of the snapshot's files."""
        return partial(read_range, self.path(commit))

    def part_bytes(self, file: FileEntry) -> int:
        """How much of a download is here already."""
        try:
            return (self._own / f"{file.etag}.part").stat().st_size
        except OSError:
            return 0

    def part(self, file: FileEntry) -> Path:
        """Where a download of `file` grows."""
        self._own.mkdir(parents=True, exist_ok=True)
        return self._own / f"{file.etag}.part"

    def manifest(self) -> Manifest | None:
        """What was verified last for this revision; None when nothing was, or the manifest is unreadable."""
        try:
            return msgspec.json.decode(self._manifest.read_bytes(), type=Manifest)
        except (OSError, msgspec.DecodeError):
            return self._unwritten.get(self._manifest)

    def write_manifest(self, manifest: Manifest) -> None:
        """Make the model whole: the manifest for us, the ref for other tools."""
        self._unwritten.pop(self._manifest, None)
        try:
            _write(self._manifest, msgspec.json.encode(manifest))
            if self.revision != manifest.commit:
                _write(self._folder / "refs" / self.revision, manifest.commit.encode())
        except OSError:
            self._unwritten[self._manifest] = manifest

    def delete_manifest(self) -> None:
        """The model is no longer known to be whole."""
        self._unwritten.pop(self._manifest, None)
        self._manifest.unlink(missing_ok=True)

    def known_commit(self) -> str | None:
        """The commit that some tool resolved this revision to when it filled the cache."""
        if is_commit(self.revision):
            return self.revision
        try:
            commit = (self._folder / "refs" / self.revision).read_text().strip()
        except OSError:
            return None
        return commit if is_commit(commit) else None

    def listed(self, commit: str) -> Mapping[str, object] | None:
        """The repository's full list of files, where `hf download` left it beside its snapshot; None elsewhere."""
        try:
            listing = msgspec.json.decode((self._folder / "trees" / f"{commit}.json").read_bytes())
        except (OSError, msgspec.DecodeError):
            return None
        files = listing.get("files") if isinstance(listing, dict) else None
        return files if isinstance(files, dict) else None

    def is_known_absent(self, commit: str, name: str) -> bool:
        """Whether some tool asked the hub for this file and heard that there is none."""
        return (self._folder / ".no_exist" / commit / name).exists()

    def entries(self, commit: str) -> Mapping[str, FileEntry]:
        """The files of a snapshot; without an etag where the cache holds copies instead of links to blobs."""
        root = self.path(commit)
        entries = {}
        for path in root.rglob("*"):
            if path.is_file():
                name = path.relative_to(root).as_posix()
                etag = path.readlink().name if path.is_symlink() else ""
                entries[name] = FileEntry(name=name, size_bytes=path.stat().st_size, etag=etag)
        return entries

    def link_blob(self, commit: str, file: FileEntry) -> bool:
        """Let the snapshot show a blob that is here already; False when it is not."""
        blob, shown = self._folder / "blobs" / file.etag, self.path(commit, file.name)
        if not shown.exists() and blob.exists():
            _show(blob, shown)
        return shown.exists()

    def commit_blob(self, part: Path, commit: str, file: FileEntry) -> None:
        """Turn a finished download into a file of the snapshot."""
        blob = self._folder / "blobs" / file.etag
        blob.parent.mkdir(parents=True, exist_ok=True)
        part.replace(blob)
        _show(blob, self.path(commit, file.name))

    def remove(self, commit: str, name: str) -> None:
        """Delete a file from the snapshot together with what it links to."""
        path = self.path(commit, name)
        while path.is_relative_to(self._cache_dir):
            target = Path(os.path.normpath(path.parent / path.readlink())) if path.is_symlink() else None
            path.unlink(missing_ok=True)
            if target is None:
                break
            path = target

    def remove_parts(self) -> None:
        """Delete what downloads left that nobody will go on with."""
        for part in self._own.glob("*.part"):
            part.unlink(missing_ok=True)

    @contextmanager
    def locked(self, check: Callable[[], None]) -> Iterator[None]:
        """Keep other processes from downloading the same repository; `check` is called while waiting, and may raise."""
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
    """Whether a revision names its commit in full, and so never stands for another."""
    return _COMMIT.fullmatch(revision) is not None


def _show(blob: Path, shown: Path) -> None:
    """A relative link, so that the cache can be moved; the file itself where links are not allowed.

    It appears at once and never goes away for a moment: another process may be looking.
    """
    shown.parent.mkdir(parents=True, exist_ok=True)
    fresh = _fresh_name(shown)
    try:
        fresh.symlink_to(os.path.relpath(blob, shown.parent))
    except OSError:
        fresh = blob
    fresh.replace(shown)


def _write(path: Path, content: bytes) -> None:
    """Write a small file so that it is either the old or the new one, whatever happens."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = _fresh_name(path)
    with fresh.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)


def _fresh_name(path: Path) -> Path:
    """A name beside `path` that nobody else uses."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
