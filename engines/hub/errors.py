"""What went wrong with a hub, said once: the errors of huggingface_hub, HTTP and disk → ours, each with its cure.

Messages go to clients: they name the repository and the hub's address, never a token or a path on this machine.
"""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

import httpx2
from huggingface_hub.errors import (
    DisabledRepoError,
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RevisionNotFoundError,
)
from msgspec import Struct

from engines.errors import AccessDenied, DiskFull, HubUnreachable, OfflineMode, SourceError, SourceNotFound
from engines.types import format_bytes

_TRANSIENT_STATUSES = frozenset({408, 429, 500, 502, 503, 504})
_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT})


class HubRequest(Struct, frozen=True, kw_only=True):
    """What was asked of the hub, for the message. `timeout_s` is how long an answer was waited for."""

    endpoint: str
    repo_id: str
    revision: str
    file: str | None = None
    timeout_s: float

    @property
    def hub(self) -> str:
        """The hub's address without credentials that a mirror's URL may carry."""
        parts = urlsplit(self.endpoint)
        return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"


def is_transient(error: Exception) -> bool:
    """Whether asking again soon may help."""
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in _TRANSIENT_STATUSES
    return isinstance(error, httpx2.TransportError)


def retry_after_s(error: Exception) -> float | None:
    """How long the hub asked us to wait, if it did."""
    if not isinstance(error, HfHubHTTPError):
        return None
    value = error.response.headers.get("Retry-After", "")
    return float(value) if value.isdigit() else None


def translate(error: Exception, asked: HubRequest) -> SourceError:
    """Our error for one of the libraries'; to be raised `from` it."""
    if isinstance(error, OfflineModeIsEnabled):
        return offline(asked)
    if isinstance(error, HFValidationError):
        return not_a_source(asked.repo_id)
    if isinstance(error, HfHubHTTPError):
        return _refused(error, asked)
    if isinstance(error, httpx2.HTTPError):
        return _unreachable(error, asked)
    if isinstance(error, OSError):
        return _disk(error, asked.repo_id)
    return HubUnreachable(f"{asked.hub} does not answer like a model hub: check HF_ENDPOINT, or a proxy in between")


def not_a_source(source: str) -> SourceNotFound:
    return SourceNotFound(
        f"{source!r} is neither a hub id (organisation/name) nor a folder: a folder starts with / or ./ or ../ or ~"
    )


def offline(asked: HubRequest) -> OfflineMode:
    """The network is forbidden and the disk does not have it."""
    return OfflineMode(
        f"{asked.repo_id} is not whole on this machine's disk, and HF_HUB_OFFLINE forbids the network: "
        "fetch it with `embedyard pull` while online, or unset HF_HUB_OFFLINE"
    )


@contextmanager
def writing(repo_id: str) -> Iterator[None]:
    """Around work in the cache of a repository: what the disk refuses becomes a `SourceError`."""
    try:
        yield
    except OSError as error:
        raise _disk(error, repo_id) from error


def disk_full(repo_id: str, need_bytes: int, free_bytes: int) -> DiskFull:
    return DiskFull(
        f"{repo_id} needs {format_bytes(need_bytes)} more on disk, and {format_bytes(free_bytes)} are free: "
        "free some, or point HF_HOME to a larger disk"
    )


def _refused(error: HfHubHTTPError, asked: HubRequest) -> SourceError:
    """The hub answered, with an error status.

    (1) gated, (2) switched off by the hub, (3) no such revision or file, (4) no such repository, (5) no permission,
    (6) anything else is the hub's own trouble. A 401 without a token may be (4) or (5): the hub does not tell.
    """
    status = error.response.status_code
    if isinstance(error, GatedRepoError):
        return AccessDenied(
            f"{asked.repo_id} is gated: accept its licence at {asked.hub}/{asked.repo_id} "
            "and set HF_TOKEN to a token of that account"
        )
    if isinstance(error, DisabledRepoError):
        return AccessDenied(f"{asked.repo_id} was disabled on {asked.hub}: choose another 'source'")
    if isinstance(error, RevisionNotFoundError):
        return SourceNotFound(f"{asked.repo_id} has no revision {asked.revision}: correct 'revision' in the registry")
    if isinstance(error, EntryNotFoundError):
        return SourceNotFound(f"{asked.repo_id} has no file {asked.file} at revision {asked.revision}")
    if status == 404:
        return SourceNotFound(f"{asked.hub} has no repository {asked.repo_id}: correct 'source' in the registry")
    if status == 401:
        return _unauthorized(error, asked)
    if status == 403:
        return AccessDenied(f"the token in HF_TOKEN may not read {asked.repo_id}: use one with read access to it")
    return _troubled(error, asked)


def _unauthorized(error: HfHubHTTPError, asked: HubRequest) -> AccessDenied:
    if "authorization" in error.response.request.headers:
        return AccessDenied(f"{asked.hub} refuses the token in HF_TOKEN for {asked.repo_id}: renew it")
    return AccessDenied(
        f"{asked.repo_id} does not exist on {asked.hub} or is private: correct 'source', "
        "or set HF_TOKEN to a token that may read it"
    )


def _troubled(error: HfHubHTTPError, asked: HubRequest) -> HubUnreachable:
    status, wait_s = error.response.status_code, retry_after_s(error)
    if status == 429:
        when = f"asks to wait {wait_s:.0f} s" if wait_s is not None else "asks to slow down"
        return HubUnreachable(f"{asked.hub} {when} (429 for {asked.repo_id}): a token in HF_TOKEN raises its limits")
    return HubUnreachable(f"{asked.hub} answered {status} for {asked.repo_id}: try again later")


def _unreachable(error: httpx2.HTTPError, asked: HubRequest) -> HubUnreachable:
    what = f"{asked.repo_id}/{asked.file}" if asked.file else asked.repo_id
    if isinstance(error, httpx2.ConnectError | httpx2.ProxyError):
        why = f"{asked.hub} cannot be reached ({error})"
    elif isinstance(error, httpx2.TimeoutException):
        why = f"{asked.hub} sent nothing of {what} for {asked.timeout_s:g} s"
    else:
        why = f"the connection to {asked.hub} broke while reading {what}"
    return HubUnreachable(f"{why}: check the network, or set HF_ENDPOINT to a mirror")


def _disk(error: OSError, repo_id: str) -> SourceError:
    if error.errno in _NO_ROOM:
        return DiskFull(f"the disk filled up while {repo_id} was downloading: free some, or point HF_HOME elsewhere")
    reason = error.strerror or "input/output error"
    return SourceError(f"the model cache cannot be written ({reason}): point HF_HOME to a writable folder")
