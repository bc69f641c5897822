"""Runs the encoder of our engine as a worker, without tokenizer, queue, pool and server: `forward.py FOLDER`.

The question `forward` has texts; each is tokenized first and then run alone, on a device thread that may use every
core, as in a server that is otherwise idle. The answer has the seconds of each forward pass.
"""

import asyncio
import importlib
import json
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

from engines.batching.engine import EmbeddingEngine
from engines.inputs.prompts import PromptTemplate
from engines.inputs.tokenizer_threads import TokenizerThreads
from engines.loading.loader import LoaderSettings, TorchLoader
from engines.machine import open_scheduler
from engines.spec import ModelSpec
from engines.types import ModelFiles

lines: Any = importlib.import_module("lines")  # this is a script, so its own folder is on the path


def seconds_of(engine: EmbeddingEngine, texts: Sequence[str]) -> list[float]:
    """Return the seconds of the forward pass of each text; called on a device thread."""
    encoder, spent = engine._runner._encoder, []  # type: ignore[union-attr]  # it is loaded
    for ids in engine._tokenizer.encode(texts, PromptTemplate(), "end").ids:
        began_s = time.perf_counter()
        encoder([ids])
        spent.append(time.perf_counter() - began_s)
    return spent


async def run(folder: str) -> None:
    """Load the model, then answer questions until stdin ends."""
    say = lines.open_answers()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    scheduler, threads = open_scheduler("cpu", cores), TokenizerThreads(1)
    loader = TorchLoader("cpu", scheduler, threads, LoaderSettings())
    files = ModelFiles(path=folder, revision="r1", size_bytes=0)
    engine = await asyncio.to_thread(loader.load, ModelSpec(model_id="m", source=folder), files)
    await engine.warm_up()
    say({"ready": {"path": engine.info.path, "threads": cores}})
    while line := await asyncio.to_thread(sys.stdin.readline):
        texts = json.loads(line)["texts"]
        say({"seconds": await scheduler.call(lambda texts=texts: seconds_of(engine, texts))})  # type: ignore[misc]
    scheduler.close()
    threads.close()


if __name__ == "__main__":
    asyncio.run(run(*sys.argv[1:]))
