"""Where models' files come from: hub repositories, folders and installed packages behind one `Files`.

Owns the kinds of source and the rule that a process fetches a model once, however many hosts ask. The work is done in
`repository` (hub ids) and `local_folder`. Knows neither devices nor what the files are used for.
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
from engines.hub.errors import not_a_source
from engines.hub.file_selection import is_safe
from engines.hub.file_verification import GoOn, Verification
from engines.hub.local_folder import LocalFolder, is_local
from engines.hub.repository import FreeBytes, Repository
from engines.hub.single_flight import SingleFlights
from engines.hub.weight_files import WeightCount, target_dtype
from engines.protocols import Progress
from engines.spec import ModelSpec
from engines.types import ModelFiles

log = structlog.get_logger(__name__)

_MAIN = "main"

_SILENCE_S = 5.0
"""A fetch that follows a question within so long does not wait once more for a hub that had no answer."""


def free_disk_bytes(path: str) -> int:
    """Free bytes on the disk that holds `path`, which need not exist yet."""
    existing = next(parent for parent in (Path(path), *Path(path).absolute().parents) if parent.exists())
    return shutil.disk_usage(existing).free


class ModelStore:
    """`Files` of `engines/protocols.py`. Threads may share it.

    Args:
        config: where the hub and its cache are; by default what huggingface_hub reads from the environment.
        free_bytes: free bytes on the disk of a path.
        verification: the hashes that were read; by default remembered as long as this object lives.
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
        self._unwritten: dict[Path, Manifest] = {}
        self._counts: dict[tuple[str, str | None], WeightCount] = {}
        self._silences: dict[tuple[str, str | None], tuple[float, str]] = {}

    def locate(self, spec: ModelSpec) -> ModelFiles | None:
        """The model's files when they are whole on disk, without touching the network; None when they are not."""
        try:
            if is_local(spec.source):
                return self._folder(spec).files()
            return self._repository(spec).locate()
        except (BadModel, OSError):
            return None

    def fetch(self, spec: ModelSpec, on_progress: Progress, *, refresh: bool = False) -> ModelFiles:
        """Bring the files to disk, verified; calls for the same files share one download.

        `refresh` hashes what is here, discards what is damaged, and asks the hub what a branch or tag stands for now.

        Raises:
            SourceError, BrokenFiles: see `engines/errors.py`; the message names the cure.
            UnsupportedModel: no weights in a format that we read.
            ShuttingDown: the store was closed.
        """
        if is_local(spec.source):
            files = self._folder(spec).files()
        else:
            repository = self._repository(spec)
            if refresh:
                _discard_damaged(repository)
            located = None if refresh and not is_commit(spec.revision or _MAIN) else repository.locate()
            if located is None:
                key = (spec.source, spec.revision, spec.trust_remote_code)
                silence = self._silence(spec)
                flight = self._flights.join(key, lambda tally: repository.fetch(tally, self._free_bytes, silence))
                return flight.wait(on_progress)
            files = located
        on_progress(files.size_bytes, files.size_bytes)
        return files

    def is_current(self, spec: ModelSpec, files: ModelFiles) -> bool:
        """Whether the files are still those that were found."""
        if is_local(spec.source):
            return self.locate(spec) == files
        return self._repository(spec).is_current(files)

    def verify(self, spec: ModelSpec, files: ModelFiles, go_on: GoOn = lambda: True, *, is_anew: bool = False) -> None:
        """Hold the files of a hub against their hashes; of a local folder's nobody knows any.

        Args:
            go_on: asked all the time; what it pauses is gone on with by the next call.
            is_anew: also those whose hash was right the last time.

        Raises:
            BrokenFiles: a file is damaged.
            FilesChanged: a file was replaced since.
        """
        if not is_local(spec.source):
            self._repository(spec).verify(files, go_on, is_anew=is_anew)

    def discard(self, spec: ModelSpec, file: str | None) -> bool:
        """Remove a corrupt file (or all, when None); False where the files are not ours to remove."""
        if is_local(spec.source):
            return False
        self._repository(spec).discard(file)
        return True

    def weight_bytes(self, spec: ModelSpec, device: str) -> int | None:
        """Bytes of the weights on `device` in the spec's dtype, before any download; None when unknown.

        Exact for safetensors, but for heads that an embedder drops (`WeightCount.bytes_in`). Blocks: it may ask
        the hub for a listing and a few kilobytes of each weight file.
        """
        try:
            return self._count(spec).bytes_in(target_dtype(spec.dtype, device))
        except HubUnreachable as error:
            self._silences[spec.source, spec.revision] = time.monotonic(), str(error)
            return None
        except (BadModel, OSError):
            return None

    def close(self) -> None:
        """Let running downloads end with `ShuttingDown`; what they brought is gone on with at the next start."""
        self._hub.close()

    def _silence(self, spec: ModelSpec) -> str:
        """What was said of the hub when it was asked for the size a moment ago, and had no answer; told once."""
        since_s, message = self._silences.pop((spec.source, spec.revision), (0.0, ""))
        return message if time.monotonic() < since_s + _SILENCE_S else ""

    def _count(self, spec: ModelSpec) -> WeightCount:
        """Counts that cost requests are kept until the files are here; those of local files are read anew."""
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
            raise not_a_source(spec.source) from error
        if not is_safe(revision):
            raise SourceNotFound(f"{revision!r} is no revision of {spec.source}: correct 'revision' in the registry")
        cache = RepoCache(Path(self._config.cache_dir), spec.source, revision, self._unwritten)
        return Repository(self._hub, cache, self._verification, with_code=spec.trust_remote_code)


def _discard_damaged(repository: Repository) -> None:
    """The first file that is damaged: to discard it forgets that the others were verified, so a fetch hashes them."""
    try:
        repository.verify(None, lambda: True, is_anew=True)
    except BrokenFiles as error:
        log.warning("model.file_damaged", file=error.file, reason=str(error))
        repository.discard(error.file)
