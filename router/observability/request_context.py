"""`RequestContext`: collects timings, status, model and key id of one request, from its first byte to its last.

The log line, the metrics and the trace of a request are all made from its context, once, when it has ended. It never
holds texts or keys.
"""

import random
import re
import time
from collections.abc import Callable
from typing import Any

from litestar.connection import ASGIConnection
from litestar.types import HTTPScope, Message, Send
from msgspec import Struct
from structlog.contextvars import bind_contextvars, clear_contextvars

from engines.types import BaseResult

PROBES = frozenset({"/health", "/ready", "/metrics"})
POLLED_ROUTES = PROBES | {
    "/admin/models",
    "/admin/memory",
    "/admin/traffic",
    "/dashboard/{name}",
    "/docs/assets/{name}",
}
"""Routes that an open dashboard or a probe polls; logged at level debug only."""
CLIENT_LEFT = 499

_SECURITY_HEADERS = {
    b"x-content-type-options": b"nosniff",
    b"content-security-policy": b"default-src 'none'; frame-ancestors 'none'",
    b"referrer-policy": b"no-referrer",
    b"cache-control": b"no-store",
}
_SECURITY_PAIRS = tuple(_SECURITY_HEADERS.items())
"""Default headers of every response: a browser must not run, frame, sniff or store our JSON."""

_SANE_ID = re.compile(r"[A-Za-z0-9._:+=/-]{1,128}", re.ASCII)
_TRACEPARENT = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}", re.ASCII)


class Stage(Struct, frozen=True):
    """A stage of a request; `began_s` is a `time.perf_counter` time."""

    name: str
    began_s: float
    seconds: float


class RequestContext:
    """State of one request.

    Attributes:
        status: 499 until a response begins.
        code: `ok`, or a code of the error table.
        param, message: what an error response says; empty without one.
        model: the registry's name of the model; empty until it is resolved.
        key_id: id of the request's key; empty without one.
        answer: the result, once there is one.
        trace_id: of the caller's trace, or of the one created here; empty without.
        headers: added to the response, whatever it is.
    """

    def __init__(self, scope: HTTPScope, send: Send, is_last: Callable[[], bool] = lambda: False) -> None:
        """`is_last`: whether the connection should close after this response; called when it begins."""
        self.scope = scope
        self._send, self._is_last = send, is_last
        self.began_s = time.perf_counter()
        self.began_ns = time.time_ns()
        self.ended_s = self.began_s
        given_id, trace = _ids(scope)
        self.request_id = given_id or f"{random.getrandbits(128):032x}"
        self.status, self.code, self.model, self.key_id = CLIENT_LEFT, "ok", "", ""
        self.param, self.message = "", ""
        self.answer: BaseResult | None = None
        self._embedded_s = self.began_s
        self.stages: list[Stage] = []
        self.headers: dict[str, str] = {}
        self._finish_callbacks: list[Callable[[], None]] = []
        self.trace_id = trace
        scope.setdefault("state", {}).update(request_id=self.request_id, context=self)
        clear_contextvars()
        bind_contextvars(request_id=self.request_id)

    @property
    def method(self) -> str:
        return self.scope["method"]

    @property
    def route(self) -> str:
        """The route's path template; empty for unknown paths."""
        return self.scope.get("path_template", "")

    @property
    def seconds(self) -> float:
        """Duration from the first byte to the last; valid after `finish`."""
        return self.ended_s - self.began_s

    async def send(self, message: Message) -> None:
        """Send a message of the app, with the request id and the other `headers` added."""
        if message["type"] == "http.response.start":
            if self.answer is not None:
                self.stages.append(Stage("encode", self._embedded_s, time.perf_counter() - self._embedded_s))
            self.status = message["status"]
            headers = [*message["headers"]]
            if _SECURITY_HEADERS.keys().isdisjoint(given := dict(headers)):
                headers += _SECURITY_PAIRS
            else:
                headers += [pair for pair in _SECURITY_PAIRS if pair[0] not in given]
            headers.append((b"x-request-id", self.request_id.encode()))
            own = {**self.headers, "connection": "close"} if self._is_last() else self.headers
            for name, text in own.items():
                headers.append((name.encode(), text.encode()))
            message["headers"] = headers
        await self._send(message)

    def set_model(self, model_id: str) -> None:
        """Set the model; log lines have it from now on."""
        self.model = model_id
        bind_contextvars(model=model_id)

    def set_key(self, key_id: str) -> None:
        """Set the key id; log lines have it from now on."""
        self.key_id = key_id
        bind_contextvars(key=key_id)

    def refuse(self, code: str, param: str | None, message: str) -> None:
        """Record the error that the caller gets."""
        self.code, self.param, self.message = code, param or "", message

    def stage(self, name: str, began_s: float) -> None:
        """Record a stage that began at `began_s` and has just ended."""
        self.stages.append(Stage(name, began_s, time.perf_counter() - began_s))

    def record_result(self, answer: BaseResult, began_s: float) -> None:
        """Record the result and its stages, which follow each other from `began_s` on; encoding starts now."""
        self.answer, self._embedded_s = answer, time.perf_counter()
        spent = answer.timings
        for name, seconds in (
            ("lease", spent.load_s), ("tokenize", spent.tokenize_s), ("queue", spent.queue_s),
            ("forward", spent.forward_s),
        ):  # fmt: skip
            self.stages.append(Stage(name, began_s, seconds))
            began_s += seconds

    def on_finish(self, call: Callable[[], None]) -> None:
        """Register a callback for the end of the request, however it ends."""
        self._finish_callbacks.append(call)

    def finish(self) -> None:
        """End the request: the last byte was sent, or the client has disconnected."""
        for call in self._finish_callbacks:
            call()
        self.ended_s = time.perf_counter()
        if self.status == CLIENT_LEFT and self.code == "ok":
            self.code = "client_closed_request"


def context_of(connection: ASGIConnection[Any, Any, Any, Any]) -> RequestContext:
    """Return the context of a connection's request."""
    context: RequestContext = connection.scope["state"]["context"]
    return context


def header(scope: HTTPScope, name: bytes) -> str:
    """Return the first header of that name; empty without one."""
    return next((value for key, value in scope["headers"] if key == name), b"").decode("latin-1")


def _ids(scope: HTTPScope) -> tuple[str, str]:
    """Return the client's ids of the request and of its trace, so that both sides' logs can be joined; empty where it
    has sent none, or none that is well-formed. The first header of a name counts."""
    request_id = trace = None
    for name, value in scope["headers"]:
        if request_id is None and name == b"x-request-id":
            request_id = value
        elif trace is None and name == b"traceparent":
            trace = value
    sane = None if request_id is None else _SANE_ID.fullmatch(request_id.decode("latin-1"))
    found = None if trace is None else _TRACEPARENT.fullmatch(trace.decode("latin-1"))
    return sane.group() if sane else "", found.group(1) if found else ""
