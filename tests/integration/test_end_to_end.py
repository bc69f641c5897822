"""Tests HTTP over the real backend and a real host; only the engines are fakes."""

import asyncio
from collections.abc import AsyncIterator

import httpx
import msgspec
import numpy as np
import openai
import pytest

from engines.errors import AccessDenied
from engines.testing.fakes import (  # fmt: skip
    WEIGHT_BYTES,
    WORKSPACE_BYTES,
    FakeLoader,
    fake_vector,
)
from engines.types import Event
from tests.testkit.servers import EMBED, eventually, fake_server

ONE_MODEL = WEIGHT_BYTES + WORKSPACE_BYTES


async def test_a_cold_model_is_loaded_once_for_all_requests() -> None:
    async with (
        fake_server() as server,
        openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as sdk,
    ):
        before = (await server.client.get("/v1/models/mini")).json()
        answers = await asyncio.gather(
            *(sdk.embeddings.create(model="text-embedding-3-small", input=[f"text {i}"]) for i in range(32))
        )
        after = (await server.client.get("/v1/models/mini")).json()

    assert (before["state"], before["dimensions"], before["memory_bytes"]) == ("cold", None, 0)
    assert (after["state"], after["dimensions"], after["memory_bytes"]) == ("ready", 16, ONE_MODEL)
    assert server.loader.loads == {"mini": 1}
    for i, answer in enumerate(answers):
        assert answer.model == "mini"
        assert np.array_equal(np.array(answer.data[0].embedding, np.float32), fake_vector("mini", f"text {i}"))
        assert answer.usage.prompt_tokens == 4


async def test_fields_mean_what_the_contract_says() -> None:
    async with fake_server() as server:
        query = await server.embed(input="x", input_type="query", dimensions=4)
        cut = await server.embed(input=["a", "a b c d e f", "b", "1 2 3 4"])
        ids = await server.embed(input=[[1, 2], [3]])

    assert query.json()["data"][0]["embedding"] == pytest.approx(fake_vector("mini", "find: x", 4).tolist(), rel=1e-6)
    assert cut.headers["x-embed-truncated"] == "1,3"
    assert cut.json()["usage"]["prompt_tokens"] == 3 + 5 + 3 + 5
    assert ids.json()["usage"]["prompt_tokens"] == 3


@pytest.mark.parametrize(
    ("model", "fields", "status", "code", "param"),
    [
        ("mini", {"dimensions": 5}, 400, "dimensions_not_supported", "dimensions"),
        ("mini", {"dimensions": 10**30}, 400, "dimensions_not_supported", "dimensions"),
        ("mini", {"input_type": "poem"}, 400, "prompt_not_found", "input_type"),
        ("mini", {"input": [99_999]}, 400, "invalid_token_id", "input"),
        ("org/other", {"input": "1 2 3 4 5 6"}, 400, "context_length_exceeded", "input"),
        ("gpu", {}, 503, "model_load_failed", None),
    ],
)
async def test_an_engines_refusal_reaches_the_client(
    model: str, fields: dict[str, object], status: int, code: str, param: str | None
) -> None:
    async with fake_server() as server:
        answer = await server.embed(model, **fields)

    assert (answer.status_code, answer.json()["error"]["code"], answer.json()["error"]["param"]) == (
        status,
        code,
        param,
    )
    assert ("x-should-retry" in answer.headers) == (model == "gpu")


async def test_one_model_is_evicted_for_another_and_the_stream_gives_the_reason() -> None:
    async with fake_server(budget_bytes=ONE_MODEL) as server, server.client.stream("GET", "/admin/events") as stream:
        lines = stream.aiter_lines()
        await anext(lines)
        first, second = await server.embed("mini"), await server.embed("org/other")
        events = [event async for event in until_ready(lines, "org/other")]
        slots = {slot["id"]: slot for slot in (await server.client.get("/admin/models")).json()["data"]}
        (device,) = (await server.client.get("/admin/memory")).json()["devices"]
    claimants = {event.claimant for event in events if event.model_id == "mini" and event.target == "unloading"}

    assert (first.status_code, second.status_code) == (200, 200)
    assert claimants == {"org/other"}
    assert (slots["mini"]["state"], slots["mini"]["evictions"]) == ("cold", 1)
    assert slots["org/other"]["state"] == "ready"
    assert device["residents"] == ["org/other"]
    assert (device["used_bytes"], device["workspace_bytes"], device["free_bytes"]) == (WEIGHT_BYTES, WORKSPACE_BYTES, 0)


