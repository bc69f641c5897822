"""A host whose device fails as a GPU does: after a text with `POISON`, every call of its process on it raises."""

from collections.abc import Sequence

import torch

from engines.batching.batch import BatchLimits
from engines.batching.engine import EmbeddingEngine, EngineLimits, Parts
from engines.device.crash_journal import CrashJournal, JournaledLoader, JournaledScheduler
from engines.host import Host, HostConfig, HostRuntime
from engines.inputs.tokenizer import Ids, Tokenizer, TokenizerLimits
from engines.inputs.tokenizer_threads import TokenizerThreads
from engines.pool.estimates import Measurements
from engines.pool.runtime import LoopTime, Threads
from engines.spec import ModelSpec
from engines.testing.fakes import WORKSPACE_BYTES, FakeFiles, FakeMemory
from engines.types import ModelFiles, ModelInfo
from router.backends.worker_config import CrashNote, WorkerConfig
from tests.testkit.backends import RULES
from tests.testkit.encoders import WIDTH, Letters, ScriptedEncoder

POISON = "☢"


class FailingDevice:
    """Raises what torch raises of a device-side assert, from the first text with `POISON` on."""

    def __init__(self) -> None:
        self.is_lost = False

    def run(self, texts: Sequence[Ids]) -> None:
        """Called before each batch."""
        self.is_lost = self.is_lost or any(ord(POISON) in ids for ids in texts)
        if self.is_lost:
            raise torch.AcceleratorError(
                "CUDA error: device-side assert triggered\nCUDA kernel errors might be asynchronously reported at some "
                "other API call, so the stacktrace below might be incorrect.\nCompile with `TORCH_USE_CUDA_DSA`"
            )


class FailingDeviceLoader:
    """Loads engines onto one such device (`engines.protocols.Loader`)."""

    def __init__(self, scheduler: JournaledScheduler) -> None:
        self._scheduler = scheduler
        self._threads = TokenizerThreads(1)
        self._device = FailingDevice()

    def load(self, spec: ModelSpec, files: ModelFiles) -> EmbeddingEngine:
        info = ModelInfo(dimensions=WIDTH, max_tokens=64, dtype="float32", attention="packed")
        encoder = ScriptedEncoder()
        encoder.before = self._device.run
        tokenizer = Tokenizer(Letters(), TokenizerLimits(max_tokens=64, vocab_size=0x110000))
        return EmbeddingEngine(
            Parts(encoder, tokenizer, spec, info), self._scheduler, self._threads,
            EngineLimits(batch=BatchLimits(256, 64)), lambda: (info, 100, WORKSPACE_BYTES), lambda: None, 100,
        )  # fmt: skip


def open_failing_host(birth: WorkerConfig, note: CrashNote) -> Host:
    """See `WorkerConfig.open`."""
    config = HostConfig(host_id=birth.host_id, device="cuda:0", budget=birth.budget, rules=RULES)
    scheduler = JournaledScheduler(birth.host_id)
    scheduler.journal = CrashJournal(note)
    runtime = HostRuntime(
        time=LoopTime(),
        workers=Threads(birth.host_id),
        memory=FakeMemory(10**9),
        measurements=Measurements(),
        health=scheduler.health,
    )
    loader = JournaledLoader(FailingDeviceLoader(scheduler), scheduler)
    return Host(config, birth.specs, FakeFiles(), loader, runtime)
