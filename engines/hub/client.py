"""Talking to a model hub: what is in a repository, pieces of its files, whole files, verified.

Built on huggingface_hub (addresses, headers, listing, errors). Whole files are streamed here, over plain HTTP, because
the library's own download (2.4) neither resumes after a failed or killed run nor checks sha256, and retries for minutes
where the hub hangs. hf-xet is left out: its buffers, up to a quarter of the memory, are in no budget of ours; it passes
HF_ENDPOINT by; and it counts either compressed bytes or bytes already flushed. Hubs serve every xet file over HTTP too.
Knows nothing of which files a model needs, nor of how a cache is laid out.
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
from engines.hub.errors import HubRequest, is_transient, offline, retry_after_s, translate
from engines.hub.file_selection import is_safe
from engines.hub.partial_file import FileEntry, FileHash, OnBytes, PartFile

_COMMIT = re.compile("[0-9a-f]{40}")


_ETAG = re.compile("[0-9a-f]{40}|[0-9a-f]{64}")


class Listing(Struct, frozen=True, kw_only=True):
    """Everything in a repository at one commit."""

    repo_id: str
    commit: str
    files: Mapping[str, FileEntry]


def read_listing(repo_id: str, info: ModelInfo) -> Listing:
    """Our form of the hub's answer. Commits, etags and names become parts of paths, so nothing odd gets through.

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
    if not files or not info.sha or not _COMMIT.fullmatch(info.sha):
        raise ValueError(f"{repo_id} is listed without commit or files")
    return Listing(repo_id=repo_id, commit=info.sha, files=files)


_LONGEST_WAIT_S = 20.0
"""A hub that asks for more than this is reported instead of waited for: the pool tries again later."""


_PROGRESS_BYTES = 1 << 20
"""A broken try that brought at least so much is no failure."""


_BROKEN_ANSWERS = (httpx2.HTTPError, OSError, ValueError, RuntimeError)
"""What the libraries raise: HTTP and network, disk, nonsense in a body, a client closed while in use."""


_T = TypeVar("_T")


class HubConfig(Struct, frozen=True, kw_only=True):
    """Where the hub is and how patient we are. The defaults are huggingface_hub's, thus HF_ENDPOINT, HF_HOME and so on.

    `token`: None means the one of HF_TOKEN or of `hf auth login`, False none. `timeout_s`: the longest silence of a
    connection. `attempts`: tries in a row that bring less than a megabyte; the pause between them begins at `backoff_s`
    and doubles.
    """

    endpoint: str = field(default_factory=lambda: constants.ENDPOINT)
    token: str | bool | None = None
    cache_dir: str = field(default_factory=lambda: constants.HF_HUB_CACHE)
    offline: bool = field(default_factory=constants.is_offline_mode)
    timeout_s: float = field(default_factory=lambda: float(constants.HF_HUB_DOWNLOAD_TIMEOUT))
    attempts: int = 4
    backoff_s: float = 1.0

    def __repr__(self) -> str:
        """Without the token: configurations end up in logs."""
        return f"HubConfig({self.endpoint}, offline={self.offline})"


