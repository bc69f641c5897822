"""Load on an embeddings server: closed (so many clients) or open (so many requests a second).

Requests are encoded before the clock starts and answers are not decoded, so that the client takes little of the cores
that it may share with the server; what it does take is in every outcome. Knows the API, but no particular server.
"""

import asyncio
import errno
import itertools
import random
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

from msgspec import Struct

from router.loadgen.http_client import Connection, Request, Target, refusal
from router.loadgen.results import Outcome, Sample

Result = TypeVar("Result")
Until = Callable[[int, float], bool]
"""Given requests sent and seconds gone by: whether to send no more. What is under way is waited for."""
Watch = Callable[[Sample, bytes], None]
"""Told of every request when it is done, with the body of its answer (empty: there was none)."""

_SEED = 7


class Phase(Struct, frozen=True):
    """One load: closed with so many clients, or open with so many requests a second."""

    clients: int = 0
    per_s: float = 0.0

    def __str__(self) -> str:
        return f"{self.clients} clients" if self.clients else f"{self.per_s:g} requests/s"


class Clients:
    """The connections of one phase and what was measured on them."""

    def __init__(self, target: Target, watch: Watch | None = None) -> None:
        self._target = target
        self._watch = watch
        self._idle: list[Connection] = []
        self._samples: list[Sample] = []
        self._errors: Counter[str] = Counter()
        self._messages: dict[str, str] = {}
        self._started_s = time.perf_counter()
        self._started_cpu_s = time.process_time()

    async def send(self, request: Request, due_s: float) -> None:
        """One request on a free connection, or on a new one; a failure is a sample too."""
        status, body, late_s = 0, b"", time.perf_counter() - due_s
        try:
            status, body = await self._ask(request)
        except TimeoutError:
            self._failed("timed out", f"no answer within {self._target.timeout_s:g} s")
        except OSError as error:
            self._failed(_kind(error), str(error))
        if status not in (0, 200):
            code, message = refusal(body)
            self._failed(f"{status} {code}".rstrip(), message)
        sample = Sample(due_s, time.perf_counter() - due_s, request.num_texts, status, late_s)
        self._samples.append(sample)
        if self._watch is not None:
            self._watch(sample, body)

    async def _ask(self, request: Request) -> tuple[int, bytes]:
        connection: Connection | None = None
        try:
            async with asyncio.timeout(self._target.timeout_s):
                connection = await self._connection()
                answer = await connection.ask(request)
        except BaseException:
            if connection is not None:
                connection.close()  # its answer may still come: not for the next one to get
            raise
        self._idle.append(connection)
        return answer.status, answer.body

    async def _connection(self) -> Connection:
        """The one used last, if the server has not closed it."""
        while self._idle:
            connection = self._idle.pop()
            if connection.is_open:
                return connection
            connection.close()
        return await Connection.open(self._target)

    def _failed(self, kind: str, message: str) -> None:
        self._errors[kind] += 1
        self._messages.setdefault(kind, message)

    def close(self) -> Outcome:
        """Hang up and sum up."""
        wall_s = time.perf_counter() - self._started_s
        cpu_s = time.process_time() - self._started_cpu_s
        for connection in self._idle:
            connection.close()
        return Outcome(
            wall_s=wall_s,
            client_cores=cpu_s / wall_s,
            samples=tuple(self._samples),
            errors=dict(self._errors),
            messages=self._messages,
        )


def _kind(error: OSError) -> str:
    """In words that say whose fault it is."""
    if isinstance(error, ConnectionRefusedError):
        return "refused to connect"
    if isinstance(error, ConnectionError):
        return "hung up"
    return "this client ran out of file descriptors" if error.errno == errno.EMFILE else type(error).__name__


async def closed(
    target: Target, requests: Sequence[Request], num_clients: int, *, until: Until, watch: Watch | None = None
) -> Outcome:
    """So many clients, each sending its next request when its last is answered.

    Args:
        requests: sent in this order, again from the front when all are sent.
    """
    clients, sequence, sent = Clients(target, watch), itertools.cycle(requests), itertools.count()
    started_s = time.perf_counter()

    async def client() -> None:
        while not until(next(sent), time.perf_counter() - started_s):
            await clients.send(next(sequence), time.perf_counter())

    await asyncio.gather(*(client() for _ in range(num_clients)))
    return clients.close()


async def opened(
    target: Target, requests: Sequence[Request], per_s: float, *, until: Until, watch: Watch | None = None
) -> Outcome:
    """Arrivals at random (Poisson, always the same ones), whether or not the earlier ones are answered.

    Latency counts from the moment a request was due: a server that stalls cannot hide it by delaying the client.
    """
    clients, sequence, rng = Clients(target, watch), itertools.cycle(requests), random.Random(_SEED)
    started_s = due_s = time.perf_counter()
    under_way: set[asyncio.Task[None]] = set()
    for sent in itertools.count():
        due_s += rng.expovariate(per_s)
        await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
        if until(sent, time.perf_counter() - started_s):
            break
        task = asyncio.create_task(clients.send(next(sequence), due_s))
        under_way.add(task)
        task.add_done_callback(under_way.discard)
    await asyncio.gather(*under_way)
    return clients.close()


async def send(
    target: Target, requests: Sequence[Request], phase: Phase, *, until: Until, watch: Watch | None = None
) -> Outcome:
    """One phase, of either kind."""
    if phase.clients:
        return await closed(target, requests, phase.clients, until=until, watch=watch)
    return await opened(target, requests, phase.per_s, until=until, watch=watch)


def after_s(seconds: float) -> Until:
    """Stop sending after so many seconds."""
    return lambda _sent, gone_s: gone_s >= seconds


def after(num_requests: int) -> Until:
    """Stop sending after so many requests."""
    return lambda sent, _gone_s: sent >= num_requests


def run(work: Callable[[], Coroutine[Any, Any, Result]]) -> Result:
    """Run on the lightest event loop there is."""
    try:
        import uvloop
    except ImportError:  # Windows has none
        factory: Callable[[], asyncio.AbstractEventLoop] = asyncio.new_event_loop
    else:
        factory = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        return runner.run(work())
