"""Tests of `EventFeed`: events of remote hosts, for subscribers."""

import asyncio
from collections.abc import AsyncIterator

from engines.testing.runtime import let_run
from engines.types import Event
from router.backends.event_feed import EventFeed


def event(seq: int, host_id: str = "a") -> Event:
    return Event(seq=seq, time_s=0.0, host_id=host_id, model_id="m", kind="state", source="cold", target="loading")


async def collect(stream: AsyncIterator[Event]) -> list[tuple[str, int]]:
    return [(event.host_id, event.seq) async for event in stream]


async def test_a_subscriber_gets_events_from_its_call_on() -> None:
    feed = EventFeed()
    feed.add(event(1))
    stream = feed.follow()
    feed.add(event(2))
    feed.add(event(1, "b"))
    feed.close()

    assert await collect(stream) == [("a", 2), ("b", 1)]


async def test_a_returning_subscriber_gets_missed_events_of_the_hosts_it_names() -> None:
    feed = EventFeed()
    for seq in (1, 2, 3):
        feed.add(event(seq))
        feed.add(event(seq, "b"))
    feed.close()

    assert await collect(feed.follow({"a": 1})) == [("a", 2), ("a", 3)]
    assert await collect(feed.follow({"a": 99})) == [("a", 1), ("a", 2), ("a", 3)]
    assert feed.last_seq("b") == 3
    assert feed.last_seq("nobody") == 0


async def test_subscribers_are_woken_and_each_gets_every_event() -> None:
    feed = EventFeed()
    following = [asyncio.create_task(collect(feed.follow())) for _ in range(3)]
    await let_run()
    for seq in range(1, 51):
        feed.add(event(seq))
        await asyncio.sleep(0)
    feed.close()

    assert await asyncio.gather(*following) == [[("a", seq) for seq in range(1, 51)]] * 3


async def test_a_slow_subscriber_loses_events_and_delays_no_other() -> None:
    feed = EventFeed(max_events=10)
    stream = feed.follow()
    for seq in range(1, 101):
        feed.add(event(seq))
    feed.close()

    assert await collect(stream) == [("a", seq) for seq in range(91, 101)]
