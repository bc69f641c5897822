"""Tests the batch calls of OpenAI's official clients, unmodified."""

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import pytest

from engines.testing.fakes import fake_vector
from tests.contract.conftest import KEY
from tests.testkit.batches import line

openai = pytest.importorskip("openai")
TEXTS = {f"id-{number}": f"text {number}" for number in range(20)}
UNFINISHED = ("validating", "in_progress", "finalizing", "cancelling")


def write_input(folder: Path) -> Path:
    path = folder / "corpus.jsonl"
    path.write_text("\n".join([*(line(name, text) for name, text in TEXTS.items()), "{", line("bad", "")]))
    return path


def test_openai_runs_a_batch_from_upload_to_deletion(url: str, tmp_path: Path) -> None:
    with openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0) as client:
        with write_input(tmp_path).open("rb") as opened:
            file = client.files.create(
                file=opened, purpose="batch", expires_after={"anchor": "created_at", "seconds": 3600}
            )
        assert (file.filename, file.purpose, file.expires_at - file.created_at) == ("corpus.jsonl", "batch", 3600)

        batch = client.batches.create(
            input_file_id=file.id, endpoint="/v1/embeddings", completion_window="24h", metadata={"job": "docs"}
        )
        while batch.status in UNFINISHED:
            time.sleep(0.01)
            batch = client.batches.retrieve(batch.id)

        assert (batch.status, batch.object, batch.metadata) == ("completed", "batch", {"job": "docs"})
        assert (batch.request_counts.total, batch.request_counts.completed, batch.request_counts.failed) == (22, 20, 2)
        rows = [json.loads(row) for row in client.files.content(batch.output_file_id).text.splitlines()]
        found = {row["custom_id"]: row["response"]["body"]["data"][0]["embedding"] for row in rows}
        assert found.keys() == TEXTS.keys() and len(rows) == len(TEXTS)
        for name, text in TEXTS.items():
            assert found[name] == pytest.approx(fake_vector("mini", text).tolist(), abs=1e-6)
        errors = [json.loads(row) for row in client.files.content(batch.error_file_id).text.splitlines()]
        assert errors[0]["error"]["code"] == "invalid_json"
        assert errors[1]["response"]["body"]["error"]["code"] == "empty_input"

        assert batch.id in [found.id for found in client.batches.list(limit=1)]
        assert {found.id for found in client.files.list(limit=1)} >= {file.id, batch.output_file_id}
        with pytest.raises(openai.ConflictError):
            client.batches.cancel(batch.id)
        assert client.files.delete(file.id).deleted
        with pytest.raises(openai.NotFoundError):
            client.files.retrieve(file.id)


async def test_openai_cancels_a_batch_from_a_coroutine(url: str) -> None:
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0) as client:
        content = "\n".join(line(f"id-{number}", f"text {number}") for number in range(3000)).encode()
        file = await client.files.create(file=("corpus.jsonl", content), purpose="batch")
        batch = await client.batches.create(input_file_id=file.id, endpoint="/v1/embeddings", completion_window="24h")
        cancelled = await client.batches.cancel(batch.id)
        assert cancelled.status in ("cancelling", "cancelled")
        async with asyncio.timeout(1.0):
            while cancelled.status in UNFINISHED:
                await asyncio.sleep(0.02)
                cancelled = await client.batches.retrieve(batch.id)

        done: list[Any] = []
        if cancelled.output_file_id is not None:
            done = (await client.files.content(cancelled.output_file_id)).text.splitlines()
        assert cancelled.status == "cancelled"
        assert len(done) == cancelled.request_counts.completed < 3000
