"""Large answers wait until there is memory for them: in order, no caller having more than half, none of it lost."""

import asyncio
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.errors import TooManyRequests
from router.limits.answer_memory import AnswerMemory


async def settled() -> None:
    """Lets every task run until it waits."""
    for _ in range(5):
        await asyncio.sleep(0)


async def held(memory: AnswerMemory, *requests: tuple[str, int]) -> list[asyncio.Task[None]]:
    """Starts a request after the other."""
    tasks = []
    for caller, num_bytes in requests:
        tasks.append(asyncio.create_task(memory.hold(caller, num_bytes)))
        await settled()
    return tasks


async def test_requests_wait_in_order_until_the_memory_is_free() -> None:
    memory = AnswerMemory(60.0, max_bytes=100)
    tasks = await held(memory, ("a", 50), ("b", 40), ("c", 30), ("d", 5))
    before = [task.done() for task in tasks]
    memory.release("a", 50)
    await settled()

    assert before == [True, True, False, False]  # d's would fit, but c came first
    assert [task.done() for task in tasks] == [True] * 4
    assert memory.held_bytes == 75


async def test_a_caller_has_half_at_most_and_others_pass_it() -> None:
    memory = AnswerMemory(60.0, max_bytes=100)
    tasks = await held(memory, ("a", 40), ("a", 20), ("b", 30))
    before = [task.done() for task in tasks]
    memory.release("a", 40)
    await settled()

    assert before == [True, False, True]
    assert memory.held_bytes == 50
    for task in tasks:
        await task


async def test_a_request_for_more_than_half_takes_half_and_gives_it_back() -> None:
    memory = AnswerMemory(60.0, max_bytes=100)
    await memory.hold("a", 1000)
    taken = memory.held_bytes
    memory.release("a", 1000)

    assert (taken, memory.held_bytes) == (50, 0)


async def test_a_wait_that_takes_too_long_is_refused_with_both_numbers() -> None:
    memory = AnswerMemory(0.0, max_bytes=2 * 2**20)
    await memory.hold("a", 2**20)

    with pytest.raises(TooManyRequests, match=r"1\.0 MiB of 2\.0 MiB are held"):
        await memory.hold("a", 2**20)
    assert (memory.num_waiting, memory.held_bytes) == (0, 2**20)


async def test_a_request_that_leaves_while_it_waits_lets_the_next_pass() -> None:
    memory = AnswerMemory(60.0, max_bytes=100)
    tasks = await held(memory, ("a", 50), ("b", 45), ("c", 50), ("d", 5))
    before = tasks[3].done()
    tasks[2].cancel()
    await settled()

    assert (before, tasks[3].done(), memory.num_waiting) == (False, True, 0)


@pytest.mark.parametrize("is_released_first", [True, False])
async def test_a_request_that_is_cancelled_as_its_turn_comes_loses_no_memory(is_released_first: bool) -> None:
    memory = AnswerMemory(60.0, max_bytes=100)
    tasks = await held(memory, ("a", 50), ("a", 50))
    if is_released_first:
        memory.release("a", 50)
        tasks[1].cancel()
    else:
        tasks[1].cancel()
        memory.release("a", 50)
    await settled()

    assert (memory.held_bytes, memory.num_waiting) == (0, 0)


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 120), st.booleans()), max_size=30),
    st.randoms(use_true_random=False),
)
def test_in_any_order_the_limit_is_kept_everyone_is_served_and_all_is_given_back(
    requests: list[tuple[str, int, bool]], chance: random.Random
) -> None:
    asyncio.run(_serve(requests, chance))


async def _serve(requests: list[tuple[str, int, bool]], chance: random.Random) -> None:
    """Starts requests (caller, bytes, whether it leaves when it still waits), and ends one after the other."""
    memory, peak = AnswerMemory(60.0, max_bytes=100), 0
    running: dict[asyncio.Task[None], tuple[str, int, bool]] = {}
    for caller, num_bytes, leaves in requests:
        (task,) = await held(memory, (caller, num_bytes))
        running[task] = (caller, num_bytes, leaves)
        peak = max(peak, memory.held_bytes)
    while running:
        ready = [task for task, (*_, leaves) in running.items() if task.done() or leaves]
        assert ready, "someone waits for ever"
        task = chance.choice(ready)
        caller, num_bytes, _ = running.pop(task)
        if task.done():
            memory.release(caller, num_bytes)
        task.cancel()
        await settled()
        peak = max(peak, memory.held_bytes)

    assert peak <= 100
    assert (memory.held_bytes, memory.num_waiting) == (0, 0)
