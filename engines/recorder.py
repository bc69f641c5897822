"""Records passes as CUDA graphs: what ran once runs again by one call, on what its tensors hold by then.

A capture must not meet a pass outside of inference mode: torch keeps tensors of its own from the first one to the next.
"""

import threading
import time
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from engines.tuning import finisher

_NUM_WARM_UPS = 2

_LOOKS = {
    "_local_scalar_dense", "item", "is_nonzero", "nonzero", "nonzero_numpy", "masked_select", "equal", "allclose",
    "unique_dim", "_unique2", "unique_consecutive", "repeat_interleave.Tensor", "repeat_interleave.self_Tensor",
}  # fmt: skip
"""What cannot be done without knowing what a tensor holds."""

CAPTURING = threading.Lock()
"""Held during a capture: CUDA has one at a time in a process, and memory must not go back to a device meanwhile."""

Run = Callable[[], Tensor]


class Recorder(Protocol):
    """Runs something once and can run it again."""

    def record(self, run: Run) -> Run:
        """What runs it again. The tensor that it gives is the same one every time, and written over."""

    def seconds(self, run: Callable[[], object]) -> float:
        """How long it takes until the device has done it."""


class Unwatched(TorchDispatchMode):  # type: ignore[no-untyped-call]  # untyped upstream
    """Inside, on this thread, the host may not look at what a tensor holds: it would have to wait for the device."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # untyped upstream

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Any operation.

        Raises:
            NotImplementedError: it looks.
        """
        name = func.overloadpacket.__name__
        masks = args[1] if name in ("index", "index_put", "index_put_") else ()
        is_mask = any(mask is not None and mask.dtype == torch.bool for mask in masks)
        if is_mask or not _LOOKS.isdisjoint((name, f"{name}.{func._overloadname}")):
            raise NotImplementedError(f"its forward pass looks at what a tensor holds ({func}), which no recording can")
        return func(*args, **(kwargs or {}))


class CudaRecorder:
    """Records CUDA graphs, which share the memory that they work in: one at a time replays.

    Args:
        device: a GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, run: Run) -> Run:
        """See `Recorder`. Before it is captured it runs a few times, as kernels are chosen and loaded when first used;
        at the last time it may not look at tensors, as a capture that fails leaves more behind than a warm-up.

        Other threads go on loading models and running batches: only what this one does must fit into a graph.
        """
        with CAPTURING, torch.cuda.device(self._device):
            stream = _capture_stream(self._device)
            stream.wait_stream(torch.cuda.current_stream())
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.stream(stream):  # around the capture, too: where that fails, it stays on its stream
                warm_up(run)
                with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
                    vectors = run()
            torch.cuda.current_stream().wait_stream(stream)
        return partial(_replay, graph, vectors)

    def seconds(self, run: Callable[[], object]) -> float:
        """See `Recorder`."""
        return timed(run, finisher(self._device), time.perf_counter)


def recorder_for(device: torch.device) -> Recorder | None:
    """What records passes on a device; a CPU has no such thing, and does what it is told at once."""
    return CudaRecorder(device) if device.type == "cuda" else None


def warm_up(run: Run) -> None:
    """Run it a few times.

    Raises:
        NotImplementedError: it cannot be recorded.
    """
    for _ in range(_NUM_WARM_UPS - 1):
        run()
    with Unwatched():
        run()


def timed(run: Callable[[], object], finish: Callable[[], None], clock: Callable[[], float]) -> float:
    """Seconds from an idle device to an idle device."""
    finish()
    begun_s = clock()
    run()
    finish()
    return clock() - begun_s


def _replay(graph: torch.cuda.CUDAGraph, vectors: Tensor) -> Tensor:
    graph.replay()
    return vectors


@lru_cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One for each device, as cuBLAS keeps tens of megabytes for every stream that it has worked on."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # untyped upstream
