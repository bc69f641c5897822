"""Event fields for programs: reasons, seconds and bytes of loads, evictions and failures."""

import asyncio
from collections.abc import AsyncIterator

import pytest
from msgspec import structs
from structlog.contextvars import bound_contextvars, merge_contextvars
from structlog.testing import capture_logs

from engines.errors import AccessDenied, BrokenFiles, LoadFailed, OutOfMemory
from engines.host import Host
from engines.spec import ModelSpec
from engines.testing.fakes import (
    WEIGHT_BYTES,
    WORKSPACE_BYTES,
    FakeLoader,
    FakeTime,
    Script,
    fake_host,
    fake_runtime,
    fake_specs,
)
from engines.types import EmbedCall, Event, State

TAKES_BYTES = WEIGHT_BYTES + WORKSPACE_BYTES


async def embed(host: Host, model_id: str = "a", keep_alive_s: float | None = None) -> None:
    await host.run(EmbedCall(model_id=model_id, texts=("x",), keep_alive_s=keep_alive_s))


async def steps(host: Host, source: State, target: State) -> list[Event]:
    """Closes the host and returns its events from one state to another."""
    stream: AsyncIterator[Event] = host.events(0)
    await host.aclose(grace_s=0)
    return [event async for event in stream if (event.source, event.target) == (source, target)]


async def test_a_load_tells_its_seconds_and_how_good_the_estimate_was() -> None:
    time = FakeTime()
    loader = FakeLoader(weight_bytes={"a": 3 * WEIGHT_BYTES}, sleep=time.sleep)
    host = fake_host("a", loader=loader, runtime=fake_runtime(time=time))
    await host.start()
    await embed(host)

    (loaded,) = await steps(host, "warming", "ready")
    assert (loaded.estimated_bytes, loaded.measured_bytes) == (TAKES_BYTES, TAKES_BYTES + 2 * WEIGHT_BYTES)
    assert loaded.seconds == host_load_s(loaded)


def host_load_s(event: Event) -> float:
    """Parses the seconds from the cause, the text for people."""
    return float(event.cause.removeprefix("loaded and warm after ").removesuffix(" s"))


async def test_an_eviction_tells_how_long_the_model_stayed_and_for_whom_it_left() -> None:
    time = FakeTime()
    host = fake_host("a", "b", budget_bytes=TAKES_BYTES, runtime=fake_runtime(time=time))
    await host.start()
    await embed(host)
    waiting = asyncio.create_task(embed(host, "b"))
    await time.advance(60)
    await waiting

    left = await steps(host, "draining", "unloading")
    assert [(event.model_id, event.reason, event.claimant) for event in left] == [
        ("a", "room", "b"),
        ("b", "shutdown", None),
    ]
    assert left[0].seconds == pytest.approx(5, abs=1)


async def test_idleness_operators_and_the_registry_have_different_reasons() -> None:
    time = FakeTime()
    host = fake_host("a", "b", "c", runtime=fake_runtime(time=time))
    await host.start()
    await embed(host, "a", keep_alive_s=10)
    await embed(host, "b")
    await embed(host, "c")
    await time.advance(20)
    await host.evict("b")
    await host.reload({"a": fake_specs("a")["a"], "b": fake_specs("b")["b"]})
    await time.advance(1)

    left = await steps(host, "draining", "unloading")
    assert [(event.model_id, event.reason) for event in left] == [("a", "idle"), ("b", "operator"), ("c", "registry")]
    assert left[0].seconds == pytest.approx(10)


async def test_a_model_that_measures_too_large_beside_others_makes_one_leave() -> None:
    time = FakeTime()
    loader = FakeLoader(weight_bytes={"b": 2 * WEIGHT_BYTES})
    host = fake_host("a", "b", budget_bytes=TAKES_BYTES + WEIGHT_BYTES, loader=loader, runtime=fake_runtime(time=time))
    await host.start()
    await embed(host, "a")
    await embed(host, "b")
    await time.advance(60)

    left = await steps(host, "draining", "unloading")
    assert ("a", "over_budget") in [(event.model_id, event.reason) for event in left]


@pytest.mark.parametrize(
    ("script", "told"),
    [
        ({"a": [AccessDenied("no")]}, [("loading", "failed", "access_denied")]),
        ({"a": [OutOfMemory("full")]}, [("loading", "cold", "out_of_memory")]),
        (
            {"a": [BrokenFiles("torn"), BrokenFiles("torn")]},
            [("loading", "fetching", "broken_files"), ("loading", "failed", "broken_files")],
        ),
    ],
)
async def test_every_failed_attempt_tells_its_kind(script: Script, told: list[tuple[str, str, str]]) -> None:
    host = fake_host("a", loader=FakeLoader(failures=script))
    await host.start()
    await asyncio.gather(embed(host), return_exceptions=True)
    stream = host.events(0)
    await host.aclose(grace_s=0)

    failures = [event async for event in stream if event.reason not in ("", "shutdown")]
    assert [(event.source, event.target, event.reason) for event in failures] == told


async def test_a_status_tells_what_a_model_needs_also_when_it_is_away() -> None:
    host = fake_host("a", ModelSpec(model_id="b", source="x"))
    await host.start()
    away, other = host.status("a"), structs.asdict(host.status("b"))
    await host.aclose(grace_s=0)

    assert (away.weight_bytes, away.need_bytes) == (0, WEIGHT_BYTES)
    assert other["need_bytes"] == WEIGHT_BYTES


async def test_the_log_names_states_and_the_cause_of_a_failed_load_as_an_error_and_no_request() -> None:
    loader = FakeLoader(failures={"a": [BrokenFiles("model.safetensors is cut off")] * 9})
    host = fake_host("a", "b", loader=loader)
    await host.start()
    with capture_logs(processors=[merge_contextvars]) as lines, bound_contextvars(request_id="r-1"):
        await embed(host, "b")
        with pytest.raises(LoadFailed):
            await embed(host)
        await host.aclose(grace_s=0)
    states = [line for line in lines if line["event"] == "model.state"]
    (failed,) = [line for line in states if line["to"] == "failed"]
    (ready,) = [line for line in states if line["to"] == "ready"]

    assert (failed["model"], failed["from"], failed["log_level"]) == ("a", "loading", "error")
    assert "model.safetensors is cut off" in failed["cause"]
    assert (ready["model"], ready["host"], ready["from"], ready["log_level"]) == ("b", "fake", "warming", "info")
    assert not any("request_id" in line for line in states)
