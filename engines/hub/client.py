"""Lists a hub repository, reads byte ranges of its files, and downloads and verifies whole files.

Built on huggingface_hub (addresses, headers, listing, errors). Streams whole files itself, over plain HTTP, because the
library's own download (2.4) neither resumes after a failed or killed run nor checks sha256, and retries for minutes
when the hub hangs. Does not use hf-xet: its buffers, up to a quarter of the memory, are outside our budget; it ignores
HF_ENDPOINT; and it counts either compressed bytes or bytes already flushed. Hubs serve every xet file over HTTP too.
Knows neither which files a model needs nor how the cache is laid out.
"""

import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property, partial
from http import HTTPStatus
from pathlib import Path
from typing import TypeVar

import httpx2
from huggingface_hub import HfApi, constants, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.hf_api import ModelInfo
from huggingface_hub.utils import (  # type: ignore[attr-defined]  # documented there, but not in an __all__
    build_hf_headers,
    hf_raise_for_status,
)
from msgspec import Struct, field

from engines.errors import BrokenFiles, DiskFull, ShuttingDown
from engines.hub.cache import is_commit
from engines.hub.errors import HubRequest, is_transient, offline_error, retry_after_s, translate_error
from engines.hub.file_selection import is_safe
from engines.hub.partial_file import FileEntry, FileHash, OnBytes, PartialFile

_ETAG = re.compile("[0-9a-f]{40}|[0-9a-f]{64}")


class Listing(Struct, frozen=True, kw_only=True):
    """All files of a repository at one commit."""

    repo_id: str
    commit: str
    files: Mapping[str, FileEntry]


def read_listing(repo_id: str, info: ModelInfo) -> Listing:
    """Converts the hub's answer. Validates commits, etags and names, because they become parts of paths.

    Raises:
        ValueError: no commit, no files, or a file without size or hash.
    """
    files = {}
    for sibling in info.siblings or ():
        etag = sibling.lfs.sha256 if sibling.lfs else sibling.blob_id
        if sibling.size is None or etag is None or not _ETAG.fullmatch(etag):
            raise ValueError(f"{sibling.rfilename} of {repo_id} is listed without size and hash")
        if is_safe(sibling.rfilename):
            files[sibling.rfilename] = FileEntry(name=sibling.rfilename, size_bytes=sibling.size, etag=etag)
    if not files or not info.sha or not is_commit(info.sha):
        raise ValueError(f"{repo_id} is listed without commit or files")
    return Listing(repo_id=repo_id, commit=info.sha, files=files)


_LONGEST_WAIT_S = 20.0
"""A `Retry-After` above this is reported as an error instead of waited for: the pool tries again later."""

_PROGRESS_BYTES = 1 << 20
"""An interrupted attempt that brought at least this much does not count as a failure."""

_BROKEN_ANSWERS = (httpx2.HTTPError, OSError, ValueError, RuntimeError)
"""What the libraries raise: HTTP and network errors, disk errors, malformed bodies, a client closed while in use."""

_T = TypeVar("_T")


class HubConfig(Struct, frozen=True, kw_only=True):
    """The hub's address, credentials, cache and retries. Defaults are huggingface_hub's (HF_ENDPOINT, HF_HOME, …).

    `token`: None uses HF_TOKEN or `hf auth login`, False sends none. `timeout_s`: connect and read timeout. `attempts`:
    the most consecutive attempts that bring less than a megabyte; the pause between them starts at `backoff_s` and
    doubles.
    """

    endpoint: str = field(default_factory=lambda: constants.ENDPOINT)
    token: str | bool | None = None
    cache_dir: str = field(default_factory=lambda: constants.HF_HUB_CACHE)
    offline: bool = field(default_factory=constants.is_offline_mode)
    timeout_s: float = field(default_factory=lambda: float(constants.HF_HUB_DOWNLOAD_TIMEOUT))
    attempts: int = 4
    backoff_s: float = 1.0

    def __repr__(self) -> str:
        """Omits the token, since configurations end up in logs."""
        return f"HubConfig({self.endpoint}, offline={self.offline})"


