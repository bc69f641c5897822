"""Tests that a request's work ends when its client disconnects, and only then."""

import asyncio
from typing import Any, cast

import pytest
from litestar import Request

from router.errors import ClientLeft
from router.server import application
from router.server.application import while_client_stays


class FakeRequest:
    """Receives a disconnect when `leave` is called."""

    def __init__(self) -> None:
        self._left = asyncio.Event()
        self.is_watched = asyncio.Event()

    def leave(self) -> None:
        self._left.set()

    async def receive(self) -> dict[str, Any]:
        self.is_watched.set()
        await self._left.wait()
        return {"type": "http.disconnect"}


def staying(request: FakeRequest) -> while_client_stays:
    return while_client_stays(cast(Request[Any, Any, Any], request))


@pytest.fixture(autouse=True)
def _watch_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(application, "_WATCH_AFTER_S", 0.0)


async def test_the_work_of_a_client_that_leaves_is_cancelled() -> None:
    request, was_cancelled = FakeRequest(), False

    with pytest.raises(ClientLeft):
        async with staying(request):
            await request.is_watched.wait()
            request.leave()
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                was_cancelled = True
                raise

    task = asyncio.current_task()
    assert was_cancelled
    assert task is not None
    assert not task.cancelling(), "later awaits of the request are not cancelled"


async def test_a_cancelled_request_is_not_taken_for_a_client_that_left() -> None:
    request = FakeRequest()

    async def work() -> None:
        async with staying(request):
            await asyncio.Event().wait()

    task = asyncio.create_task(work())
    await request.is_watched.wait()
    task.cancel()

    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_request_that_is_cancelled_while_its_client_leaves_stays_cancelled() -> None:
    request = FakeRequest()

    async def work() -> None:
        async with staying(request):
            try:
                await asyncio.Event().wait()
            finally:
                task.cancel()

    task = asyncio.create_task(work())
    await request.is_watched.wait()
    request.leave()

    with pytest.raises(asyncio.CancelledError):
        await task


async def test_an_error_of_the_work_passes_although_the_client_left() -> None:
    request = FakeRequest()

    with pytest.raises(ZeroDivisionError):
        async with staying(request):
            await request.is_watched.wait()
            request.leave()
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                raise ZeroDivisionError from None


async def test_nobody_watches_once_the_work_is_done() -> None:
    request = FakeRequest()

    async with staying(request):
        await request.is_watched.wait()
    before = len(asyncio.all_tasks())
    request.leave()
    await asyncio.sleep(0)

    assert before - len(asyncio.all_tasks()) == 1, "the watch has ended"
