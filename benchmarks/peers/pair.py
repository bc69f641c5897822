"""Runs two models on one device scheduler as a worker, and measures their shares of its time.

`pair.py FOLDER FOLDER`. Loader and scheduler are those of the server.
"""

import asyncio
import importlib
import itertools
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engines.batching.engine import EmbeddingEngine
from engines.device.scheduler import DeviceScheduler
from engines.inputs.tokenizer_threads import TokenizerThreads
from engines.loading.loader import LoaderSettings, TorchLoader
from engines.machine import open_scheduler
from engines.spec import ModelSpec
from engines.types import EmbedCall, ModelFiles

lines: Any = importlib.import_module("lines")  # a script: its own folder is on the path


async def use(
    scheduler: DeviceScheduler,
    engines: Sequence[EmbeddingEngine],
    calls: Sequence[EmbedCall],
    clients: int,
    seconds: float,
) -> dict[str, Any]:
    """Run `clients` clients per engine for `seconds`; return texts a second and device seconds by engine."""
    before = [scheduler.seconds_of(engine) for engine in engines]
    done = [0] * len(engines)
    started = time.perf_counter()

    async def client(at: int) -> None:
        for call in itertools.cycle(calls):
            if time.perf_counter() - started >= seconds:
                return
            await engines[at].run(call)
            done[at] += len(call.texts)

    await asyncio.gather(*(client(at) for at in range(len(engines)) for _ in range(clients)))
    spent = time.perf_counter() - started
    return {
        "texts_per_s": [number / spent for number in done],
        "device_s": [scheduler.seconds_of(engine) - start for engine, start in zip(engines, before, strict=True)],
    }


async def run(folders: Sequence[str]) -> None:
    """Load both models, then answer questions: `{"engines": [0, 1], "calls": …, "clients": …, "seconds": …}`."""
    say = lines.open_answers()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    scheduler, threads = open_scheduler("cpu", cores), TokenizerThreads(cores)
    loader = TorchLoader("cpu", scheduler, threads, LoaderSettings())
    engines = []
    for number, folder in enumerate(folders):
        spec = ModelSpec(model_id=str(number), source=folder)
        engines.append(loader.load(spec, ModelFiles(path=folder, revision=Path(folder).name, size_bytes=0)))
        await engines[-1].warm_up()
    say({"ready": {"attention": [engine.info.attention for engine in engines]}})
    while line := await asyncio.to_thread(sys.stdin.readline):
        question = lines.json.loads(line)
        calls = [EmbedCall(model_id="m", texts=tuple(texts)) for texts in question["calls"]]
        chosen = [engines[at] for at in question["engines"]]
        say(await use(scheduler, chosen, calls, question["clients"], question["seconds"]))
    for engine in engines:
        await asyncio.to_thread(engine.close)
    scheduler.close()
    threads.close()


if __name__ == "__main__":
    asyncio.run(run(sys.argv[1:]))