class HubClient:
    """A client of one hub. Thread-safe; `close` ends running calls."""

    def __init__(self, config: HubConfig) -> None:
        self.config = config
        self._closed = threading.Event()

    @cached_property
    def _client(self) -> httpx2.Client:
        # Not the library's shared client, which it closes for all users when any request fails to connect.
        return httpx2.Client(follow_redirects=True, timeout=self.config.timeout_s)

    def listing(self, repo_id: str, revision: str) -> Listing:
        """Resolves the revision to a commit and lists its files.

        Raises:
            SourceError: unknown, forbidden, unreachable or offline.
        """
        api = HfApi(endpoint=self.config.endpoint, token=self.config.token)
        timeout_s = self.config.timeout_s

        def send() -> Listing:
            info = api.model_info(repo_id, revision=revision, files_metadata=True, timeout=timeout_s)
            return read_listing(repo_id, info)

        return self._with_retries(send, self._request(repo_id, revision))

    def read_range(self, listing: Listing, name: str, start: int, end: int) -> bytes:
        """Reads bytes `start` up to and excluding `end` of a file with a range request.

        Raises:
            SourceError: as for `listing`.
        """

        def send() -> bytes:
            with self._get(listing, name, start, end) as response:
                # A server without range support answers 200 with the whole file.
                skip = start if response.status_code == HTTPStatus.OK else 0
                content = bytearray()
                for chunk in response.iter_bytes():
                    content += chunk
                    if len(content) >= skip + end - start:
                        break
                return bytes(content[skip : skip + end - start])

        return self._with_retries(send, self._request(listing.repo_id, listing.commit, name))

    def read_file(self, listing: Listing, name: str) -> bytes:
        """Reads a small file whole and checks its hash.

        Raises:
            SourceError: as for `listing`.
            BrokenFiles: corrupt twice.
        """
        file = listing.files[name]
        for _ in range(2):
            content = self.read_range(listing, name, 0, file.size_bytes)
            digest = FileHash(file)
            digest.update(content)
            if digest.is_right():
                return content
        raise _corrupt_error(listing, file)

    def download(self, listing: Listing, file: FileEntry, path: Path, on_bytes: OnBytes) -> None:
        """Downloads a file to `path`, resuming from existing bytes, and checks its size and hash.

        Downloads a file that arrives corrupt once more from the beginning.

        Raises:
            SourceError: as for `listing`, and when the disk cannot be written.
            BrokenFiles: corrupt twice; `path` is then deleted.
        """
        request = self._request(listing.repo_id, listing.commit, file.name)
        for _ in range(2):
            part = PartialFile(path, file, on_bytes)
            try:
                self._with_retries(partial(self._stream, listing, part), request, part)
            except DiskFull:
                path.unlink(missing_ok=True)
                raise
            if part.is_right():
                return
            part.discard()
        raise _corrupt_error(listing, file)

    def close(self) -> None:
        """Ends running calls with `ShuttingDown`, at the latest after their timeout; does not wait for them."""
        self._closed.set()
        if "_client" in self.__dict__:
            self._client.close()

    def check_open(self) -> None:
        """Raises `ShuttingDown` once the client is closed."""
        if self._closed.is_set():
            raise ShuttingDown("the server is shutting down: the download resumes at the next start")

    def _stream(self, listing: Listing, part: PartialFile) -> None:
        """Requests the rest of a file once. Returns when another request would not bring more."""
        with part.opened():
            before = part.done_bytes
            if before >= part.file.size_bytes:
                return
            try:
                with self._get(listing, part.file.name, before, part.file.size_bytes) as response:
                    if response.status_code == HTTPStatus.OK:
                        part.restart()
                    for chunk in response.iter_bytes():
                        self.check_open()
                        part.append(chunk)
            except HfHubHTTPError as error:
                if error.response.status_code != HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                    raise
                return  # the hub's file is shorter than its listing says
            if before < part.done_bytes < part.file.size_bytes:
                raise httpx2.RemoteProtocolError(f"{part.done_bytes} of {part.file.size_bytes} bytes")

    @contextmanager
    def _get(self, listing: Listing, name: str, start: int, end: int) -> Iterator[httpx2.Response]:
        url = hf_hub_url(listing.repo_id, name, revision=listing.commit, endpoint=self.config.endpoint)
        headers = {**build_hf_headers(token=self.config.token), "Accept-Encoding": "identity"}
        if start > 0 or end < listing.files[name].size_bytes:
            headers["Range"] = f"bytes={start}-{end - 1}"
        with self._client.stream("GET", url, headers=headers) as response:
            hf_raise_for_status(response)
            yield response

    def _with_retries(self, send: Callable[[], _T], request: HubRequest, part: PartialFile | None = None) -> _T:
        """Sends a request and retries transient failures, up to `attempts` times without progress."""
        failures = 0
        while True:
            self.check_open()
            if self.config.offline:
                raise offline_error(request)
            before = part.done_bytes if part else 0
            try:
                return send()
            except _BROKEN_ANSWERS as error:
                has_progress = part is not None and part.done_bytes - before >= _PROGRESS_BYTES
                failures = 1 if has_progress else failures + 1
                self._pause_or_give_up(error, failures, request)

    def _pause_or_give_up(self, error: Exception, failures: int, request: HubRequest) -> None:
        self.check_open()
        wait_s = self.config.backoff_s * 2 ** (failures - 1)
        hub_wait_s = retry_after_s(error)
        if hub_wait_s is not None:
            wait_s = max(wait_s, hub_wait_s)
        if failures >= self.config.attempts or wait_s > _LONGEST_WAIT_S or not is_transient(error):
            raise translate_error(error, request) from error
        self._closed.wait(wait_s)

    def _request(self, repo_id: str, revision: str, file: str | None = None) -> HubRequest:
        config = self.config
        return HubRequest(
            endpoint=config.endpoint, repo_id=repo_id, revision=revision, file=file, timeout_s=config.timeout_s
        )


def _corrupt_error(listing: Listing, file: FileEntry) -> BrokenFiles:
    return BrokenFiles(
        f"{file.name} of {listing.repo_id} arrived corrupt twice (size or hash differ from the hub's listing): check "
        "any mirror or proxy, or pin another 'revision' in the registry",
        file=file.name,
    )
