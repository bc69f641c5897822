"""Locates, downloads, verifies and counts the files of one hub repository at one revision.

Joins the hub (`client`), its cache on disk (`cache`) and the choice of files (`file_selection`). Not thread-safe: the
caller ensures that one fetch of a model runs at a time.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from msgspec import Struct

from engines.errors import BadModel, BrokenFiles, FilesChanged, HubUnreachable, OfflineMode
from engines.hub.cache import Manifest, RepoCache
from engines.hub.client import HubClient, Listing
from engines.hub.errors import disk_full_error, translate_disk_errors
from engines.hub.file_selection import MODULES, Selection, description_files, select
from engines.hub.file_verification import ShouldContinue, Verdict, Verification
from engines.hub.partial_file import FileEntry, OnBytes, is_intact
from engines.hub.single_flight import DownloadProgress
from engines.hub.weight_files import WeightCount, count_weights, read_header
from engines.types import ModelFiles, fingerprint

_FULL_CLONE_MARKER = ".gitattributes"

_MAX_DESCRIPTION_BYTES = 4 * 2**20
"""Limit of a configuration or README that is read without a download of the model."""


class CachedSnapshot(Struct, frozen=True, kw_only=True):
    """A complete snapshot whose hashes are not checked yet."""

    commit: str
    files: tuple[FileEntry, ...]
    selection: Selection


def find_snapshot(cache: RepoCache, *, with_code: bool) -> CachedSnapshot | None:
    """Returns the cached snapshot of the revision, or None if any of the model's files is missing."""
    commit = cache.known_commit()
    if commit is None:
        return None
    here = cache.entries(commit)
    names = _list_names(cache, commit, here, with_code=with_code)
    if names is None:
        return None
    try:
        selection = select(names, lambda name: cache.path(commit, name).read_bytes(), source="", with_code=with_code)
        files = tuple(here[name] for name in selection.files)
    except (BadModel, OSError, KeyError):
        return None
    return CachedSnapshot(commit=commit, files=files, selection=selection)


def _list_names(
    cache: RepoCache, commit: str, here: Mapping[str, FileEntry], *, with_code: bool
) -> Mapping[str, object] | None:
    """Returns the names of the repository's files that may concern the model; None when the full list is unknown."""
    listed = cache.listed_files(commit)
    if listed is not None:
        return listed
    if _FULL_CLONE_MARKER in here:
        return here
    knows_modules = MODULES in here or cache.is_known_absent(commit, MODULES)
    return here if knows_modules and not with_code else None


FreeBytes = Callable[[str], int]
"""Returns the free bytes on the disk that holds a path."""


