"""Tests `POST /admin/models/{id}/preload` as a stream over a real socket: progress, `done` and `error`."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import msgspec
from litestar import Litestar, Request

from engines.errors import HubUnreachable
from engines.host import Host, HostConfig
from engines.spec import ModelSpec
from engines.testing.fakes import FakeFiles, FakeLoader, InlineWorkers, fake_runtime
from engines.types import Event
from router.api.event_stream import preload_messages
from router.app import create_app
from router.backends.local import LocalBackend
from router.config.settings import Settings
from router.registry.registry import Registry
from router.schemas.admin import Status
from tests.testkit.backends import ScriptedBackend
from tests.testkit.servers import serving

STREAM = {"Accept": "text/event-stream"}
PRELOAD = "/admin/models/org/mini/preload"
SPECS = {name: ModelSpec(model_id=name, source=f"fake/{name}") for name in ("org/mini", "other")}


@asynccontextmanager
async def served(files: FakeFiles, workers: InlineWorkers | None = None) -> AsyncIterator[httpx.AsyncClient]:
    world = msgspec.structs.replace(fake_runtime(), workers=workers or InlineWorkers())
    host = Host(HostConfig(host_id="cpu", workspace_bytes=100), SPECS, files, FakeLoader(), world)
    app = create_app(Settings(), Registry(models=SPECS), LocalBackend([host], SPECS))
    async with serving(app) as url, httpx.AsyncClient(base_url=url, timeout=10) as client:
        yield client


async def messages(answer: httpx.Response) -> list[tuple[str, Any]]:
    """Return (event, data) of each message until the stream ends."""
    found: list[tuple[str, Any]] = []
    name = ""
    async for line in answer.aiter_lines():
        if line.startswith("event: "):
            name = line.removeprefix("event: ")
        elif line.startswith("data: "):
            found.append((name, msgspec.json.decode(line.removeprefix("data: "))))
    return found


async def test_a_preload_streams_its_progress_and_ends_with_the_slots() -> None:
    async with (
        served(FakeFiles(on_disk=["other"])) as client,
        client.stream("POST", PRELOAD, headers=STREAM, json={"pin": True}) as answer,
    ):
        kind = answer.headers["content-type"]
        got = await messages(answer)
    states = [data["target"] for name, data in got if name == "state"]
    ending, slots = got[-1]

    assert kind.startswith("text/event-stream")
    assert states == ["fetching", "cold", "waiting_space", "loading", "warming", "ready"]
    assert {data["model_id"] for name, data in got[:-1]} == {"org/mini"}
    assert (ending, slots["state"], slots["pinned"], len(slots["slots"])) == ("done", "ready", True, 1)


async def test_a_preload_of_a_ready_model_is_done_at_once() -> None:
    async with served(FakeFiles()) as client:
        await client.post(PRELOAD)
        async with client.stream("POST", PRELOAD, headers=STREAM) as answer:
            got = await messages(answer)

    assert [name for name, _ in got] == ["done"]


async def test_a_preload_that_fails_ends_with_the_error() -> None:
    files = FakeFiles(on_disk=[], failures={"org/mini": [HubUnreachable("the hub sleeps: try again")]})
    async with served(files) as client, client.stream("POST", PRELOAD, headers=STREAM) as answer:
        status = answer.status_code
        got = await messages(answer)
    ending, data = got[-1]

    assert status == 200
    assert [d["target"] for name, d in got if name == "state"] == ["fetching", "failed"]
    assert (ending, data["error"]["code"]) == ("error", "model_load_failed")
    assert "the hub sleeps" in data["error"]["message"]


async def test_an_unknown_model_is_refused_before_any_stream() -> None:
    async with served(FakeFiles()) as client:
        answer = await client.post("/admin/models/nothing/preload", headers=STREAM)

    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")


async def test_a_client_that_accepts_any_type_gets_no_stream() -> None:
    async with served(FakeFiles()) as client:
        answer = await client.post(PRELOAD, headers={"Accept": "*/*"})

    assert answer.json()["state"] == "ready"


async def test_a_client_that_leaves_its_stream_does_not_end_the_load() -> None:
    workers = InlineWorkers()
    async with served(FakeFiles(), workers) as client:
        workers.hold("load")
        async with client.stream("POST", PRELOAD, headers=STREAM) as answer:
            async for line in answer.aiter_lines():
                if line.startswith("data: "):
                    break
        while (await client.get("/admin/models/org/mini")).json()["waiters"]:
            pass
        workers.release("load")
        while (slot := (await client.get("/admin/models/org/mini")).json())["state"] != "ready":
            pass

    assert (slot["loads"], slot["leases"]) == (1, 0)


async def test_a_slow_load_keeps_its_stream_alive(app: Litestar, backend: ScriptedBackend) -> None:
    async def forever() -> Status:
        await asyncio.Event().wait()
        return Status(status="ok")

    request: Request[Any, Any, Any] = Request({"type": "http", "headers": [], "app": app})  # type: ignore[arg-type]  # the keys that are read
    stream = preload_messages(request, silence(), forever, heartbeat_s=0.01)
    comments = [(await anext(stream)).comment for _ in range(3)]
    await stream.aclose()  # type: ignore[attr-defined]  # it is an async generator

    assert comments == ["open", "still here", "still here"]


async def test_a_client_that_reads_slowly_loses_events_and_sees_the_end(app: Litestar) -> None:
    are_all_out = asyncio.Event()

    async def chatter() -> AsyncIterator[Event]:
        for seq in range(1, 5001):
            yield Event(seq=seq, time_s=0, host_id="", model_id="", kind="state", source="cold", target="cold")
        are_all_out.set()

    async def preload() -> Status:
        await are_all_out.wait()
        return Status(status="ok")

    request: Request[Any, Any, Any] = Request({"type": "http", "headers": [], "app": app})  # type: ignore[arg-type]  # the keys that are read
    stream = preload_messages(request, chatter(), preload)
    await anext(stream)
    await are_all_out.wait()
    names = [message.event async for message in stream]

    assert names[-1] == "done"
    assert 1 < len(names) <= 1025


async def silence() -> AsyncIterator[Event]:
    await asyncio.Event().wait()
    yield Event(seq=1, time_s=0, host_id="", model_id="", kind="state", source="cold", target="cold")
