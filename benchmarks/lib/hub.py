"""Serves folders as a model hub on loopback: the hub's real protocol over HTTP, with scripted faults.

    with LoopbackHub() as hub:
        hub.add("org/name", folder)
        hub.fail("org/name", Cut(after_bytes=1000), file="model.safetensors", times=1)
        store = ModelStore(HubConfig(endpoint=hub.url, cache_dir=..., token=False))

Serves small files directly and redirects requests for large ones (git-lfs) to a second server, as the real hub does to
its CDN. Records every request in `hub.requests`.
"""

import contextlib
import hashlib
import json
import re
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import ClassVar, Self, cast
from urllib.parse import unquote, urlsplit

LISTING = "<listing>"
"""As `file` of `LoopbackHub.fail`: the repository's listing (`/api/models/...`) instead of a file."""

_LARGE_SUFFIXES = (".safetensors", ".bin", ".onnx", ".h5", ".msgpack", ".pt")
_PIECE_BYTES = 1 << 20
_TICK_S = 0.02
_POLL_S = 0.005


# ---------------------------------------------------------------------------------------------------------- faults


@dataclass(frozen=True)
class Status:
    """Answers with an error status."""

    code: int
    error_code: str = ""
    message: str = ""
    retry_after_s: int | None = None
    commit: str | None = None


def gated() -> Status:
    """Returns the answer for a repository whose licence the client has not accepted."""
    return Status(403, "GatedRepo", "Access to this model is restricted and you are not in the authorized list.")


def not_found() -> Status:
    return Status(404, "RepoNotFound", "Repository not found")


def unauthorized() -> Status:
    return Status(401, message="Invalid username or password.")


def too_many_requests(retry_after_s: int | None = None) -> Status:
    return Status(429, message="Too many requests", retry_after_s=retry_after_s)


def server_error(code: int = 503) -> Status:
    return Status(code, message="Internal error")


@dataclass(frozen=True)
class Cut:
    """Closes the connection after `after_bytes` of each answer's body."""

    after_bytes: int


@dataclass(frozen=True)
class Corrupt:
    """Sends one wrong byte."""

    at_byte: int = 0


@dataclass(frozen=True)
class Shorter:
    """Sends a file `by_bytes` shorter than listed, as if it were complete."""

    by_bytes: int


@dataclass(frozen=True)
class Slow:
    """Limits the speed of an answer."""

    bytes_per_s: int


@dataclass(frozen=True)
class Hold:
    """Sends `after_bytes` of the body, then nothing until `release` is set (or the fault is healed).

    Sets `reached` once the bytes are sent. With `after_bytes=None` it holds back the headers too.
    """

    after_bytes: int | None = None
    release: threading.Event = field(default_factory=threading.Event)
    reached: threading.Event = field(default_factory=threading.Event)


@dataclass(frozen=True)
class IgnoreRange:
    """Answers range requests with the whole file."""


@dataclass(frozen=True)
class NotAHub:
    """Answers as a captive portal does: an HTML page with status 200."""


Fault = Status | Cut | Corrupt | Shorter | Slow | Hold | IgnoreRange | NotAHub


# ------------------------------------------------------------------------------------------------------ repositories


@dataclass(frozen=True)
class HubFile:
    """A file at one commit. `oid` is its git hash; `sha256` is set for large files."""

    name: str
    path: Path
    size: int
    oid: str
    sha256: str | None

    @property
    def etag(self) -> str:
        return self.sha256 or self.oid