class Repository:
    """A model's files on a hub and in its cache. `with_code`: includes the repository's Python files."""

    def __init__(self, hub: HubClient, cache: RepoCache, verification: Verification, *, with_code: bool) -> None:
        self._hub = hub
        self._cache = cache
        self._verification = verification
        self._repo_id = cache.repo_id
        self._with_code = with_code

    def locate(self) -> ModelFiles | None:
        """Returns the files if a manifest lists them as verified, and their sizes and headers are still right."""
        manifest = self._cache.manifest()
        if manifest is None or (self._with_code and not manifest.with_code):
            return None
        if not all(self._is_complete(manifest.commit, file) for file in manifest.files):
            return None
        return self._model_files(manifest)

    def fetch(self, progress: DownloadProgress, free_bytes: FreeBytes, hub_failure: str = "") -> ModelFiles:
        """Downloads the missing files; files that other tools cached are used when their hashes are right.

        If the hub is unreachable and no verified files exist, uses a snapshot of other tools that is provably complete.
        `hub_failure`: the message of a request that failed a moment ago; the hub is not requested again.

        Raises:
            SourceError, BrokenFiles, UnsupportedModel, ShuttingDown.
        """
        try:
            if hub_failure:
                raise HubUnreachable(hub_failure)
            listing = self._hub.listing(self._repo_id, self._cache.revision)
        except (HubUnreachable, OfflineMode):
            adopted = self._adopt_snapshot(progress) if self.locate() is None else None
            if adopted is None:
                raise
            return adopted
        selection = self._select(listing)
        wanted = tuple(listing.files[name] for name in selection.files)
        progress.expect(sum(file.size_bytes for file in wanted))
        missing = [file for file in wanted if not self._is_present(listing.commit, file, progress)]
        if missing:
            self._download(listing, missing, progress, free_bytes)
        return self._complete(listing.commit, wanted, selection)

    def is_current(self, files: ModelFiles) -> bool:
        """Returns whether the files are unchanged since they were located and none is known to be damaged."""
        manifest = self._cache.manifest()
        if manifest is None or manifest.commit != files.revision:
            return True  # a branch that moved is adopted by an explicit refresh, by all hosts at the same time
        try:
            verdicts = {self._verdict(manifest.commit, file) for file in manifest.files}
            return not verdicts & {"wrong", "written"} and self._model_files(manifest) == files
        except OSError:
            return False

    def verify(self, files: ModelFiles | None, should_continue: ShouldContinue, *, is_anew: bool) -> None:
        """Hashes the files that were written since their last check; all of them when `is_anew`.

        `files`: the files as located when the model was loaded.

        Raises:
            BrokenFiles: naming the first damaged file.
            FilesChanged: a file was replaced since `files` were located; memory may still hold the damaged weights.
        """
        manifest = self._cache.manifest()
        if manifest is None or (files is not None and manifest.commit != files.revision):
            return
        for file in manifest.files:
            path = self._cache.path(manifest.commit, file.name)
            if (
                should_continue()
                and path.exists()
                and self._verification.check(path, file, should_continue, is_anew=is_anew) is False
            ):
                raise _damaged_error(self._repo_id, file.name)
        if files is not None and self._model_files(manifest).stamp != files.stamp:
            raise FilesChanged(f"files of {self._repo_id} were replaced on disk since the model was loaded")

    def discard(self, file: str | None) -> None:
        """Deletes one file, or all of them, and the manifest, so that the next fetch verifies the remaining files."""
        manifest = self._cache.manifest()
        self._cache.delete_manifest()
        if manifest is not None:
            for name in [file] if file is not None else [entry.name for entry in manifest.files]:
                self._cache.remove(manifest.commit, name)

    def count_weights(self) -> WeightCount:
        """Counts the weights from the files on disk if they are complete, else by range requests.

        Raises:
            SourceError, BrokenFiles, UnsupportedModel.
        """
        manifest = self._cache.manifest() if self.locate() is not None else None
        if manifest is not None:
            local = {file.name: file.size_bytes for file in manifest.files}
            return count_weights(local, manifest.weights, self._cache.reader(manifest.commit))
        listing = self._hub.listing(self._repo_id, self._cache.revision)
        remote = {name: file.size_bytes for name, file in listing.files.items()}
        return count_weights(remote, self._select(listing).weights, partial(self._hub.read_range, listing))

    def copy_description(self, target: Path) -> None:
        """Writes the repository's configurations and README to a folder: kilobytes, and no weights.

        Raises:
            SourceError, BrokenFiles.
            UnsupportedModel: no weights in a supported format.
        """
        listing = self._hub.listing(self._repo_id, self._cache.revision)
        self._select(listing)
        for name in description_files(listing.files, partial(self._hub.read_file, listing)):
            if listing.files[name].size_bytes <= _MAX_DESCRIPTION_BYTES:
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                (target / name).write_bytes(self._hub.read_file(listing, name))

    def _select(self, listing: Listing) -> Selection:
        read = partial(self._hub.read_file, listing)
        return select(listing.files, read, source=self._repo_id, with_code=self._with_code)

    def _is_present(self, commit: str, file: FileEntry, progress: DownloadProgress) -> bool:
        """Returns whether the file is on disk and right, according to the manifest or else to its hash."""
        manifest = self._cache.manifest()
        with translate_disk_errors(self._repo_id):
            if not self._cache.link_blob(commit, file):
                return False
            if manifest is not None and file in manifest.files and self._is_complete(commit, file):
                progress.add(file.size_bytes)
                return True
            return self._is_intact(commit, file, progress.add)

    def _is_intact(self, commit: str, file: FileEntry, on_bytes: OnBytes) -> bool:
        path = self._cache.path(commit, file.name)
        is_right = is_intact(path, file, on_bytes)
        self._verification.record(path, file, is_right=is_right)
        return is_right

    def _download(
        self, listing: Listing, files: Sequence[FileEntry], progress: DownloadProgress, free_bytes: FreeBytes
    ) -> None:
        with translate_disk_errors(self._repo_id), self._cache.locked(self._hub.check_open):
            # Another process may have downloaded some of them while this one waited for the lock.
            missing = [file for file in files if not self._is_present(listing.commit, file, progress)]
            need_bytes = sum(file.size_bytes - self._cache.partial_bytes(file) for file in missing)
            available_bytes = free_bytes(self._cache.folder)
            if need_bytes > available_bytes:
                raise disk_full_error(self._repo_id, need_bytes, available_bytes)
            for file in missing:
                self._cache.remove(listing.commit, file.name)  # missing or wrong
                part = self._cache.partial_path(file)
                self._hub.download(listing, file, part, progress.add)
                self._cache.commit_blob(part, listing.commit, file)
                self._verification.record(self._cache.path(listing.commit, file.name), file, is_right=True)
            self._cache.remove_partial_files()

    def _adopt_snapshot(self, progress: DownloadProgress) -> ModelFiles | None:
        """Adopts a snapshot that other tools left in the cache, if it is complete and its hashes are right."""
        found = find_snapshot(self._cache, with_code=self._with_code)
        if found is None:
            return None
        progress.expect(sum(file.size_bytes for file in found.files))
        if not all(self._is_intact(found.commit, file, progress.add) for file in found.files):
            return None
        return self._complete(found.commit, found.files, found.selection)

    def _complete(self, commit: str, files: tuple[FileEntry, ...], selection: Selection) -> ModelFiles:
        """Checks the headers, since the hub itself may hold broken files, and writes the manifest."""
        for file in files:
            self._check_header(commit, file)
        earlier = self._cache.manifest()
        with_code = self._with_code
        if earlier is not None and earlier.commit == commit and earlier.with_code and not with_code:
            files, with_code = earlier.files, True  # models with and without code may share a repository
        manifest = Manifest(commit=commit, files=files, weights=selection.weights, with_code=with_code)
        self._cache.write_manifest(manifest)
        return self._model_files(manifest)

    def _model_files(self, manifest: Manifest) -> ModelFiles:
        return ModelFiles(
            path=str(self._cache.path(manifest.commit)),
            revision=manifest.commit,
            size_bytes=sum(file.size_bytes for file in manifest.files),
            stamp=fingerprint([self._file_stamp(manifest.commit, file) for file in manifest.files]),
        )

    def _file_stamp(self, commit: str, file: FileEntry) -> tuple[str, int, int]:
        stat = self._cache.path(commit, file.name).stat()
        return file.name, stat.st_mtime_ns, stat.st_ino

    def _verdict(self, commit: str, file: FileEntry) -> Verdict:
        return self._verification.verdict(self._cache.path(commit, file.name), file)

    def _is_complete(self, commit: str, file: FileEntry) -> bool:
        """Returns whether size and header are right; hashes the file only if it was written since its last check."""
        path = self._cache.path(commit, file.name)
        try:
            if path.stat().st_size != file.size_bytes:
                return False
            self._check_header(commit, file)
            verdict = self._verdict(commit, file)
            return verdict in ("right", "unknown") or (
                verdict == "written" and bool(self._verification.check(path, file))
            )
        except (OSError, BrokenFiles):
            return False

    def _check_header(self, commit: str, file: FileEntry) -> None:
        if file.name.endswith(".safetensors"):
            read_header(file.name, file.size_bytes, self._cache.reader(commit))


def _damaged_error(repo_id: str, file: str) -> BrokenFiles:
    return BrokenFiles(
        f"{file} of {repo_id} was damaged on disk after its download (its hash no longer matches): it will be "
        "downloaded again",
        file=file,
    )
