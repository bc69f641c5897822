"""One hub repository at one revision as the source of a model: whole on disk, or fetched, verified and made whole.

Joins the hub (`download`), its cache on disk (`hub_cache`) and the choice of files (`selection`). Knows no threads:
the caller sees to it that one fetch of a model runs at a time.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from msgspec import Struct

from engines.errors import BadModel, BrokenFiles, FilesChanged, HubUnreachable, OfflineMode
from engines.hub.cache import Manifest, RepoCache
from engines.hub.client import HubClient, Listing
from engines.hub.errors import disk_full, writing
from engines.hub.file_selection import MODULES, Selection, select
from engines.hub.file_verification import GoOn, Verdict, Verification
from engines.hub.partial_file import FileEntry, OnBytes, is_intact
from engines.hub.single_flight import DownloadProgress
from engines.hub.weight_files import WeightCount, count_weights, read_header
from engines.types import ModelFiles, fingerprint

_WHOLE_REPOSITORY = ".gitattributes"


class CachedSnapshot(Struct, frozen=True, kw_only=True):
    """A complete snapshot; its hashes are still to be checked."""

    commit: str
    files: tuple[FileEntry, ...]
    selection: Selection


def find_snapshot(cache: RepoCache, *, with_code: bool) -> CachedSnapshot | None:
    """The snapshot of the revision that the cache knows, when nothing of the model is missing from it."""
    commit = cache.known_commit()
    if commit is None:
        return None
    here = cache.entries(commit)
    names = _all_names(cache, commit, here, with_code=with_code)
    if names is None:
        return None
    try:
        selection = select(names, lambda name: cache.path(commit, name).read_bytes(), source="", with_code=with_code)
        files = tuple(here[name] for name in selection.files)
    except (BadModel, OSError, KeyError):
        return None
    return CachedSnapshot(commit=commit, files=files, selection=selection)


def _all_names(
    cache: RepoCache, commit: str, here: Mapping[str, FileEntry], *, with_code: bool
) -> Mapping[str, object] | None:
    """The names of all files that the repository has, as far as the model is concerned; None when not known."""
    listed = cache.listed(commit)
    if listed is not None:
        return listed
    if _WHOLE_REPOSITORY in here:
        return here
    knows_modules = MODULES in here or cache.is_known_absent(commit, MODULES)
    return here if knows_modules and not with_code else None


FreeBytes = Callable[[str], int]
"""Free bytes on the disk that holds a path."""


class Repository:
    """A model's files on a hub and in its cache. `with_code`: the repository's Python files are wanted too."""

    def __init__(self, hub: HubClient, cache: RepoCache, verification: Verification, *, with_code: bool) -> None:
        self._hub = hub
        self._cache = cache
        self._verification = verification
        self._repo_id = cache.repo_id
        self._with_code = with_code

    def locate(self) -> ModelFiles | None:
        """The files when a manifest says that they were verified, and their sizes and headers are still right."""
        manifest = self._cache.manifest()
        if manifest is None or (self._with_code and not manifest.with_code):
            return None
        if not all(self._looks_whole(manifest.commit, file) for file in manifest.files):
            return None
        return self._model_files(manifest)

    def fetch(self, tally: DownloadProgress, free_bytes: FreeBytes, silence: str = "") -> ModelFiles:
        """Bring what is missing. What other tools brought is used when its hashes are right.

        Where the hub cannot be asked and nothing is whole yet, other tools' snapshot is taken if surely complete.
        `silence`: it had no answer a moment ago, and this is why; it is not asked again.

        Raises:
            SourceError, BrokenFiles, UnsupportedModel, ShuttingDown.
        """
        try:
            if silence:
                raise HubUnreachable(silence)
            listing = self._hub.listing(self._repo_id, self._cache.revision)
        except (HubUnreachable, OfflineMode):
            adopted = self._adopt(tally) if self.locate() is None else None
            if adopted is None:
                raise
            return adopted
        selection = self._select(listing)
        wanted = tuple(listing.files[name] for name in selection.files)
        tally.expect(sum(file.size_bytes for file in wanted))
        missing = [file for file in wanted if not self._has(listing.commit, file, tally)]
        if missing:
            self._download(listing, missing, tally, free_bytes)
        return self._make_whole(listing.commit, wanted, selection)

    def is_current(self, files: ModelFiles) -> bool:
        """Whether the files are as they were found, and none of them is known to be damaged."""
        manifest = self._cache.manifest()
        if manifest is None or manifest.commit != files.revision:
            return True  # a branch that has moved on is taken up when it is asked for, at the same time by everyone
        try:
            verdicts = {self._verdict(manifest.commit, file) for file in manifest.files}
            return not verdicts & {"wrong", "written"} and self._model_files(manifest) == files
        except OSError:
            return False

    def verify(self, files: ModelFiles | None, go_on: GoOn, *, is_anew: bool) -> None:
        """Hash what has not been hashed since it was written; all of it when `is_anew`. `files`: as they were found.

        Raises:
            BrokenFiles: naming the first file that is damaged.
            FilesChanged: a file was replaced since they were found: what was damaged then is in memory still.
        """
        manifest = self._cache.manifest()
        if manifest is None or (files is not None and manifest.commit != files.revision):
            return
        for file in manifest.files:
            path = self._cache.path(manifest.commit, file.name)
            if go_on() and path.exists() and self._verification.check(path, file, go_on, is_anew=is_anew) is False:
                raise _damaged(self._repo_id, file.name)
        if files is not None and self._model_files(manifest).stamp != files.stamp:
            raise FilesChanged(f"files of {self._repo_id} were replaced on the disk since the model was loaded")

    def discard(self, file: str | None) -> None:
        """Delete a file, or all of them. The manifest goes too, so that the next fetch verifies what stays."""
        manifest = self._cache.manifest()
        self._cache.delete_manifest()
        if manifest is not None:
            for name in [file] if file is not None else [entry.name for entry in manifest.files]:
                self._cache.remove(manifest.commit, name)

    def count_weights(self) -> WeightCount:
        """What the weight files hold: from disk when they are here, else by range requests.

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

    def _select(self, listing: Listing) -> Selection:
        read = partial(self._hub.read_file, listing)
        return select(listing.files, read, source=self._repo_id, with_code=self._with_code)

    def _has(self, commit: str, file: FileEntry, tally: DownloadProgress) -> bool:
        """Whether the file is here and right: known from the manifest, else by its hash."""
        manifest = self._cache.manifest()
        with writing(self._repo_id):
            if not self._cache.link_blob(commit, file):
                return False
            if manifest is not None and file in manifest.files and self._looks_whole(commit, file):
                tally.add(file.size_bytes)
                return True
            return self._is_intact(commit, file, tally.add)

    def _is_intact(self, commit: str, file: FileEntry, on_bytes: OnBytes) -> bool:
        path = self._cache.path(commit, file.name)
        is_right = is_intact(path, file, on_bytes)
        self._verification.note(path, file, is_right=is_right)
        return is_right

    def _download(
        self, listing: Listing, files: Sequence[FileEntry], tally: DownloadProgress, free_bytes: FreeBytes
    ) -> None:
        with writing(self._repo_id), self._cache.locked(self._hub.check_open):
            # Another process may have brought some of them while this one waited for the lock.
            missing = [file for file in files if not self._has(listing.commit, file, tally)]
            need_bytes = sum(file.size_bytes - self._cache.part_bytes(file) for file in missing)
            here_bytes = free_bytes(self._cache.folder)
            if need_bytes > here_bytes:
                raise disk_full(self._repo_id, need_bytes, here_bytes)
            for file in missing:
                self._cache.remove(listing.commit, file.name)  # it is not here, or wrong
                part = self._cache.part(file)
                self._hub.download(listing, file, part, tally.add)
                self._cache.commit_blob(part, listing.commit, file)
                self._verification.note(self._cache.path(listing.commit, file.name), file, is_right=True)
            self._cache.remove_parts()

    def _adopt(self, tally: DownloadProgress) -> ModelFiles | None:
        """Make whole what other tools left in the cache, if it is all there and its hashes are right."""
        found = find_snapshot(self._cache, with_code=self._with_code)
        if found is None:
            return None
        tally.expect(sum(file.size_bytes for file in found.files))
        if not all(self._is_intact(found.commit, file, tally.add) for file in found.files):
            return None
        return self._make_whole(found.commit, found.files, found.selection)

    def _make_whole(self, commit: str, files: tuple[FileEntry, ...], selection: Selection) -> ModelFiles:
        """Check the headers, which the hub may hold broken, and write the manifest."""
        for file in files:
            self._check_header(commit, file)
        earlier = self._cache.manifest()
        with_code = self._with_code
        if earlier is not None and earlier.commit == commit and earlier.with_code and not with_code:
            files, with_code = earlier.files, True  # a model with code and one without may share a repository
        manifest = Manifest(commit=commit, files=files, weights=selection.weights, with_code=with_code)
        self._cache.write_manifest(manifest)
        return self._model_files(manifest)

    def _model_files(self, manifest: Manifest) -> ModelFiles:
        return ModelFiles(
            path=str(self._cache.path(manifest.commit)),
            revision=manifest.commit,
            size_bytes=sum(file.size_bytes for file in manifest.files),
            stamp=fingerprint([self._stamp(manifest.commit, file) for file in manifest.files]),
        )

    def _stamp(self, commit: str, file: FileEntry) -> tuple[str, int, int]:
        stat = self._cache.path(commit, file.name).stat()
        return file.name, stat.st_mtime_ns, stat.st_ino

    def _verdict(self, commit: str, file: FileEntry) -> Verdict:
        return self._verification.verdict(self._cache.path(commit, file.name), file)

    def _looks_whole(self, commit: str, file: FileEntry) -> bool:
        """Whether size and header are right. The hash is read only where the file was written to since it was right."""
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


def _damaged(repo_id: str, file: str) -> BrokenFiles:
    return BrokenFiles(
        f"{file} of {repo_id} was damaged on the disk after its download (its hash is not the hub's any more); it is "
        "fetched again",
        file=file,
    )
