"""Provides model files from hub repositories, local folders and installed packages behind one `Files` interface.

Owns the kinds of source and the rule that a process downloads a model once, however many hosts request it. Delegates
to `repository` (hub ids) and `local_folder`. Knows neither devices nor what the files are used for.
"""

import shutil
import time
from pathlib import Path

import structlog
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # as in engines/hub/client.py

from engines.errors import BadModel, BrokenFiles, HubUnreachable, SourceNotFound
from engines.hub.cache import Manifest, RepoCache, is_commit
from engines.hub.client import HubClient, HubConfig
from engines.hub.errors import invalid_source_error
from engines.hub.file_selection import is_safe
from engines.hub.file_verification import ShouldContinue, Verification
from engines.hub.local_folder import LocalFolder, is_local
from engines.hub.repository import FreeBytes, Repository
from engines.hub.single_flight import SingleFlights
from engines.hub.weight_files import WeightCount, target_dtype
from engines.protocols import Progress
from engines.spec import ModelSpec, parts_of
from engines.types import ModelFiles

log = structlog.get_logger(__name__)

_MAIN = "main"

_RECENT_FAILURE_S = 5.0
"""A fetch this soon after a failed size lookup reports that failure instead of waiting for the hub again."""


def free_disk_bytes(path: str) -> int:
    """Returns the free bytes on the disk that holds `path`, which need not exist yet."""
    existing = next(parent for parent in (Path(path), *Path(path).absolute().parents) if parent.exists())
    return shutil.disk_usage(existing).free


