"""Tests the positions of the event ring: a subscriber's position stays valid when old events are dropped."""

import asyncio

from engines.event_ring import EventRing
from engines.types import Event


def event(seq: int) -> Event:
    return Event(seq=seq, time_s=0.0, host_id="a", model_id="m", kind="state", source="cold", target="loading")


def ring(num_events: int, max_events: int = 3) -> EventRing:
    made = EventRing(max_events)
    for seq in range(1, num_events + 1):
        made.append(event(seq))
    return made


def test_since_returns_the_buffered_events_after_a_position() -> None:
    five = ring(5)

    assert [[each.seq for each in five.since(position)] for position in (0, 2, 3, 5, 9)] == [
        [3, 4, 5], [3, 4, 5], [4, 5], [], [],
    ]  # fmt: skip
    assert five.last == 5


async def test_a_follower_that_is_overtaken_goes_on_with_what_is_left_and_sees_nothing_twice() -> None:
    made = ring(2)
    stream = made.follow(0)
    seen = [(await anext(stream)).seq]
    for seq in range(3, 8):
        made.append(event(seq))
    made.close()
    seen += [each.seq async for each in stream]

    assert seen == [1, 2, 5, 6, 7]


async def test_waiting_ends_with_an_event_or_with_the_ring() -> None:
    made = ring(1)
    waiting = [asyncio.create_task(made.arrived(1)), asyncio.create_task(made.arrived(2))]
    await asyncio.sleep(0)
    made.append(event(2))
    first = await waiting[0]
    made.close()

    assert (await made.arrived(0), first, await waiting[1]) == (True, True, False)
