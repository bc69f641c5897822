"""Load on an embeddings server: closed (so many clients) or open (so many requests a second).

Requests are encoded before the clock starts and answers are not decoded, so that the client takes little of the cores
that it shares with the server; what it does take is in every outcome. Knows the API, but no particular server.
"""

import asyncio
import itertools
import random
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

from router.load.http_client import Connection, Request, Target
from router.load.outcome import Outcome, Sample

Result = TypeVar("Result")


class Clients:
    """The connections of one phase and what was measured on them."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._idle: list[Connection] = []
        self._samples: list[Sample] = []
        self._errors: Counter[str] = Counter()
        self._started_s = time.perf_counter()
        self._started_cpu_s = time.process_time()

    async def send(self, request: Request, due_s: float) -> None:
        """One request on a free connection, or on a new one; a failure is a sample too."""
        status = 0
        try:
            connection = await self._connection()
            answer = await connection.ask(request)
            status = answer.status
            self._idle.append(connection)
        except OSError as error:
            self._errors[type(error).__name__] += 1
        if status not in (0, 200):
            self._errors[str(status)] += 1
        self._samples.append(Sample(due_s, time.perf_counter() - due_s, request.num_texts, status))

    async def _connection(self) -> Connection:
        """The one used last, if the server has not closed it."""
        while self._idle:
            connection = self._idle.pop()
            if connection.is_open:
                return connection
            connection.close()
        return await Connection.open(self._target)

    def close(self) -> Outcome:
        """Hang up and sum up."""
        wall_s = time.perf_counter() - self._started_s
        cpu_s = time.process_time() - self._started_cpu_s
        for connection in self._idle:
            connection.close()
        return Outcome(
            wall_s=wall_s, client_cores=cpu_s / wall_s, samples=tuple(self._samples), errors=dict(self._errors)
        )


async def closed(
    target: Target,
    requests: Sequence[Request],
    num_clients: int,
    *,
    until: Callable[[int, float], bool],
) -> Outcome:
    """So many clients, each sending its next request when its last is answered.

    Args:
        requests: sent in this order, again from the front when all are sent.
        until: given requests sent and seconds gone by, whether to send no more; what is under way is waited for.
    """
    clients, sequence, sent = Clients(target), itertools.cycle(requests), itertools.count()
    started_s = time.perf_counter()

    async def client() -> None:
        while not until(next(sent), time.perf_counter() - started_s):
            await clients.send(next(sequence), time.perf_counter())

    await asyncio.gather(*(client() for _ in range(num_clients)))
    return clients.close()


async def opened(
    target: Target,
    requests: Sequence[Request],
    per_s: float,
    *,
    until: Callable[[int, float], bool],
    seed: int = 7,
) -> Outcome:
    """Arrivals at random (Poisson), whether or not the earlier ones are answered.

    Latency counts from the moment a request was due: a server that stalls cannot hide it by delaying the client.
    """
    clients, sequence, rng = Clients(target), itertools.cycle(requests), random.Random(seed)
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


def after_s(seconds: float) -> Callable[[int, float], bool]:
    """Stop sending after so many seconds."""
    return lambda _sent, gone_s: gone_s >= seconds


def after(num_requests: int) -> Callable[[int, float], bool]:
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
