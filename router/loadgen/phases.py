"""Generates load: closed (a number of clients) or open (a rate of requests).

Requests are encoded before the clock starts and responses are not decoded, so that the client takes little of the cores
that it may share with the server; every outcome has what it does take.
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
"""Given the number of requests sent and the seconds elapsed: whether to stop. Requests in flight are awaited."""
Watch = Callable[[Sample, bytes], None]
"""Called with every completed request and the body of its response (empty without one)."""

_SEED = 7


class Phase(Struct, frozen=True):
    """One load: closed with `clients`, or open with `per_s` requests per second."""

    clients: int = 0
    per_s: float = 0.0

    def __str__(self) -> str:
        return f"{self.clients} clients" if self.clients else f"{self.per_s:g} requests/s"


class Clients:
    """Holds the connections of one phase and the samples measured on them."""

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
        """Send one request on an idle or a new connection, and record a sample, also of a failure."""
        status, body, late_s = 0, b"", time.perf_counter() - due_s
        try:
            status, body = await self._ask(request)
        except TimeoutError:
            self._count_failure("timed out", f"no response within {self._target.timeout_s:g} s")
        except OSError as error:
            self._count_failure(_kind(error), str(error))
        if status not in (0, 200):
            code, message = refusal(body)
            self._count_failure(f"{status} {code}".rstrip(), message)
        sample = Sample(due_s, time.perf_counter() - due_s, request.num_texts, status, late_s)
        self._samples.append(sample)
        if self._watch is not None:
            self._watch(sample, body)

    async def _ask(self, request: Request) -> tuple[int, bytes]:
        connection: Connection | None = None
        try:
            async with asyncio.timeout(self._target.timeout_s):
                connection = await self._connection()
                response = await connection.ask(request)
        except BaseException:
            if connection is not None:
                connection.close()  # its response may still arrive, and must not answer the next request
            raise
        self._idle.append(connection)
        return response.status, response.body

    async def _connection(self) -> Connection:
        """Return the most recently used open connection, else a new one."""
        while self._idle:
            connection = self._idle.pop()
            if connection.is_open:
                return connection
            connection.close()
        return await Connection.open(self._target)

    def _count_failure(self, kind: str, message: str) -> None:
        self._errors[kind] += 1
        self._messages.setdefault(kind, message)

    def close(self) -> Outcome:
        """Close the connections and return the outcome."""
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
    """Name the kind of failure."""
    if isinstance(error, ConnectionRefusedError):
        return "refused to connect"
    if isinstance(error, ConnectionError):
        return "connection closed"
    return "this client ran out of file descriptors" if error.errno == errno.EMFILE else type(error).__name__


async def closed(
    target: Target, requests: Sequence[Request], num_clients: int, *, until: Until, watch: Watch | None = None
) -> Outcome:
    """Run `num_clients` clients, each of which sends its next request when the previous one is answered.

    Args:
        requests: sent in this order, cyclically.
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
    """Send requests at random times (Poisson, seeded), whether or not earlier ones are answered.

    Latency is measured from when a request was due: a stalling server cannot hide it by delaying the client.
    """
    clients, sequence, rng = Clients(target, watch), itertools.cycle(requests), random.Random(_SEED)
    started_s = due_s = time.perf_counter()
    in_flight: set[asyncio.Task[None]] = set()
    for sent in itertools.count():
        due_s += rng.expovariate(per_s)
        await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
        if until(sent, time.perf_counter() - started_s):
            break
        task = asyncio.create_task(clients.send(next(sequence), due_s))
        in_flight.add(task)
        task.add_done_callback(in_flight.discard)
    await asyncio.gather(*in_flight)
    return clients.close()


async def send(
    target: Target, requests: Sequence[Request], phase: Phase, *, until: Until, watch: Watch | None = None
) -> Outcome:
    """Run one phase of either kind."""
    if phase.clients:
        return await closed(target, requests, phase.clients, until=until, watch=watch)
    return await opened(target, requests, phase.per_s, until=until, watch=watch)


def after_s(seconds: float) -> Until:
    """Stop sending after so many seconds."""
    return lambda _sent, elapsed_s: elapsed_s >= seconds


def after(num_requests: int) -> Until:
    """Stop sending after so many requests."""
    return lambda sent, _elapsed_s: sent >= num_requests


def run(work: Callable[[], Coroutine[Any, Any, Result]]) -> Result:
    """Run on uvloop where it is installed, else on asyncio's loop."""
    try:
        import uvloop
    except ImportError:  # Windows has none
        factory: Callable[[], asyncio.AbstractEventLoop] = asyncio.new_event_loop
    else:
        factory = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        return runner.run(work())
