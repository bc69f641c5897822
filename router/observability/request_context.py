"""`RequestContext`: one request from its first byte to its last, and what was learnt of it on the way.

The log line, the metrics and the trace of a request are all made from its visit, at its end, once. Neither texts nor
keys are ever in it.
"""

import random
import re
import time
from collections.abc import Callable
from typing import Any, cast

from litestar.connection import ASGIConnection
from litestar.types import HTTPScope, Message, Send
from msgspec import Struct
from structlog.contextvars import bind_contextvars, clear_contextvars

from engines.types import Embeddings

PROBES = frozenset({"/health", "/ready", "/metrics"})
POLLED_ROUTES = PROBES | {
    "/admin/models",
    "/admin/memory",
    "/admin/traffic",
    "/dashboard/{name}",
    "/docs/assets/{name}",
}
"""What a page that stays open, or a probe, asks for again and again; the log tells of it at level debug only."""
CLIENT_LEFT = 499

_GUARDS = {
    b"x-content-type-options": b"nosniff",
    b"content-security-policy": b"default-src 'none'; frame-ancestors 'none'",
    b"referrer-policy": b"no-referrer",
    b"cache-control": b"no-store",
}
"""Headers on every answer that does not bring its own: a browser shall not run, frame, guess at or keep our JSON."""

_SANE_ID = re.compile(r"[A-Za-z0-9._:+=/-]{1,128}", re.ASCII)
_TRACEPARENT = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}", re.ASCII)


class Stage(Struct, frozen=True):
    """A part of a visit; `began_s` on the clock of `time.perf_counter`."""

    name: str
    began_s: float
    seconds: float


class RequestContext:
    """One request.

    Attributes:
        status: 499 until an answer begins.
        code: `ok`, or a code of the error table.
        model: the registry's name of the model; empty as long as it is not known to be one.
        key_id: whose key it came with; empty without one.
        answer: the vectors, once they are there.
        trace_id: of the caller's trace, or of the one that was made here; empty without.
        headers: to be put on the answer, whatever it will be.
    """

    def __init__(self, scope: HTTPScope, send: Send, is_last: Callable[[], bool] = lambda: False) -> None:
        """`is_last`: whether the connection should end with this answer, asked when the answer begins."""
        self.scope = scope
        self._send, self._is_last = send, is_last
        self.began_s = time.perf_counter()
        self.began_ns = time.time_ns()
        self.ended_s = self.began_s
        self.request_id = _request_id(scope)
        self.status, self.code, self.model, self.key_id = CLIENT_LEFT, "ok", "", ""
        self.answer: Embeddings | None = None
        self._embedded_s = self.began_s
        self.stages: list[Stage] = []
        self.headers: dict[str, str] = {}
        self._finish_callbacks: list[Callable[[], None]] = []
        found = _TRACEPARENT.fullmatch(header(scope, b"traceparent"))
        self.trace_id = found.group(1) if found else ""
        scope.setdefault("state", {}).update(request_id=self.request_id, visit=self)
        clear_contextvars()
        bind_contextvars(request_id=self.request_id)

    @property
    def method(self) -> str:
        return self.scope["method"]

    @property
    def route(self) -> str:
        """The template of the path; empty for paths that do not exist here."""
        return self.scope.get("path_template", "")

    @property
    def seconds(self) -> float:
        """From the first byte to the last; right after `end`."""
        return self.ended_s - self.began_s

    async def send(self, message: Message) -> None:
        """What the app sends, with the request's id and the other `headers` on it."""
        if message["type"] == "http.response.start":
            if self.answer is not None:
                self.stages.append(Stage("encode", self._embedded_s, time.perf_counter() - self._embedded_s))
            self.status = message["status"]
            own = {"x-request-id": self.request_id} | self.headers
            if self._is_last():
                own["connection"] = "close"
            given = {name for name, _ in message["headers"]}
            guards = [guard for guard in _GUARDS.items() if guard[0] not in given]
            own_bytes = [(name.encode(), text.encode()) for name, text in own.items()]
            message["headers"] = [*message["headers"], *guards, *own_bytes]
        await self._send(message)

    def set_model(self, model_id: str) -> None:
        """From now on lines of the log name it, too."""
        self.model = model_id
        bind_contextvars(model=model_id)

    def set_key(self, key_id: str) -> None:
        """From now on lines of the log name whose key it is."""
        self.key_id = key_id
        bind_contextvars(key=key_id)

    def stage(self, name: str, began_s: float) -> None:
        """A part that began then and has just ended."""
        self.stages.append(Stage(name, began_s, time.perf_counter() - began_s))

    def record_result(self, answer: Embeddings, began_s: float) -> None:
        """The parts of an answer follow each other from `began_s` on; from now on it is written down."""
        self.answer, self._embedded_s = answer, time.perf_counter()
        spent = answer.timings
        for name, seconds in (
            ("lease", spent.load_s), ("tokenize", spent.tokenize_s), ("queue", spent.queue_s),
            ("forward", spent.forward_s),
        ):  # fmt: skip
            self.stages.append(Stage(name, began_s, seconds))
            began_s += seconds

    def on_finish(self, call: Callable[[], None]) -> None:
        """Something to be done when the visit ends, however it ends."""
        self._finish_callbacks.append(call)

    def finish(self) -> None:
        """The last byte has left, or the client has."""
        for call in self._finish_callbacks:
            call()
        self.ended_s = time.perf_counter()
        if self.status == CLIENT_LEFT and self.code == "ok":
            self.code = "client_closed_request"


def context_of(connection: ASGIConnection[Any, Any, Any, Any]) -> RequestContext:
    """The visit that a connection belongs to."""
    return cast(RequestContext, connection.scope["state"]["visit"])


def header(scope: HTTPScope, name: bytes) -> str:
    """The first header of that name; empty without."""
    return next((value for key, value in scope["headers"] if key == name), b"").decode("latin-1")


def _request_id(scope: HTTPScope) -> str:
    """The client's own id where it is sane, so that both sides' logs can be joined; else a new one."""
    given = header(scope, b"x-request-id")
    return given if _SANE_ID.fullmatch(given) else f"{random.getrandbits(128):032x}"
