"""`Outbox`: the queue of requests to one worker, and the requests that the worker has. Pure.

A worker that does not read (stopped, hung, busy) must not fill this process's memory with requests, so few are in
flight at a time and the rest waits here, not encoded. A request that is withdrawn while it waits is never sent. One
that is withdrawn later counts until the worker reports its end, because it takes memory there until then.
"""

from collections import Counter, deque

from msgspec import Struct

from engines.rpc.messages import Cancel, Request, Run
from engines.types import Call

MAX_BYTES = 256 * 2**20
"""Encoded requests that a worker holds: four bodies of `MAX_BODY_BYTES`. One request may be larger, and goes alone."""
OWN_BYTES, OWN_CALLS = 8 * 2**20, 16
"""Guaranteed to every model, whatever the others have in flight: a cold model's large requests wait in the worker for
minutes, and must not block those of a ready one."""


class _Sent(Struct):
    """A call that was sent and has not ended."""

    model_id: str
    size_bytes: int = 0


class Outbox:
    """Decides what is sent next: 1. cancellations;  2. commands;  3. calls, round-robin over models.

    The first two are few and small, and are never delayed.

    Args:
        max_calls: calls that the worker may hold.
        max_bytes: their encoded bytes.
    """

    def __init__(self, max_calls: int, max_bytes: int = MAX_BYTES) -> None:
        self._max_calls = max_calls
        self._max_bytes = max_bytes
        self._cancels: deque[int] = deque()
        self._commands: dict[int, Request] = {}
        self._calls: dict[str, dict[int, Run[Call]]] = {}
        self._models: dict[int, str] = {}
        self._sent: dict[int, _Sent] = {}
        self._sent_commands: set[int] = set()
        self._sent_calls: Counter[str] = Counter()
        self._sent_bytes: Counter[str] = Counter()
        self._total_bytes = 0

    @property
    def num_waiting(self) -> int:
        """Number of requests not sent yet."""
        return len(self._models) + len(self._commands)

    @property
    def num_sent(self) -> int:
        """Number of calls that the worker has, including cancelled ones that have not ended."""
        return len(self._sent)

    @property
    def sent_bytes(self) -> int:
        """Encoded bytes of the calls that the worker has."""
        return self._total_bytes

    def put(self, number: int, request: Request) -> None:
        """Add a request."""
        if isinstance(request, Run):
            model_id = self._models[number] = request.call.model_id
            self._calls.setdefault(model_id, {})[number] = request
        else:
            self._commands[number] = request

    def is_waiting(self, number: int) -> bool:
        """Whether the request was not sent yet."""
        return number in self._models or number in self._commands

    def withdraw(self, number: int) -> None:
        """Withdraw a request. Three cases: 1. not sent: drop it;  2. sent: cancel it;  3. ended: do nothing."""
        if number in self._sent or number in self._sent_commands:
            self._cancels.append(number)  # (2)
        elif self._commands.pop(number, None) is None:
            self._forget(number)  # (1)

    def pop(self) -> tuple[int, Request] | None:
        """Take the request to send now, with its number; None when there is none, or the limits are reached."""
        if self._cancels:
            return 0, Cancel(number=self._cancels.popleft())
        if self._commands:
            number = next(iter(self._commands))
            self._sent_commands.add(number)
            return number, self._commands.pop(number)
        return self._pop_call()

    def record_size(self, number: int, size_bytes: int) -> None:
        """Record the encoded size of a request that was just popped."""
        sent = self._sent.get(number)
        if sent is not None:
            sent.size_bytes = size_bytes
            self._sent_bytes[sent.model_id] += size_bytes
            self._total_bytes += size_bytes

    def end(self, number: int) -> None:
        """Release a request that the worker has answered, or reported as cancelled."""
        self._sent_commands.discard(number)
        sent = self._sent.pop(number, None)
        if sent is not None:
            self._total_bytes -= sent.size_bytes
            self._sent_bytes[sent.model_id] -= sent.size_bytes
            self._sent_calls[sent.model_id] -= 1
            if not self._sent_calls[sent.model_id]:
                del self._sent_calls[sent.model_id], self._sent_bytes[sent.model_id]

    def _pop_call(self) -> tuple[int, Request] | None:
        for model_id, calls in self._calls.items():
            if self._may_send(model_id):
                number = next(iter(calls))
                request = calls[number]
                self._forget(number)
                if model_id in self._calls:
                    self._calls[model_id] = self._calls.pop(model_id)  # to the end: round-robin over models
                self._sent[number] = _Sent(model_id)
                self._sent_calls[model_id] += 1
                return number, request
        return None

    def _may_send(self, model_id: str) -> bool:
        if len(self._sent) < self._max_calls and self._total_bytes < self._max_bytes:
            return True
        return self._sent_calls[model_id] < OWN_CALLS and self._sent_bytes[model_id] < OWN_BYTES

    def _forget(self, number: int) -> bool:
        model_id = self._models.pop(number, None)
        if model_id is None:
            return False
        calls = self._calls[model_id]
        del calls[number]
        if not calls:
            del self._calls[model_id]
        return True