async def test_an_operator_preloads_pins_and_evicts() -> None:
    async with fake_server() as server:
        server.workers.hold("load")
        accepted = await server.client.post("/admin/models/org/other/preload", json={"wait": False, "pin": True})
        plan = (await server.client.get("/admin/plan?model=mini")).json()
        server.workers.release("load")
        ready = await server.client.post("/admin/models/org/other/preload")
        pinned = await server.client.post("/admin/models/org/other/evict")
        forced = await server.client.post("/admin/models/org/other/evict", json={"force": True})
        again = await server.client.post("/admin/models/org/other/evict", json={"force": True})

    assert (accepted.status_code, accepted.json()["pinned"]) == (202, True)
    assert (plan["fits"], plan["need_bytes"], plan["evict"]) == (True, ONE_MODEL, [])
    assert (ready.status_code, ready.json()["state"], ready.json()["loads"]) == (200, "ready", 1)
    assert (pinned.status_code, pinned.json()["error"]["code"]) == (409, "model_pinned")
    assert pinned.headers["x-should-retry"] == "false"
    assert (forced.status_code, forced.json()["state"]) == (200, "cold")
    assert again.status_code == 200


async def test_a_model_in_use_is_not_evicted_at_the_timeout() -> None:
    async with fake_server(loader=FakeLoader(embed_s=0.4)) as server:
        running = asyncio.create_task(server.embed())
        await eventually(lambda: any(engine.running for engine in server.loader.engines))
        refused = await server.client.post("/admin/models/mini/evict", json={"timeout": 0.05})
        answer = await running

    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "model_in_use")
    assert "x-should-retry" not in refused.headers
    assert answer.status_code == 200


async def test_a_slow_load_is_waited_for_only_so_long_and_goes_on() -> None:
    async with fake_server(load_timeout_s=0.05) as server:
        server.workers.hold("load")
        impatient = await server.embed()
        server.workers.release("load")
        await server.client.post("/admin/models/mini/preload")
        answer = await server.embed()

    assert (impatient.status_code, impatient.json()["error"]["code"]) == (503, "model_loading")
    assert int(impatient.headers["retry-after-ms"]) > 0
    assert answer.status_code == 200
    assert server.loader.loads == {"mini": 1}


async def test_a_load_goes_on_after_its_client_has_left() -> None:
    async with fake_server() as server:
        server.workers.hold("load")
        with pytest.raises(httpx.ReadTimeout):
            await server.client.post(EMBED, json={"input": "a"}, timeout=0.4)
        await server.until(waiters=0)
        state_without_waiters = (await server.slot())["state"]
        server.workers.release("load")
        slot = await server.until(state="ready")

    assert state_without_waiters in ("waiting_space", "loading")
    assert (slot["loads"], slot["leases"]) == (1, 0)


async def test_a_client_that_leaves_a_running_call_gives_its_lease_back() -> None:
    async with fake_server(loader=FakeLoader(embed_s=30.0)) as server:
        with pytest.raises(httpx.ReadTimeout):
            await server.client.post(EMBED, json={"input": "a"}, timeout=0.4)
        await eventually(lambda: server.loader.engines[0].cancelled == 1)
        slot = await server.slot()

    assert slot["leases"] == 0


async def test_a_failed_load_fails_every_waiting_request() -> None:
    loader = FakeLoader(failures={"mini": [AccessDenied("the hub refuses: accept the licence of org/mini first")]})
    async with fake_server(loader=loader) as server:
        answers = await asyncio.gather(*(server.embed() for _ in range(5)))
        slot = await server.slot()

    for answer in answers:
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "model_load_failed")
        assert "accept the licence" in answer.json()["error"]["message"]
        assert answer.headers["x-should-retry"] == "false"
        assert int(answer.headers["retry-after"]) >= 1
    assert slot["state"] == "failed"
    assert slot["retry_at"] is not None


async def test_a_model_that_never_fits_is_refused_at_once() -> None:
    async with fake_server(budget_bytes=WEIGHT_BYTES // 2) as server:
        answer = await server.embed()

    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "model_too_large")
    assert answer.headers["x-should-retry"] == "false"


async def test_keep_alive_zero_frees_the_model_after_the_request() -> None:
    async with fake_server() as server:
        answer = await server.embed(keep_alive=0)
        await server.until(state="cold")

    assert answer.status_code == 200
    assert server.loader.engines[0].is_closed


async def test_the_end_of_the_server_frees_everything() -> None:
    async with fake_server() as server:
        await server.embed("mini")
        await server.embed("org/other")

    assert [engine.is_closed for engine in server.loader.engines] == [True, True]


async def until_ready(lines: AsyncIterator[str], model_id: str) -> AsyncIterator[Event]:
    async for line in lines:
        if line.startswith("data: "):
            event = msgspec.json.decode(line.removeprefix("data: "), type=Event)
            yield event
            if (event.model_id, event.target) == (model_id, "ready"):
                return
