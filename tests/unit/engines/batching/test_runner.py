"""Tests that a batch that does not fit runs in smaller ones, for a while, after the first one's tensors are freed."""

import asyncio
import gc
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import cast

import numpy as np
import pytest
import torch
from torch import Tensor

from engines.batching.batch import BatchLimits
from engines.batching.output import DenseOutput
from engines.batching.request import Entry, PendingRequest, RowTarget
from engines.batching.runner import Runner
from engines.errors import DeviceDown, EngineFailed, OutOfMemory
from engines.inputs.tokenizer import Ids, TokenizedRequest
from engines.models.base import Encoder
from tests.testkit.clocks import FakeClock

ALLOCATORS = {
    "torch": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "torch on a CPU": RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory"),
    "Python": MemoryError(),
    "ONNX Runtime": RuntimeError("[ONNXRuntimeError] : 1 : FAIL : Failed to allocate memory for requested buffer"),
    "the C++ library": RuntimeError("std::bad_alloc"),
    "cuBLAS": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "CUDA": RuntimeError("CUDA error: out of memory"),
}


class Encoding:
    """An encoder with memory for `room` tokens. Its pass holds a tensor while it runs."""

    attention = path = "packed"
    fallback = ""
    part_tokens = 1

    def __init__(self, room: int, error: Exception) -> None:
        self.room = room
        self.batches: list[int] = []
        self.held: list[weakref.ref[Tensor]] = []
        self.num_alive: list[int] = []
        self._error = error

    def __call__(self, texts: Sequence[Ids], prompt_tokens: Sequence[int] | None = None) -> Tensor:
        self.num_alive.append(sum(ref() is not None for ref in self.held))
        activations = torch.ones(3)
        self.held.append(weakref.ref(activations))
        self.batches.append(sum(len(ids) for ids in texts))
        if self.batches[-1] > self.room:
            raise type(self._error)(*self._error.args)
        return torch.ones(len(texts), 4)


@pytest.fixture(autouse=True)
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    """Return the jobs' event loop; nothing runs on it."""
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    yield loop
    asyncio.set_event_loop(None)
    loop.close()


def _texts(*lengths: int) -> list[Entry]:
    return [_text(length) for length in lengths]


def _text(length: int) -> Entry:
    ids = np.ones(length, dtype=np.int64)
    job = PendingRequest(TokenizedRequest((ids,)), DenseOutput(4, False, False), asyncio.get_event_loop(), 0.0)
    return Entry(ids, job.keys[0], [RowTarget(job, 0)])


def _runner(encoder: Encoding, clock: Callable[[], float] = time.monotonic) -> Runner:
    return Runner(cast(Encoder, encoder), clock=clock)


@pytest.mark.parametrize("error", ALLOCATORS.values(), ids=list(ALLOCATORS))
def test_whichever_allocator_refuses_the_batch_runs_in_halves(error: Exception) -> None:
    encoder = Encoding(4, error)

    failures = _runner(encoder).run(_texts(4, 4))

    assert failures == {}
    assert encoder.batches == [8, 4, 4]


def test_an_error_of_another_kind_is_none_of_memory() -> None:
    encoder = Encoding(4, RuntimeError("a kernel failed"))

    failures = _runner(encoder).run(_texts(4, 4))

    assert {type(error) for error in failures.values()} == {EngineFailed}
    assert encoder.batches == [8]


def test_a_device_that_fails_is_told_to_callers_and_reported() -> None:
    error = torch.AcceleratorError("CUDA error: an illegal memory access was encountered\nat /secret/path")
    texts, reported = _texts(4, 4), list[Exception]()
    runner = Runner(cast(Encoder, Encoding(0, error)), report_error=reported.append)

    failures = runner.run(texts)

    assert [type(failure) for failure in failures.values()] == [DeviceDown, DeviceDown]
    assert {str(failure) for failure in failures.values()} == {
        "the device failed during the forward pass (illegal memory access); send the request again"
    }
    assert [type(one) for one in reported] == [torch.AcceleratorError]


def test_the_halves_run_after_the_tensors_of_the_whole_are_gone() -> None:
    encoder = Encoding(2, torch.OutOfMemoryError("no room"))

    gc.disable()
    try:
        _runner(encoder).run(_texts(2, 2, 2, 2))
    finally:
        gc.enable()

    assert encoder.num_alive == [0] * 7


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no room"), RuntimeError("a kernel failed")])
def test_a_reported_error_holds_no_tensors(error: Exception) -> None:
    encoder = Encoding(2, error)

    gc.disable()
    try:
        failures = _runner(encoder).run(_texts(3))
    finally:
        gc.enable()

    assert len(failures) == 1
    assert [ref() for ref in encoder.held] == [None]


def test_a_text_that_never_fits_is_refused() -> None:
    failures = _runner(Encoding(2, MemoryError())).run(_texts(3))

    (error,) = failures.values()
    assert isinstance(error, OutOfMemory)
    assert "3 tokens" in str(error)


def test_the_limit_grows_back_with_time() -> None:
    clock = FakeClock()
    runner = _runner(Encoding(100, MemoryError()), clock)
    wish = BatchLimits(400, 64)

    before = runner.bound(wish).max_tokens
    runner.run(_texts(*[50] * 8))
    limits = []
    for _ in range(4):
        limits.append(runner.bound(wish).max_tokens)
        clock.advance(30)

    assert before == 400
    assert limits == [100, 200, 400, 400]


def test_a_limit_that_is_met_again_soon_is_tried_less_and_less_often() -> None:
    clock = FakeClock()
    encoder = Encoding(100, MemoryError())
    runner = _runner(encoder, clock)
    num_refused = 0
    for _ in range(3600):
        tokens = runner.bound(BatchLimits(400, 64)).max_tokens
        before = len(encoder.batches)
        assert runner.run(_texts(*[10] * (tokens // 10))) == {}
        num_refused += len(encoder.batches) - before > 1
        clock.advance(1)

    assert 3 <= num_refused <= 10