class ModelStore:
    """Implements `Files` of `engines/protocols.py`. Thread-safe.

    Args:
        config: hub and cache locations; defaults to what huggingface_hub reads from the environment.
        free_bytes: returns the free bytes on the disk of a path.
        verification: results of earlier hash checks; by default kept in memory only.
    """

    def __init__(
        self,
        config: HubConfig | None = None,
        *,
        free_bytes: FreeBytes = free_disk_bytes,
        verification: Verification | None = None,
    ) -> None:
        self._config = config or HubConfig()
        self._hub = HubClient(self._config)
        self._free_bytes = free_bytes
        self._verification = verification or Verification()
        self._flights = SingleFlights()
        self._unwritten_manifests: dict[Path, Manifest] = {}
        self._counts: dict[tuple[str, str | None], WeightCount] = {}
        self._recent_failures: dict[tuple[str, str | None], tuple[float, str]] = {}

    def locate(self, spec: ModelSpec) -> ModelFiles | None:
        """Returns the model's files if they are complete on disk, else None. Never uses the network."""
        try:
            base, *adapters = [self._locate(part) for part in parts_of(spec)]
        except (BadModel, OSError):
            return None
        for adapter in adapters:
            base = base.with_adapter(adapter) if base is not None and adapter is not None else None
        return base

    def fetch(self, spec: ModelSpec, on_progress: Progress, *, refresh: bool = False) -> ModelFiles:
        """Downloads and verifies the files if needed; concurrent calls for the same files share one download.

        `refresh` hashes the files on disk, discards damaged ones, and resolves a branch or tag on the hub again.

        Raises:
            SourceError, BrokenFiles: see `engines/errors.py`; the message names the remedy.
            UnsupportedModel: no weights in a supported format.
            ShuttingDown: the store was closed.
        """
        base, *adapters = parts_of(spec)
        found = [self._fetch(adapter, on_progress, refresh=refresh) for adapter in adapters]  # the small files first
        num_bytes = sum(files.size_bytes for files in found)
        files = self._fetch(base, lambda done, total: on_progress(done + num_bytes, total + num_bytes), refresh=refresh)
        return files.with_adapter(found[0]) if found else files

    def _locate(self, spec: ModelSpec) -> ModelFiles | None:
        if is_local(spec.source):
            return self._folder(spec).files()
        return self._repository(spec).locate()

    def _fetch(self, spec: ModelSpec, on_progress: Progress, *, refresh: bool) -> ModelFiles:
        if is_local(spec.source):
            files = self._folder(spec).files()
        else:
            repository = self._repository(spec)
            if refresh:
                _discard_damaged(repository)
            located = None if refresh and not is_commit(spec.revision or _MAIN) else repository.locate()
            if located is None:
                key = (spec.source, spec.revision, spec.trust_remote_code)
                hub_failure = self._recent_failure(spec)
                flight = self._flights.join(
                    key, lambda progress: repository.fetch(progress, self._free_bytes, hub_failure)
                )
                return flight.wait(on_progress)
            files = located
        on_progress(files.size_bytes, files.size_bytes)
        return files

    def is_current(self, spec: ModelSpec, files: ModelFiles) -> bool:
        """Returns whether the files on disk are still the ones in `files`."""
        return all(map(self._is_current, parts_of(spec), files.parts or (files,)))

    def verify(
        self,
        spec: ModelSpec,
        files: ModelFiles,
        should_continue: ShouldContinue = lambda: True,
        *,
        is_anew: bool = False,
    ) -> None:
        """Checks the hashes of files from a hub; does nothing for a local folder, whose hashes are unknown.

        Args:
            should_continue: called after each megabyte; False pauses the check, and the next call resumes it.
            is_anew: also hash files that passed the last check.

        Raises:
            BrokenFiles: a file is damaged.
            FilesChanged: a file was replaced since `files` were located.
        """
        for part, part_files in zip(parts_of(spec), files.parts or (files,), strict=True):
            if not is_local(part.source):
                self._repository(part).verify(part_files, should_continue, is_anew=is_anew)

    def discard(self, spec: ModelSpec, file: str | None) -> bool:
        """Deletes a corrupt file (all files when None); returns False for local sources, which are never deleted."""
        downloaded = [part for part in parts_of(spec) if not is_local(part.source)]
        for part in downloaded:  # a file of that name is deleted in both: the message of a broken file names no folder
            self._repository(part).discard(file)
        return bool(downloaded)

    def weight_bytes(self, spec: ModelSpec, device: str) -> int | None:
        """Returns the bytes of the weights on `device` in the spec's dtype, before any download; None when unknown.

        Exact for safetensors, except for heads that an embedder drops (`WeightCount.bytes_in`). An adapter adds
        none: it is merged. Blocks: it may request a listing and a few kilobytes of each weight file from the hub.
        """
        spec = parts_of(spec)[0]
        try:
            return self._count(spec).bytes_in(target_dtype(spec.dtype, device))
        except HubUnreachable as error:
            self._recent_failures[spec.source, spec.revision] = time.monotonic(), str(error)
            return None
        except (BadModel, OSError):
            return None

    def copy_description(self, spec: ModelSpec, target: Path) -> None:
        """Writes the configurations and README of a hub repository to a folder, without a download of the model.

        Raises:
            SourceError, BrokenFiles, UnsupportedModel: as for `fetch`.
        """
        self._repository(spec).copy_description(target)

    def close(self) -> None:
        """Ends running downloads with `ShuttingDown`; the next start resumes their partial files."""
        self._hub.close()

    def _is_current(self, spec: ModelSpec, files: ModelFiles) -> bool:
        if is_local(spec.source):
            return self.locate(spec) == files
        return self._repository(spec).is_current(files)

    def _recent_failure(self, spec: ModelSpec) -> str:
        """Returns, once, the error of a size lookup that failed in the last `_RECENT_FAILURE_S` seconds; else ""."""
        since_s, message = self._recent_failures.pop((spec.source, spec.revision), (0.0, ""))
        return message if time.monotonic() < since_s + _RECENT_FAILURE_S else ""

    def _count(self, spec: ModelSpec) -> WeightCount:
        """Counts the weights; caches counts that cost hub requests until the files are on disk."""
        if is_local(spec.source):
            return self._folder(spec).count_weights()
        repository = self._repository(spec)
        if repository.locate() is not None:
            return repository.count_weights()
        key = (spec.source, spec.revision)
        if key not in self._counts:
            self._counts[key] = repository.count_weights()
        return self._counts[key]

    def _folder(self, spec: ModelSpec) -> LocalFolder:
        return LocalFolder(spec.source, spec.model_id, with_code=spec.trust_remote_code)

    def _repository(self, spec: ModelSpec) -> Repository:
        revision = spec.revision or _MAIN
        try:
            validate_repo_id(spec.source)
        except HFValidationError as error:
            raise invalid_source_error(spec.source) from error
        if not is_safe(revision):
            raise SourceNotFound(
                f"{revision!r} is not a valid revision of {spec.source}: correct 'revision' in the registry"
            )
        cache = RepoCache(Path(self._config.cache_dir), spec.source, revision, self._unwritten_manifests)
        return Repository(self._hub, cache, self._verification, with_code=spec.trust_remote_code)


def _discard_damaged(repository: Repository) -> None:
    """Discards the first damaged file and with it the manifest, so that the next fetch hashes the other files."""
    try:
        repository.verify(None, lambda: True, is_anew=True)
    except BrokenFiles as error:
        log.warning("model.file_damaged", file=error.file, reason=str(error))
        repository.discard(error.file)