class HubClient:
    """One hub. Threads may share it; `close` makes every running call end soon."""

    def __init__(self, config: HubConfig) -> None:
        self.config = config
        self._closed = threading.Event()

    @cached_property
    def _client(self) -> httpx2.Client:
        # Not the library's shared client: that one is closed under everyone's feet when any request fails to connect.
        return httpx2.Client(follow_redirects=True, timeout=self.config.timeout_s)

    def listing(self, repo_id: str, revision: str) -> Listing:
        """Resolve the revision to a commit and list its files.

        Raises:
            SourceError: unknown, forbidden, unreachable or offline.
        """
        api = HfApi(endpoint=self.config.endpoint, token=self.config.token)
        timeout_s = self.config.timeout_s

        def ask() -> Listing:
            info = api.model_info(repo_id, revision=revision, files_metadata=True, timeout=timeout_s)
            return read_listing(repo_id, info)

        return self._with_retries(ask, self._asked(repo_id, revision))

    def read_range(self, listing: Listing, name: str, start: int, end: int) -> bytes:
        """Bytes `start` up to, not including, `end` of a file, by a range request.

        Raises:
            SourceError: as for `listing`.
        """

        def ask() -> bytes:
            with self._get(listing, name, start, end) as response:
                # A server that knows no ranges answers 200 with the whole file.
                skip = start if response.status_code == HTTPStatus.OK else 0
                content = bytearray()
                for chunk in response.iter_bytes():
                    content += chunk
                    if len(content) >= skip + end - start:
                        break
                return bytes(content[skip : skip + end - start])

        return self._with_retries(ask, self._asked(listing.repo_id, listing.commit, name))

    def read_file(self, listing: Listing, name: str) -> bytes:
        """The whole of a small file, its hash checked.

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
        raise _corrupt(listing, file)

    def download(self, listing: Listing, file: FileEntry, path: Path, on_bytes: OnBytes) -> None:
        """Bring a whole file to `path`, going on from what is there, and check its size and hash.

        A file that arrives corrupt is fetched once more from the beginning.

        Raises:
            SourceError: as for `listing`, and when the disk refuses.
            BrokenFiles: corrupt twice; `path` is gone then.
        """
        asked = self._asked(listing.repo_id, listing.commit, file.name)
        for _ in range(2):
            part = PartFile(path, file, on_bytes)
            try:
                self._with_retries(partial(self._stream, listing, part), asked, part)
            except DiskFull:
                path.unlink(missing_ok=True)
                raise
            if part.is_right():
                return
            part.discard()
        raise _corrupt(listing, file)

    def close(self) -> None:
        """End running calls with `ShuttingDown`, at the latest when their time-out passes; does not wait for them."""
        self._closed.set()
        if "_client" in self.__dict__:
            self._client.close()

    def check_open(self) -> None:
        """Raise `ShuttingDown` once the hub is closed."""
        if self._closed.is_set():
            raise ShuttingDown("the server is shutting down; the download stops here and goes on at the next start")

    def _stream(self, listing: Listing, part: PartFile) -> None:
        """One request for the rest of a file. Returns when another one would not bring more."""
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
                return  # the hub's file is shorter than the hub's listing says
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

    def _with_retries(self, ask: Callable[[], _T], asked: HubRequest, part: PartFile | None = None) -> _T:
        """Ask again while that may help: `attempts` times in a row that bring next to nothing."""
        failures = 0
        while True:
            self.check_open()
            if self.config.offline:
                raise offline(asked)
            before = part.done_bytes if part else 0
            try:
                return ask()
            except _BROKEN_ANSWERS as error:
                has_progress = part is not None and part.done_bytes - before >= _PROGRESS_BYTES
                failures = 1 if has_progress else failures + 1
                self._pause_or_give_up(error, failures, asked)

    def _pause_or_give_up(self, error: Exception, failures: int, asked: HubRequest) -> None:
        self.check_open()
        wait_s = self.config.backoff_s * 2 ** (failures - 1)
        hub_wait_s = retry_after_s(error)
        if hub_wait_s is not None:
            wait_s = max(wait_s, hub_wait_s)
        if failures >= self.config.attempts or wait_s > _LONGEST_WAIT_S or not is_transient(error):
            raise translate(error, asked) from error
        self._closed.wait(wait_s)

    def _asked(self, repo_id: str, revision: str, file: str | None = None) -> HubRequest:
        config = self.config
        return HubRequest(
            endpoint=config.endpoint, repo_id=repo_id, revision=revision, file=file, timeout_s=config.timeout_s
        )


def _corrupt(listing: Listing, file: FileEntry) -> BrokenFiles:
    return BrokenFiles(
        f"{file.name} of {listing.repo_id} arrived corrupt twice (size or hash are not what the hub lists): "
        "check the mirror or proxy in between, or pin another 'revision'",
        file=file.name,
    )
