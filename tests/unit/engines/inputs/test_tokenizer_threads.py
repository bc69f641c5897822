"""Tests the tokenizer threads: no request waits for more than one step of another large request."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence

import pytest

from engines.errors import InvalidValue
from engines.inputs import tokenizer_threads
from engines.inputs.token_ids import PIECE_CHARS, Step, TokenizedRequest
from engines.inputs.tokenizer_threads import TokenizerThreads

DONE = TokenizedRequest(())


class Scripted:
    """A request with given steps."""

    def __init__(self, steps: Sequence[Step], num_chars: int = PIECE_CHARS + 1) -> None:
        self._steps = steps
        self.num_chars = num_chars

    def plan_steps(self) -> Sequence[Step]:
        return self._steps

    def run_all(self) -> TokenizedRequest:
        for step in self._steps:
            step()
        return DONE

    def result(self) -> TokenizedRequest:
        return DONE


class Gate:
    """A step that blocks until it is released."""

    def __init__(self) -> None:
        self.begun, self._opened = threading.Event(), threading.Event()

    def __call__(self) -> Sequence[Step]:
        self.begun.set()
        self._opened.wait(60)
        return ()

    def open(self) -> None:
        self._opened.set()


@pytest.fixture
async def threads() -> AsyncIterator[TokenizerThreads]:
    threads = TokenizerThreads(1)
    yield threads
    threads.close()


def noting(done: list[str], name: str) -> Step:
    def step() -> Sequence[Step]:
        done.append(name)
        return ()

    return step


async def test_a_small_request_waits_for_no_step_of_a_large_one(threads: TokenizerThreads) -> None:
    gate, done = Gate(), list[str]()
    large = asyncio.create_task(threads.run(Scripted([gate])))
    await asyncio.to_thread(gate.begun.wait)

    await threads.run(Scripted([noting(done, "small")], num_chars=PIECE_CHARS))

    assert done == ["small"]
    assert not large.done()
    gate.open()
    assert await large == DONE


async def test_large_requests_take_turns_step_by_step(threads: TokenizerThreads) -> None:
    gate, done = Gate(), list[str]()
    first = asyncio.create_task(threads.run(Scripted([gate, *(noting(done, f"first {n}") for n in range(20))])))
    await asyncio.to_thread(gate.begun.wait)
    second = asyncio.create_task(threads.run(Scripted([noting(done, f"second {n}") for n in range(20)])))
    await asyncio.sleep(0)  # it has submitted its first step
    gate.open()
    await asyncio.gather(first, second)

    assert done.index("second 0") < done.index("first 10")
    assert done.index("first 10") < done.index("second 19")


async def test_what_is_left_of_a_request_is_dropped_when_its_caller_leaves(threads: TokenizerThreads) -> None:
    gate, done = Gate(), list[str]()
    large = asyncio.create_task(threads.run(Scripted([gate, noting(done, "left")])))
    await asyncio.to_thread(gate.begun.wait)
    large.cancel()
    with pytest.raises(asyncio.CancelledError):
        await large
    gate.open()

    await threads.run(Scripted([noting(done, "other")]))

    assert done == ["other"]


async def test_a_step_may_bring_further_ones(threads: TokenizerThreads) -> None:
    done: list[str] = []

    def step() -> Sequence[Step]:
        return [noting(done, "further"), noting(done, "last")]

    await threads.run(Scripted([step]))

    assert done == ["further", "last"]


def refusing(message: str, after: Callable[[], object] = lambda: None) -> Step:
    def step() -> Sequence[Step]:
        after()
        raise InvalidValue(message)

    return step


async def test_the_earliest_refusal_is_raised_and_nothing_runs_after_it() -> None:
    threads, gate, done = TokenizerThreads(2), Gate(), list[str]()

    def late() -> None:
        gate.open()

    steps = [refusing("input[0]", gate), refusing("input[1]", late), noting(done, "left")]
    with pytest.raises(InvalidValue, match=r"input\[0\]"):
        await threads.run(Scripted(steps))

    assert done == []
    threads.close()


async def test_memory_is_given_back_once_when_the_last_large_request_has_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    trimmed = threading.Semaphore(0)
    monkeypatch.setattr(tokenizer_threads, "_trim_heap", trimmed.release)
    monkeypatch.setattr(tokenizer_threads, "_TRIM_AFTER_S", 0)
    threads = TokenizerThreads(1)

    with threads.trim_heap_after():
        with threads.trim_heap_after():
            pass
        await threads.run(Scripted([]))
        assert not trimmed.acquire(blocking=False)

    assert await asyncio.to_thread(trimmed.acquire, timeout=60)
    await threads.run(Scripted([]))
    assert not trimmed.acquire(blocking=False)
    threads.close()
