"""How long a request to a host may take, and what it means that there was no answer. Ray itself waits for ever."""

import asyncio

from engines.errors import HostLost
from engines.wire import Evict, Foresee, Preload, Request
from router.fleet import NotSent
from router.ray.board import Errand

_LOAD_S = 3600.0
_COMMAND_S = 30.0
"""Beside the time that a command may take by itself."""
_AGAIN_S = 0.05


def limit_of(request: Request) -> float:
    """How long an operator's command may take. Ray itself waits for ever for a host that is cut off."""
    match request:
        case Preload(wait=True):
            return _LOAD_S
        case Evict():
            return request.timeout_s + _COMMAND_S
        case Foresee():
            return request.size_s + _COMMAND_S
    return _COMMAND_S


async def no_answer(errand: Errand, limit_s: float) -> HostLost:
    """The error of a request that was not answered in time, or given up before it was sent."""
    if errand.is_sent:
        return HostLost(f"host {errand.to} did not answer within {limit_s:g} s; ask again")
    if errand.ticket is None:
        return HostLost(f"host {errand.to} is not there any more")
    await asyncio.sleep(_AGAIN_S)
    return NotSent(f"no host was open for model {errand.ticket.spec.model_id!r}; ask again")


def is_cancelled_by_caller() -> bool:
    """Whether the running task is to end; Serve raises the same where it has given a request up by itself."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
