"""Runs the offline engine as a worker: a host of `engines/machine.py` with pool, scheduler and engine, as served.

`own.py FOLDER [rerank | embed [DTYPE]]`; a call of a reranker is a query and then its documents.

Imports `engines` from the tree in PYTHONPATH: `bench-diff` runs this script on two trees.
"""

import asyncio
import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

import engines
from engines.host import Host
from engines.machine import Machine, MachineConfig
from engines.spec import ModelSpec

MODEL = "m"

# This is a script, so its own folder is on the path.
layouts: Any = importlib.import_module("layouts")
lines: Any = importlib.import_module("lines")

EmbedCall: Any = layouts.embed_call()


async def run(folder: str, task: str = "embed", dtype: Any = None) -> None:
    """Load the model, then answer questions until stdin ends."""
    say = lines.open_answers()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    config = MachineConfig(devices=("cpu",), cores=cores, tokenizer_threads=cores)
    spec = ModelSpec(model_id=MODEL, source=folder)
    machine = Machine(config, {MODEL: spec if dtype is None else msgspec.structs.replace(spec, dtype=dtype)})
    (host,) = machine.hosts
    await host.start()
    status = await host.preload(MODEL)
    assert status.info is not None, "a ready model has its facts"
    say({"ready": {
        "engines": str(Path(engines.__file__).parent.parent),
        "dimensions": status.info.dimensions, "attention": status.info.attention, "notes": status.info.notes,
    }})  # fmt: skip
    while line := await asyncio.to_thread(sys.stdin.readline):
        say(await answer(host, json.loads(line), _pairs if task == "rerank" else _call))
    await host.aclose()
    machine.close()


async def answer(host: Host, question: dict[str, Any], make_call: Callable[[list[str]], Any]) -> dict[str, Any]:
    """Answer one question: `time` runs the calls, `concurrency` at once (default 1); `vectors` embeds some texts."""
    run_call = layouts.run_of(host)
    if question["op"] == "vectors":
        embeddings = await run_call(make_call(question["texts"]))
        return {"vectors": embeddings.array().tolist()}
    waiting = iter([make_call(texts) for texts in question["calls"]])

    async def client() -> None:
        for call in waiting:
            await run_call(call)

    started, cpu = time.perf_counter(), time.process_time()
    await asyncio.gather(*(client() for _ in range(question.get("concurrency", 1))))
    return {"seconds": time.perf_counter() - started, "cpu_s": time.process_time() - cpu}


def _call(texts: list[str]) -> Any:
    return EmbedCall(model_id=MODEL, texts=tuple(texts))


def _pairs(texts: list[str]) -> Any:
    from engines.types import ScoreCall  # older trees have none, and are asked for vectors only

    return ScoreCall(model_id=MODEL, queries=(texts[0],), texts=tuple(texts[1:]))


if __name__ == "__main__":
    asyncio.run(run(*sys.argv[1:]))
