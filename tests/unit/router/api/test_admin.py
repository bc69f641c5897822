"""Tests `/admin` over real sockets: slots, commands, memory, plans and the event stream."""

import asyncio
from collections.abc import AsyncIterator

import httpx
import msgspec
import pytest
from litestar import Litestar

from engines.errors import HostNotFound
from engines.types import Event
from router.api.event_stream import event_messages, parse_last_event_id
from router.server.state import ServerState
from tests.testkit.backends import ScriptedBackend
from tests.testkit.servers import Served, serving


def event(seq: int, host_id: str = "cpu") -> Event:
    return Event(
        seq=seq, time_s=1.5, host_id=host_id, model_id="mini", kind="state", source="cold", target="loading",
        cause="asked for",
    )  # fmt: skip


def test_every_slot_is_listed_and_absent_models_too(served: Served) -> None:
    slots = served.client.get("/admin/models").json()["data"]

    assert [(slot["id"], slot["state"], slot["device"]) for slot in slots] == [
        ("mini", "ready", "cpu"),
        ("BAAI/bge-m3", "ready", "cpu"),
        ("cold", "absent", "auto"),
    ]
    assert slots[0]["weight_bytes"] == 200
    assert slots[0]["load_s"] == 2.5


def test_one_model_shows_its_nearest_slot_and_all_of_them(served: Served) -> None:
    answer = served.client.get("/admin/models/BAAI/bge-m3").json()

    assert (answer["id"], answer["state"], answer["loads"]) == ("BAAI/bge-m3", "ready", 1)
    assert [slot["host_id"] for slot in answer["slots"]] == ["cpu"]


@pytest.mark.parametrize(
    ("path", "body", "command", "status"),
    [
        ("mini/preload", None, ("preload", "mini", False, True), 200),
        ("mini/preload", {}, ("preload", "mini", False, True), 200),
        ("BAAI/bge-m3/preload", {"pin": True}, ("preload", "BAAI/bge-m3", True, True), 200),
        ("BAAI%2Fbge-m3/preload", {"wait": False}, ("preload", "BAAI/bge-m3", False, False), 202),
        ("org/deep/alias/preload", None, ("preload", "BAAI/bge-m3", False, True), 200),
        ("mini/preload", {"host": "cuda:1"}, ("preload", "mini", False, True, "cuda:1"), 200),
        ("mini/evict", None, ("evict", "mini", False, 30.0), 200),
        ("mini/evict", {"to": "host"}, ("evict", "mini", False, 30.0, "host"), 200),
        ("BAAI/bge-m3/evict", {"force": True, "timeout": 0.5}, ("evict", "BAAI/bge-m3", True, 0.5), 200),
    ],
)
def test_a_command_reaches_the_backend(
    served: Served, path: str, body: object, command: tuple[object, ...], status: int
) -> None:
    answer = (
        served.client.post(f"/admin/models/{path}", json=body)
        if body is not None
        else served.client.post(f"/admin/models/{path}")
    )

    assert answer.status_code == status
    assert answer.json()["id"] == command[1]
    assert served.backend.commands == [command]


def test_a_host_is_recycled(served: Served) -> None:
    answer = served.client.post("/admin/hosts/cuda:1/recycle")

    assert answer.status_code == 200
    assert [device["host_id"] for device in answer.json()["devices"]] == ["cpu"]
    assert served.backend.commands == [("recycle", "cuda:1")]


def test_a_host_that_is_not_there_is_not_found(served: Served) -> None:
    served.backend.failures["nobody"] = HostNotFound("no host is called 'nobody'; this server has cpu")

    answer = served.client.post("/admin/hosts/nobody/recycle")

    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")
    assert "this server has cpu" in answer.json()["error"]["message"]


def test_memory_is_reported_for_each_device(served: Served) -> None:
    assert served.client.get("/admin/memory").json() == {
        "devices": [
            {
                "host_id": "cpu", "device": "cpu", "total_bytes": 1000, "budget_bytes": 800, "used_bytes": 300,
                "workspace_bytes": 100, "free_bytes": 400, "residents": ["mini", "BAAI/bge-m3"], "is_draining": False,
                    "host_budget_bytes": 0, "host_used_bytes": 0, "parked": [],
            }
        ]
    }  # fmt: skip


@pytest.mark.parametrize(
    ("query", "model_id"),
    [("?model=BAAI/bge-m3", "BAAI/bge-m3"), ("?model=org/deep/alias", "BAAI/bge-m3"), ("", "mini")],
)
def test_a_plan_is_shown(served: Served, query: str, model_id: str) -> None:
    plan = served.client.get(f"/admin/plan{query}").json()

    assert (plan["model_id"], plan["fits"], plan["evict"]) == (model_id, True, [])


