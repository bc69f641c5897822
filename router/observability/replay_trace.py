"""`ReplayTrace`: writes which model was asked when to a file, for `embedyard replay`. No text, no key."""

import queue
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import structlog

from engines.trace import TraceModel, TraceRequest, encode_line
from engines.types import HostSnapshot
from router.observability.request_context import RequestContext

log = structlog.get_logger()

MAX_FILE_BYTES = 256 * 2**20
"""About two million requests. A full file is renamed to `NAME.1`, whose predecessor is lost."""

_MAX_WAITING = 65_536
"""Lines that may wait for the disk; further ones are dropped."""

_FULL_STAGES = frozenset({"tokenize", "queue", "forward", "encode"})
"""The stages of a request during which its model may not leave."""

_LEAST_WAIT_S = 0.001
"""A request that got its lease sooner found its model ready."""


class ReplayTrace:
    """Appends to a file from a thread of its own.

    Args:
        path: of the file; what it has already is kept.
        snapshots: of the hosts; called at a model's first request.

    Raises:
        OSError: the file cannot be written.
    """

    def __init__(
        self, path: Path, snapshots: Callable[[], Iterable[HostSnapshot]], *, max_bytes: int = MAX_FILE_BYTES
    ) -> None:
        self._path = path
        self._snapshots = snapshots
        self._max_bytes = self._full_bytes = max_bytes
        self._is_failing = False
        self._known: dict[str, TraceModel] = {}
        self._lines: queue.Queue[bytes | None] = queue.Queue(_MAX_WAITING)
        self._dropped = 0
        self._file: BinaryIO = path.open("ab")
        self._thread = threading.Thread(target=self._write, name="replay-trace", daemon=True)
        self._thread.start()

    def record(self, context: RequestContext) -> None:
        """Write a request that was answered by a model. Write what the model took before its first one, and again once
        it has come back from main memory."""
        if context.answer is None:
            return
        model_id = context.model
        known = self._known.get(model_id)
        described = describe(model_id, self._snapshots()) if _may_tell_more(known, context) else known
        if described is not None and described != known:
            self._known[model_id] = described
            self._put(encode_line(described))
        seconds = sum(stage.seconds for stage in context.stages if stage.name in _FULL_STAGES)
        self._put(
            encode_line(
                TraceRequest(
                    at_s=round(context.began_ns / 1e9, 3),
                    model_id=model_id,
                    tokens=sum(context.answer.token_counts),
                    seconds=round(seconds, 4),
                )
            )
        )

    def close(self) -> None:
        """Write what waits, and close the file; blocks."""
        self._lines.put(None)
        self._thread.join()
        try:
            self._file.close()
        except OSError as error:
            self._report(error)
        if self._dropped:
            log.warning("replay.lines_dropped", count=self._dropped)

    def _put(self, line: bytes) -> None:
        try:
            self._lines.put_nowait(line)
        except queue.Full:
            self._dropped += 1

    def _write(self) -> None:
        while (line := self._lines.get()) is not None:
            try:
                self._file.write(line)
                if self._lines.empty():
                    self._file.flush()
                    self._is_failing = False  # not after `write`, which may only have buffered the line
                if self._file.tell() >= self._full_bytes:
                    self._rotate()
            except OSError as error:
                self._dropped += 1
                self._report(error)

    def _report(self, error: OSError) -> None:
        """Log an error of the disk; not that of each line, which are thousands a second while a disk is full."""
        if not self._is_failing:
            log.warning("replay.not_written", reason=error.strerror or type(error).__name__)
        self._is_failing = True

    def _rotate(self) -> None:
        """Begin a new file, with what is known of the models. Where that fails, the old one goes on, until it has as
        many bytes more."""
        self._full_bytes = self._file.tell() + self._max_bytes
        with suppress(FileNotFoundError):  # an operator has moved it, or removed it
            self._path.replace(f"{self._path}.1")
        old, self._file = self._file, self._path.open("ab")
        self._full_bytes = self._max_bytes
        for model in list(self._known.values()):
            self._file.write(encode_line(model))
        old.close()


def _may_tell_more(known: TraceModel | None, context: RequestContext) -> bool:
    """Tell whether the hosts may know more of a model: at its first request, and where it came back from main memory
    perhaps for the first time."""
    if known is None:
        return True
    waited_s = sum(stage.seconds for stage in context.stages if stage.name == "lease")
    return known.wake_s is None and waited_s >= _LEAST_WAIT_S


def describe(model_id: str, snapshots: Iterable[HostSnapshot]) -> TraceModel | None:
    """Return what a model took when it was loaded, by the host where it took longest; None while none has it."""
    loaded = [
        status
        for host in snapshots
        for status in host.models
        if status.model_id == model_id and status.load_s is not None and status.weight_bytes
    ]
    if not loaded:
        return None
    status = max(loaded, key=lambda status: status.load_s or 0.0)
    wakes_s = [status.wake_s for status in loaded if status.wake_s is not None]
    return TraceModel(
        model_id=model_id,
        weight_bytes=status.weight_bytes,
        workspace_bytes=status.workspace_bytes,
        load_s=round(status.load_s or 0.0, 3),
        wake_s=round(max(wakes_s), 4) if wakes_s else None,
    )