@dataclass
class Repo:
    """A repository: its commits, and the commits that its branches and tags point to."""

    token: str | None
    is_gated: bool
    commits: dict[str, Mapping[str, HubFile]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def resolve(self, revision: str) -> str | None:
        commit = self.refs.get(revision, revision)
        return commit if commit in self.commits else None


@dataclass(frozen=True)
class RecordedRequest:
    """A received request. `file` is `LISTING` for a listing; `is_content`: the answer carried file content."""

    method: str
    repo_id: str
    file: str
    range: str | None
    has_token: bool
    is_content: bool
    is_cdn: bool


@dataclass
class _ScriptedFault:
    repo_id: str
    file: str | None
    fault: Fault
    times: int | None

    def applies(self, repo_id: str, file: str) -> bool:
        if self.repo_id != repo_id or self.times == 0:
            return False
        return self.file is None or self.file == file or fnmatchcase(file, self.file)


class LoopbackHub:
    """The hub, a context manager. Its methods may be called while it serves."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._repos: dict[str, Repo] = {}
        self._faults: list[_ScriptedFault] = []
        self._requests: list[RecordedRequest] = []
        self._sockets: set[socket.socket] = set()
        self.closing = threading.Event()
        self._servers = [self._server(_HubHandler), self._server(_CdnHandler)]

    @property
    def url(self) -> str:
        """Return the URL for HF_ENDPOINT."""
        return self._url(0)

    @property
    def cdn_url(self) -> str:
        return self._url(1)

    @property
    def requests(self) -> list[RecordedRequest]:
        """Return all requests so far."""
        with self._lock:
            return list(self._requests)

    def downloads(self, repo_id: str, file: str = "*") -> int:
        """Counts the answers that carried content of these files (a pattern), whole or in part."""
        return sum(
            request.is_content and request.repo_id == repo_id and fnmatchcase(request.file, file)
            for request in self.requests
        )

    def add(
        self, repo_id: str, folder: Path, *, revision: str = "main", token: str | None = None, is_gated: bool = False
    ) -> str:
        """Serves a folder as the newest commit of `revision`; returns the commit. Another commit needs another folder.

        `token`: required to see the repository (private). `is_gated`: the token is required only to read its files.
        """
        files = {file.name: file for file in _files(folder)}
        commit = _sha1("\n".join(f"{file.name} {file.etag}" for file in files.values()).encode())
        with self._lock:
            repo = self._repos.setdefault(repo_id, Repo(token, is_gated))
            repo.commits[commit] = files
            repo.refs[revision] = commit
        return commit

    def remove(self, repo_id: str) -> None:
        with self._lock:
            del self._repos[repo_id]

    def fail(self, repo_id: str, fault: Fault, *, file: str | None = None, times: int | None = None) -> None:
        """Applies a fault to answers for this file (a pattern, or LISTING; None: the whole repository).

        `times`: the number of answers to break; None breaks all.
        """
        with self._lock:
            self._faults.insert(0, _ScriptedFault(repo_id, file, fault, times))

    def heal(self, repo_id: str | None = None) -> None:
        """Removes faults; held answers continue."""
        with self._lock:
            healed = [scripted for scripted in self._faults if repo_id in {None, scripted.repo_id}]
            self._faults = [scripted for scripted in self._faults if scripted not in healed]
        for scripted in healed:
            if isinstance(scripted.fault, Hold):
                scripted.fault.release.set()

    def __enter__(self) -> Self:
        for server in self._servers:
            threading.Thread(target=server.serve_forever, args=(_POLL_S,), name="loopback-hub", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.closing.set()
        self.heal()
        for server in self._servers:
            server.shutdown()
            server.server_close()
        with self._lock:
            sockets = list(self._sockets)
        for connection in sockets:
            _shut(connection)

    # Used by the handlers.

    def repo(self, repo_id: str) -> Repo | None:
        with self._lock:
            return self._repos.get(repo_id)

    def fault(self, repo_id: str, file: str, wanted: Callable[[Fault], bool]) -> Fault | None:
        """Returns the newest fault that applies and uses up one of its `times`."""
        with self._lock:
            for scripted in self._faults:
                if scripted.applies(repo_id, file) and wanted(scripted.fault):
                    if scripted.times is not None:
                        scripted.times -= 1
                    return scripted.fault
        return None

    def log(self, request: RecordedRequest) -> None:
        with self._lock:
            self._requests.append(request)

    def connected(self, connection: socket.socket, *, is_open: bool) -> None:
        with self._lock:
            (self._sockets.add if is_open else self._sockets.discard)(connection)

    def _server(self, handler: type["_Handler"]) -> "_Server":
        return _Server(self, handler)

    def _url(self, index: int) -> str:
        host, port = self._servers[index].server_address[:2]
        return f"http://{host!s}:{port}"


# ---------------------------------------------------------------------------------------------------------- servers


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, hub: LoopbackHub, handler: type["_Handler"]) -> None:
        super().__init__(("127.0.0.1", 0), handler)
        self.hub = hub

    def handle_error(self, request: object, client_address: object) -> None:
        """Ignores clients that disconnect, as tests do."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    is_cdn: ClassVar[bool]

    @property
    def hub(self) -> LoopbackHub:
        return cast(_Server, self.server).hub

    @property
    def token(self) -> str | None:
        return self.headers.get("Authorization", "").removeprefix("Bearer ") or None

    def setup(self) -> None:
        super().setup()
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.hub.connected(self.connection, is_open=True)

    def finish(self) -> None:
        self.hub.connected(self.connection, is_open=False)
        with contextlib.suppress(OSError):  # the client disconnected first
            super().finish()

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing."""

    def do_HEAD(self) -> None:
        self.respond()

    def do_GET(self) -> None:
        self.respond()

    def respond(self) -> None:
        raise NotImplementedError

    def record(self, repo_id: str, file: str, *, is_content: bool) -> None:
        self.hub.log(
            RecordedRequest(
                self.command, repo_id, file, self.headers.get("Range"), self.token is not None, is_content, self.is_cdn
            )
        )

    def sent_early_fault(self, repo_id: str, file: str) -> bool:
        """Answers with a fault that replaces the right answer; returns False if there is none."""
        early = self.hub.fault(repo_id, file, _is_early)
        if early is None:
            return False
        if isinstance(early, Status):
            self.record(repo_id, file, is_content=False)
            self.fail(early)
            return True
        if isinstance(early, NotAHub):
            self.record(repo_id, file, is_content=False)
            self.body(b"<html>Please log in to the hotel's network</html>", "text/html")
            return True
        assert isinstance(early, Hold)
        early.reached.set()
        self.wait(early.release)
        return False

    def fail(self, status: Status) -> None:
        self.send_response(status.code)
        headers = {"X-Error-Code": status.error_code, "X-Error-Message": status.message, "X-Repo-Commit": status.commit}
        for name, value in headers.items():
            if value:
                self.send_header(name, value)
        if status.retry_after_s is not None:
            self.send_header("Retry-After", str(status.retry_after_s))
        self.send_header("Content-Length", "0")
        self.end_headers()

    def body(self, content: bytes, kind: str = "application/json") -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def wait(self, event: threading.Event) -> None:
        while not event.wait(_TICK_S) and not self.hub.closing.is_set():
            pass

    def send_file(self, repo_id: str, commit: str, file: HubFile) -> None:
        fault = self.hub.fault(repo_id, file.name, lambda fault: not _is_early(fault))
        size = file.size - (fault.by_bytes if isinstance(fault, Shorter) else 0)
        range_header = None if isinstance(fault, IgnoreRange) else self.headers.get("Range")
        start, end = _range(range_header, size)
        if start >= size > 0:
            self.record(repo_id, file.name, is_content=False)
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{size}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.record(repo_id, file.name, is_content=self.command == "GET")
        self.send_response(206 if range_header else 200)
        if range_header:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{size}")
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("X-Repo-Commit", commit)
        self.send_header("ETag", f'"{file.etag}"')
        self.send_header("Content-Length", str(end - start))
        self.end_headers()
        if self.command == "GET":
            self.send_pieces(file, start, end, fault)

    def send_pieces(self, file: HubFile, start: int, end: int, fault: Fault | None) -> None:
        with file.path.open("rb") as content:
            if not isinstance(fault, Corrupt | Cut | Hold | Slow):
                # sendfile: large files cost the test's own process next to no CPU time.
                self.connection.sendfile(content, start, end - start)
                return
            content.seek(start)
            for piece in self.pieces(content.read(end - start), start, fault):
                self.wfile.write(piece)

    def pieces(self, content: bytes, start: int, fault: Corrupt | Cut | Hold | Slow) -> Iterator[bytes]:
        match fault:
            case Corrupt(at_byte):
                changed = bytearray(content)
                if start <= at_byte < start + len(changed):
                    changed[at_byte - start] ^= 0xFF
                yield bytes(changed)
            case Cut(after_bytes):
                yield content[:after_bytes]
                if len(content) > after_bytes:
                    self.close_connection = True
                    _shut(self.connection)
            case Hold(after_bytes, release, reached):
                yield content[: after_bytes or 0]
                reached.set()
                self.wait(release)
                yield content[after_bytes or 0 :]
            case Slow(bytes_per_s):
                step = max(1, int(bytes_per_s * _TICK_S))
                for position in range(0, len(content), step):
                    yield content[position : position + step]
                    self.hub.closing.wait(_TICK_S)


class _HubHandler(_Handler):
    """Serves /api/models/{id}[/revision/{rev}], /api/models/{id}/tree/{rev}, /{id}/resolve/{rev}/{file}."""

    is_cdn = False

    _ROUTES: ClassVar[tuple[tuple[re.Pattern[str], str], ...]] = (
        (re.compile(r"/api/models/(?P<repo>.+?)/tree/(?P<revision>[^/]+)(?P<file>)/?"), "tree"),
        (re.compile(r"/api/models/(?P<repo>.+?)/revision/(?P<revision>[^/]+)(?P<file>)"), "info"),
        (re.compile(r"/api/models/(?P<repo>[^/]+(?:/[^/]+)?)(?P<revision>)(?P<file>)"), "info"),
        (re.compile(r"/(?P<repo>.+?)/resolve/(?P<revision>[^/]+)/(?P<file>.+)"), "resolve"),
    )

    def respond(self) -> None:
        path = urlsplit(self.path).path
        for pattern, kind in self._ROUTES:
            match = pattern.fullmatch(path)
            if match is not None:
                repo_id, revision, file = (unquote(match[name]) for name in ("repo", "revision", "file"))
                self.answer(kind, repo_id, revision or "main", file or LISTING)
                return
        self.fail(Status(404))

    def answer(self, kind: str, repo_id: str, revision: str, file: str) -> None:
        if self.sent_early_fault(repo_id, file):
            return
        repo = self.hub.repo(repo_id)
        commit = repo.resolve(revision) if repo is not None else None
        refusal = self.refusal(repo, commit, file)
        if refusal is not None or repo is None or commit is None:
            self.record(repo_id, file, is_content=False)
            self.fail(refusal or not_found())
        elif kind == "resolve":
            self.resolve(repo_id, commit, repo.commits[commit][file])
        else:
            self.record(repo_id, file, is_content=False)
            render = _tree if kind == "tree" else _info
            self.body(json.dumps(render(repo_id, repo, commit)).encode())

    def refusal(self, repo: Repo | None, commit: str | None, file: str) -> Status | None:
        """Returns the real hub's answer to a request without permission or for a missing file; None if it is fine."""
        if repo is None or (repo.token is not None and not repo.is_gated and self.token != repo.token):
            return unauthorized() if self.token is None else not_found()
        if commit is None:
            return Status(404, "RevisionNotFound", "Invalid rev id")
        if file == LISTING:
            return None
        if repo.is_gated and self.token != repo.token:
            return gated() if self.token is not None else Status(401, "GatedRepo", "Access is restricted")
        return None if file in repo.commits[commit] else Status(404, "EntryNotFound", "Entry not found", commit=commit)

    def resolve(self, repo_id: str, commit: str, file: HubFile) -> None:
        if file.sha256 is None:
            self.send_file(repo_id, commit, file)
            return
        self.record(repo_id, file.name, is_content=False)
        self.send_response(302)
        self.send_header("Location", f"{self.hub.cdn_url}/{repo_id}/resolve/{commit}/{file.name}")
        self.send_header("X-Repo-Commit", commit)
        self.send_header("X-Linked-Etag", f'"{file.sha256}"')
        self.send_header("X-Linked-Size", str(file.size))
        self.send_header("Content-Length", "0")
        self.end_headers()


class _CdnHandler(_Handler):
    """Serves the contents of large files to any client with the address."""

    is_cdn = True

    def respond(self) -> None:
        match = re.fullmatch(r"/(.+?)/resolve/([^/]+)/(.+)", unquote(urlsplit(self.path).path))
        repo = self.hub.repo(match[1]) if match is not None else None
        file = repo.commits.get(match[2], {}).get(match[3]) if repo is not None and match is not None else None
        if match is None or file is None:
            self.fail(Status(404))
        else:
            self.send_file(match[1], match[2], file)


# ---------------------------------------------------------------------------------------------------------- helpers


def _is_early(fault: Fault) -> bool:
    """Returns whether a fault applies before the headers of an answer."""
    return isinstance(fault, Status | NotAHub) or (isinstance(fault, Hold) and fault.after_bytes is None)


def _files(folder: Path) -> Iterator[HubFile]:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            size = path.stat().st_size
            content = path.read_bytes() if size < _PIECE_BYTES else None
            is_large = path.suffix in _LARGE_SUFFIXES or content is None
            sha256 = _sha256(path) if is_large else None
            pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()
            blob = pointer if is_large or content is None else content
            oid = _sha1(b"blob %d\0" % len(blob) + blob)
            yield HubFile(path.relative_to(folder).as_posix(), path, size, oid, sha256)


def _info(repo_id: str, repo: Repo, commit: str) -> dict[str, object]:
    siblings = []
    for file in repo.commits[commit].values():
        sibling: dict[str, object] = {"rfilename": file.name, "size": file.size, "blobId": file.oid}
        if file.sha256 is not None:
            sibling["lfs"] = {"sha256": file.sha256, "size": file.size, "pointerSize": 134}
        siblings.append(sibling)
    return {
        "_id": _sha1(repo_id.encode())[:24], "id": repo_id, "modelId": repo_id, "sha": commit, "disabled": False,
        "private": repo.token is not None and not repo.is_gated, "gated": "manual" if repo.is_gated else False,
        "tags": [], "downloads": 0, "likes": 0, "siblings": siblings,
    }  # fmt: skip


def _tree(repo_id: str, repo: Repo, commit: str) -> list[dict[str, object]]:
    entries: list[dict[str, object]] = []
    for file in repo.commits[commit].values():
        entry: dict[str, object] = {"type": "file", "oid": file.oid, "size": file.size, "path": file.name}
        if file.sha256 is not None:
            entry["lfs"] = {"oid": file.sha256, "size": file.size, "pointerSize": 134}
        entries.append(entry)
    return entries


def _range(range_header: str | None, size: int) -> tuple[int, int]:
    match = re.fullmatch(r"bytes=(\d+)-(\d*)", range_header or "")
    if match is None:
        return 0, size
    return int(match[1]), min(int(match[2]) + 1 if match[2] else size, size)


def _shut(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):  # already gone
        connection.shutdown(socket.SHUT_RDWR)


def _sha1(content: bytes) -> str:
    return hashlib.sha1(content, usedforsecurity=False).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