async def test_a_client_that_leaves_no_longer_waits_for_its_preload(app: Litestar, backend: ScriptedBackend) -> None:
    backend.gates["mini"] = asyncio.Event()
    async with serving(app) as url, httpx.AsyncClient(base_url=url) as client:
        with pytest.raises(httpx.ReadTimeout):
            await client.post("/admin/models/mini/preload", timeout=0.4)
        while not backend.cancelled:  # noqa: ASYNC110 - the server has no event for it
            await asyncio.sleep(0.005)

    assert backend.cancelled == ["mini"]


async def test_events_are_streamed_as_they_happen(app: Litestar, backend: ScriptedBackend) -> None:
    async with (
        serving(app) as url,
        httpx.AsyncClient(base_url=url) as client,
        client.stream("GET", "/admin/events") as answer,
    ):
        lines = answer.aiter_lines()
        opened = await anext(lines)
        backend.publish(event(7))
        got = [line async for line in take(lines, 4)]

    assert answer.headers["content-type"].startswith("text/event-stream")
    assert opened == ": open"
    assert got[:3] == ["", "id: cpu=7", "event: state"]
    assert msgspec.json.decode(got[3].removeprefix("data: "), type=Event) == event(7)
    assert backend.asked_after == {}


async def test_a_stream_resumes_after_the_last_event_id(app: Litestar, backend: ScriptedBackend) -> None:
    backend.remembered = [event(8), event(4, "cuda:0")]
    async with (
        serving(app) as url,
        httpx.AsyncClient(base_url=url) as client,
        client.stream("GET", "/admin/events", headers={"Last-Event-ID": "cpu=7&cuda%3A0=3"}) as answer,
    ):
        ids = [line async for line in take(answer.aiter_lines(), 7) if line.startswith("id:")]

    assert backend.asked_after == {"cpu": 7, "cuda:0": 3}
    assert ids == ["id: cpu=8&cuda%3A0=3", "id: cpu=8&cuda%3A0=4"]


async def test_a_reader_that_disconnects_is_unsubscribed(app: Litestar, backend: ScriptedBackend) -> None:
    async with serving(app) as url, httpx.AsyncClient(base_url=url) as client:
        metrics_alone = backend.num_subscribers
        async with client.stream("GET", "/admin/events") as answer:
            await anext(answer.aiter_lines())
            was_subscribed = backend.num_subscribers
        while backend.num_subscribers > metrics_alone:  # noqa: ASYNC110 - the server has no event for it
            await asyncio.sleep(0.005)

    assert was_subscribed == metrics_alone + 1


async def test_a_drain_ends_the_streams(app: Litestar) -> None:
    server_state: ServerState = app.state.server_state
    async with (
        serving(app) as url,
        httpx.AsyncClient(base_url=url) as client,
        client.stream("GET", "/admin/events") as answer,
    ):
        lines = answer.aiter_lines()
        await anext(lines)
        server_state.begin_drain()
        rest = [line async for line in lines]

    assert [line for line in rest if line.startswith(("id", "data"))] == []


async def test_an_idle_stream_sends_heartbeats() -> None:
    messages = event_messages(silence(), {}, asyncio.Event(), heartbeat_s=0.01)
    comments = [(await anext(messages)).comment for _ in range(3)]
    await messages.aclose()  # type: ignore[attr-defined]  # it is an async generator

    assert comments == ["open", "still here", "still here"]


async def test_a_stream_ends_with_its_events() -> None:
    async def one() -> AsyncIterator[Event]:
        yield event(1)

    messages = [message async for message in event_messages(one(), {}, asyncio.Event())]

    assert [message.id for message in messages] == [None, "cpu=1"]


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("", {}),
        ("cpu=7", {"cpu": 7}),
        ("cuda%3A1=2&cpu=x&=&junk", {"cuda:1": 2}),
        ("cpu=-1", {}),
        ("42", {}),
        ("cpu=" + "9" * 5000, {}),
        ("cpu=" + "9" * 19 + "&cuda=" + "9" * 18, {"cuda": 10**18 - 1}),
        ("&".join(f"host{number}=1" for number in range(5000)), {}),
    ],
    ids=lambda given: str(given)[:24],
)
def test_an_odd_last_event_id_is_read_as_far_as_possible(text: str, seen: dict[str, int]) -> None:
    assert parse_last_event_id(text) == seen


async def take(lines: AsyncIterator[str], count: int) -> AsyncIterator[str]:
    for _ in range(count):
        yield await anext(lines)


async def silence() -> AsyncIterator[Event]:
    await asyncio.Event().wait()
    yield event(1)
