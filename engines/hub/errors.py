"""Translates errors of huggingface_hub, HTTP and the disk into ours; each message names the remedy.

Messages reach clients: they name the repository and the hub's address, never a token or a path on this machine.
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
_DISK_FULL_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT})


class HubRequest(Struct, frozen=True, kw_only=True):
    """The request to the hub that an error message describes. `timeout_s`: the read timeout."""

    endpoint: str
    repo_id: str
    revision: str
    file: str | None = None
    timeout_s: float

    @property
    def hub(self) -> str:
        """The hub's address without the credentials that a mirror's URL may contain."""
        parts = urlsplit(self.endpoint)
        return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"


def is_transient(error: Exception) -> bool:
    """Returns whether a retry soon may succeed."""
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in _TRANSIENT_STATUSES
    return isinstance(error, httpx2.TransportError)


def retry_after_s(error: Exception) -> float | None:
    """Returns the seconds of the hub's `Retry-After` header, if any."""
    if not isinstance(error, HfHubHTTPError):
        return None
    value = error.response.headers.get("Retry-After", "")
    return float(value) if value.isdigit() else None


def translate_error(error: Exception, request: HubRequest) -> SourceError:
    """Returns our error for one of the libraries'; raise it `from` that."""
    if isinstance(error, OfflineModeIsEnabled):
        return offline_error(request)
    if isinstance(error, HFValidationError):
        return invalid_source_error(request.repo_id)
    if isinstance(error, HfHubHTTPError):
        return _status_error(error, request)
    if isinstance(error, httpx2.HTTPError):
        return _connection_error(error, request)
    if isinstance(error, OSError):
        return _disk_error(error, request.repo_id)
    return HubUnreachable(f"{request.hub} does not answer like a model hub: check HF_ENDPOINT and any proxy")


def invalid_source_error(source: str) -> SourceNotFound:
    return SourceNotFound(
        f"{source!r} is neither a hub id (organisation/name) nor a folder (starting with /, ./, ../ or ~): correct "
        "'source' in the registry"
    )


def offline_error(request: HubRequest) -> OfflineMode:
    """Returns the error for a model that is not on disk while HF_HUB_OFFLINE is set."""
    return OfflineMode(
        f"{request.repo_id} is not complete on disk and HF_HUB_OFFLINE is set: run `embedyard pull` while online, or "
        "unset HF_HUB_OFFLINE"
    )


@contextmanager
def translate_disk_errors(repo_id: str) -> Iterator[None]:
    """Raises a `SourceError` for an `OSError` from the cache of a repository."""
    try:
        yield
    except OSError as error:
        raise _disk_error(error, repo_id) from error


def disk_full_error(repo_id: str, need_bytes: int, free_bytes: int) -> DiskFull:
    return DiskFull(
        f"{repo_id} needs {format_bytes(need_bytes)} more on disk, but {format_bytes(free_bytes)} are free: free disk "
        "space, or point HF_HOME to a larger disk"
    )


def _status_error(error: HfHubHTTPError, request: HubRequest) -> SourceError:
    """Returns the error for an answer with an error status.

    Six cases: (1) gated, (2) disabled by the hub, (3) no such revision or file, (4) no such repository, (5) no
    permission, (6) any other failure of the hub. A 401 without a token may be (4) or (5): the hub does not say which.
    """
    status = error.response.status_code
    if isinstance(error, GatedRepoError):
        return AccessDenied(
            f"{request.repo_id} is gated: accept its licence at {request.hub}/{request.repo_id} "
            "and set HF_TOKEN to a token of that account"
        )
    if isinstance(error, DisabledRepoError):
        return AccessDenied(f"{request.repo_id} was disabled on {request.hub}: choose another 'source'")
    if isinstance(error, RevisionNotFoundError):
        return SourceNotFound(
            f"{request.repo_id} has no revision {request.revision}: correct 'revision' in the registry"
        )
    if isinstance(error, EntryNotFoundError):
        return SourceNotFound(f"{request.repo_id} has no file {request.file} at revision {request.revision}")
    if status == 404:
        return SourceNotFound(f"{request.hub} has no repository {request.repo_id}: correct 'source' in the registry")
    if status == 401:
        return _unauthorized_error(error, request)
    if status == 403:
        return AccessDenied(f"the token in HF_TOKEN may not read {request.repo_id}: use one with read access")
    return _server_error(error, request)


def _unauthorized_error(error: HfHubHTTPError, request: HubRequest) -> AccessDenied:
    if "authorization" in error.response.request.headers:
        return AccessDenied(f"{request.hub} refuses the token in HF_TOKEN for {request.repo_id}: renew it")
    return AccessDenied(
        f"{request.repo_id} does not exist on {request.hub} or is private: correct 'source', "
        "or set HF_TOKEN to a token that may read it"
    )


def _server_error(error: HfHubHTTPError, request: HubRequest) -> HubUnreachable:
    status, wait_s = error.response.status_code, retry_after_s(error)
    if status == 429:
        when = f"asks to wait {wait_s:.0f} s" if wait_s is not None else "asks to slow down"
        return HubUnreachable(
            f"{request.hub} {when} (429 for {request.repo_id}): a token in HF_TOKEN raises its limits"
        )
    return HubUnreachable(f"{request.hub} answered {status} for {request.repo_id}: try again later")


def _connection_error(error: httpx2.HTTPError, request: HubRequest) -> HubUnreachable:
    target = f"{request.repo_id}/{request.file}" if request.file else request.repo_id
    if isinstance(error, httpx2.ConnectError | httpx2.ProxyError):
        reason = f"{request.hub} cannot be reached ({error})"
    elif isinstance(error, httpx2.TimeoutException):
        reason = f"{request.hub} sent nothing of {target} for {request.timeout_s:g} s"
    else:
        reason = f"the connection to {request.hub} broke while reading {target}"
    return HubUnreachable(f"{reason}: check the network, or set HF_ENDPOINT to a mirror")


def _disk_error(error: OSError, repo_id: str) -> SourceError:
    if error.errno in _DISK_FULL_ERRNOS:
        return DiskFull(
            f"the disk filled up during the download of {repo_id}: free disk space, or point HF_HOME to a larger disk"
        )
    reason = error.strerror or "input/output error"
    return SourceError(f"the model cache cannot be written ({reason}): point HF_HOME to a writable folder")
