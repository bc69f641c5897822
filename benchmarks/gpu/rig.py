"""Loads and runs engines as the server does, on one device, and reads what the device holds."""

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from engines.batching.autotune import TuningStore
from engines.batching.engine import EmbeddingEngine
from engines.device.memory import anonymous_bytes
from engines.inputs.tokenizer_threads import TokenizerThreads
from engines.loading.loader import LoaderSettings, TorchLoader
from engines.machine import open_scheduler
from engines.models.transformer import TransformerEncoder
from engines.spec import ModelSpec
from engines.types import EmbedCall, ModelFiles, ScoreCall

MODEL = "m"

Result = TypeVar("Result")


def encoder_of(engine: EmbeddingEngine) -> TransformerEncoder:
    """Return what an engine runs."""
    assert engine._runner is not None, "the engine has not been closed"
    encoder = engine._runner._encoder
    assert isinstance(encoder, TransformerEncoder), "it has a transformer"
    return encoder


def has_graphs(engine: EmbeddingEngine) -> bool:
    """Whether some of its passes were recorded."""
    return bool(encoder_of(engine).sizes)


def forget_graphs(engine: EmbeddingEngine) -> None:
    """From now on it runs as it would without them. Nothing may run meanwhile."""
    encoder = encoder_of(engine)
    encoder.switch_to(next(path for path in encoder.candidate_paths() if path != "graphed"))


class Rig:
    """One device with a scheduler and a loader.

    Args:
        device: `cuda:0` or `cpu`.
        tunes: whether loads find the best size of batches, as a server's first load of a model does.
    """

    def __init__(self, device: str, *, tunes: bool = False) -> None:
        cores = os.cpu_count() or 1
        self.device = torch.device(device)
        self.lane = open_scheduler(device, cores)
        self.threads = TokenizerThreads(cores)
        settings = LoaderSettings(tuning_store=TuningStore(None) if tunes else None, copies_parked=True)
        self._loader = TorchLoader(device, self.lane, self.threads, settings)
        self._loop = asyncio.new_event_loop()

    @property
    def is_cuda(self) -> bool:
        """Whether the device is a GPU."""
        return self.device.type == "cuda"

    def load(self, folder: Path, **spec: Any) -> EmbeddingEngine:
        """Return a warm engine, its batch size found."""
        engine = self.build(folder, **spec)
        self.warm_up(engine)
        return engine

    def build(self, folder: Path, **spec: Any) -> EmbeddingEngine:
        """Return an engine that has read its weights and is not checked yet."""
        files = ModelFiles(path=str(folder), revision=folder.name, size_bytes=0)
        return self._loader.load(ModelSpec(**{"model_id": MODEL, "source": str(folder), **spec}), files)

    def warm_up(self, engine: EmbeddingEngine) -> None:
        """Check and measure an engine as a load does, and wait for the trials of batch sizes."""
        self.wait(engine.warm_up())
        while engine.is_tuning:
            time.sleep(0.01)  # trials run by themselves

    def embed(self, engine: EmbeddingEngine, texts: Sequence[str], **call: Any) -> Any:
        """Return the vectors of one call."""
        return self.embed_at_once(engine, [texts], **call)[0]

    def embed_at_once(self, engine: EmbeddingEngine, calls: Sequence[Sequence[str]], **call: Any) -> list[Any]:
        """Return the vectors of several calls that are under way at once."""

        async def run() -> list[Any]:
            return await asyncio.gather(*(engine.run(_call(texts, call)) for texts in calls))

        return [result.array() for result in self.wait(run())]

    def score(self, engine: EmbeddingEngine, query: str, texts: Sequence[str]) -> Any:
        """Return the logits of one query with each text, `[n]`."""
        call = ScoreCall(model_id=MODEL, queries=(query,), texts=tuple(texts), activation="none")
        result: Any = self.wait(engine.run(call))
        return result.array()[:, 0]

    def wait(self, work: Awaitable[Result]) -> Result:
        """Run something on the rig's event loop."""

        async def awaited() -> Result:
            return await work

        return self._loop.run_until_complete(awaited())

    def close(self) -> None:
        """End the threads."""
        self.lane.close()
        self.threads.close()
        self._loop.close()

    def synchronize(self) -> None:
        """Wait until the device has done its work."""
        if self.is_cuda:
            torch.cuda.synchronize(self.device)

    def held_bytes(self) -> int:
        """Return what torch's allocator has taken from a GPU; on a CPU, memory of this process that no file backs."""
        return torch.cuda.memory_reserved(self.device) if self.is_cuda else anonymous_bytes()


def embed_in_thread(engine: EmbeddingEngine, texts: Sequence[str]) -> Any:
    """Return the vectors of one call, by an event loop of its own: for threads beside the rig's."""
    return asyncio.run(engine.run(_call(texts, {}))).array()


def _call(texts: Sequence[str], call: dict[str, Any]) -> EmbedCall:
    return EmbedCall(model_id=MODEL, texts=tuple(texts), **call)


def timed(work: Callable[[], object]) -> float:
    """Return the seconds of a call."""
    started_s = time.perf_counter()
    work()
    return time.perf_counter() - started_s
