"""What a run of a batch needs: its bounds, the parts of the server that it uses, and how one line is answered."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import Executor
from typing import TYPE_CHECKING, Protocol

from msgspec import Struct

from router.batches.folder import DataFolder
from router.schemas.batches import Endpoint

if TYPE_CHECKING:
    from router.batches.leases import Leases  # imports SQLAlchemy, which is optional; every server imports this module


class LineWork(Struct, frozen=True):
    """One request. `owner`: of the batch; `body`: JSON."""

    owner: str
    endpoint: Endpoint
    body: bytes
    request_id: str


class LineAnswer(Struct, frozen=True):
    """The answer: its status, its JSON on one line, and the headers that say what the vectors are.

    `retry_after_s`: None if a retry would give the same. `num_truncated`: inputs that were cut.
    """

    status: int
    body: bytes
    retry_after_s: float | None = None
    headers: Mapping[str, str] = {}
    num_truncated: int = 0


class Execute(Protocol):
    """Answers one line as the endpoint would."""

    async def __call__(self, work: LineWork) -> LineAnswer: ...


class RunPolicy(Struct, frozen=True, kw_only=True):
    """Bounds of one run.

    Attributes:
        max_line_bytes: longer lines are refused.
        window_bytes: of the lines in flight and their answers, roughly.
        flush_s, flush_bytes: results are journaled at least that often.
        poll_s: how often the batch's status is read.
        max_attempts: of a line that the server cannot serve (503); one that is refused for lack of room (429) is
            retried until the batch expires.
        outage_s: the first such line is retried at least that long: a worker that restarts, and a model that is
            quarantined for up to 10 minutes because workers died under it, cost a batch no line. Once it was in vain,
            the others of this run have `max_attempts` only.
        retention_s: how long the results are kept.
    """

    max_line_bytes: int
    retention_s: float
    window_bytes: int = 32 * 2**20
    flush_s: float = 1.0
    flush_bytes: int = 2**20
    poll_s: float = 0.4
    max_attempts: int = 8
    outage_s: float = 900.0


class RunParts(Struct, frozen=True, kw_only=True):
    """What all runs of a server share.

    Attributes:
        share: how many lines of one batch may be in flight.
        may_run: whether an owner may still run batches.
        on_line: told the outcome of each line that was journaled, `completed` or `failed`, with their number.
        on_end: told the status with which a batch has ended, and its seconds since it was created.
        executor: its threads read and write files and the database.
    """

    folder: DataFolder
    leases: "Leases"
    execute: Execute
    policy: RunPolicy
    executor: Executor
    share: Callable[[], int]
    may_run: Callable[[str], bool]
    on_line: Callable[[str, int], None]
    on_end: Callable[[str, float], None]
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
