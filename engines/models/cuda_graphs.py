"""Passes over rows of a fixed size, from ids to vectors, each recorded once and from then on replayed by one call.

A GPU runs a short text faster than Python can tell it what to do, layer by layer; a CUDA graph is told at once. It runs
the same kernels on the same memory every time, so whatever differs between two calls lies in one tensor that stays
where it is: the tokens, and where the texts are among them. The rest of the row is a text that nobody asked for. Only
those sizes are kept whose replay is faster than the shortest row that they would take from the ordinary pass.
"""

import threading
import time
from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache, partial
from itertools import accumulate, pairwise
from statistics import median
from typing import Any, Protocol

import numpy as np
import structlog
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from engines.device.torch_runtime import finisher
from engines.inputs.tokenizer import Ids
from engines.layers.packing import LengthGroup, PackedLayout, copy_to
from engines.models.base import Size

_NUM_WARM_UPS = 2


_LOOKS = {
    "_local_scalar_dense", "item", "is_nonzero", "nonzero", "nonzero_numpy", "masked_select", "equal", "allclose",
    "unique_dim", "_unique2", "unique_consecutive", "repeat_interleave.Tensor", "repeat_interleave.self_Tensor",
}  # fmt: skip
"""What cannot be done without knowing what a tensor holds."""


CAPTURING = threading.Lock()
"""Held during a capture: CUDA has one at a time in a process, and memory must not go back to a device meanwhile."""


Run = Callable[[], Tensor]


class GraphCapturer(Protocol):
    """Runs something once and can run it again."""

    def record(self, run: Run) -> Run:
        """What runs it again. The tensor that it gives is the same one every time, and written over."""

    def seconds(self, run: Callable[[], object]) -> float:
        """How long it takes until the device has done it."""


class ForbidHostSync(TorchDispatchMode):  # type: ignore[no-untyped-call]  # untyped upstream
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


class CudaGraphCapturer:
    """Records CUDA graphs, which share the memory that they work in: one at a time replays.

    Args:
        device: a GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, run: Run) -> Run:
        """See `GraphCapturer`. It runs a few times before, as kernels are chosen and loaded when first used;
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
        """See `GraphCapturer`."""
        return timed(run, finisher(self._device), time.perf_counter)


def capturer_for(device: torch.device) -> GraphCapturer | None:
    """What records passes on a device; a CPU has no such thing, and does what it is told at once."""
    return CudaGraphCapturer(device) if device.type == "cuda" else None


def warm_up(run: Run) -> None:
    """Run it a few times.

    Raises:
        NotImplementedError: it cannot be recorded.
    """
    for _ in range(_NUM_WARM_UPS - 1):
        run()
    with ForbidHostSync():
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


log = structlog.get_logger(__name__)


_MOST_TEXTS = 64
"""Attention looks into every place for a text, also into those that are empty."""


SIZES = tuple(Size(tokens, min(tokens // 2, _MOST_TEXTS)) for tokens in (32, 64, 128, 256, 512, 1024, 2048))


_TRIAL_TOKENS = 32
"""Of each text with which a size is timed: no table of positions is as short."""


_NUM_TRIALS = 3


_SEGMENT_BYTES = 24 * 2**20
"""What torch's allocator takes at a time, 2 and 20 MiB, is a bit more than is needed."""


class FixedPackedLayout(PackedLayout):
    """Where texts lie in a row of a fixed size, in tensors that stay where they are.

    Behind the places for texts is one more, to which the rest of the row belongs. Places without a text are empty for
    attention; for pooling they begin and end with the row's first token, so that nothing is read outside of the row.
    Their vectors are nobody's.

    Args:
        size: of the row.
        filler: the token of which the rest is made, all at position 0.
        device: where the tensors live.

    Attributes:
        ids: int64 `[T]`, the row.
    """

    def __init__(self, size: Size, filler: int, device: torch.device) -> None:
        self.num_tokens = self.longest = size.tokens
        self._filler = filler
        places = size.texts + 1
        widths = (size.tokens, size.tokens, size.tokens, places, places, places // 2 + 1)
        self._spans = [slice(*span) for span in pairwise(accumulate(widths, initial=0))]
        self._held = torch.zeros(sum(widths), dtype=torch.int64, device=device)
        self.ids, self.positions, self.segments, self.starts, self.ends, offsets = (
            self._held[span] for span in self._spans
        )
        self.offsets = offsets.view(torch.int32)[: places + 1]
        self.put([np.array([filler], dtype=np.int64)])

    @cached_property
    def groups(self) -> tuple[LengthGroup, ...]:
        """There are none: which lengths there are, differs from call to call."""
        raise NotImplementedError("its attention runs by length, which a row of a fixed size cannot")

    def put(self, texts: Sequence[Ids]) -> None:
        """From now on these are the texts, which fit."""
        held = np.zeros(len(self._held), dtype=np.int64)
        ids, positions, segments, starts, ends, last = (held[span] for span in self._spans)
        offsets = last.view(np.int32)[: len(starts) + 1]
        lengths = np.array([len(text) for text in texts], dtype=np.int64)
        num_texts, num_tokens = len(texts), int(lengths.sum())
        ids[:num_tokens], ids[num_tokens:] = np.concatenate(texts), self._filler
        ends[:num_texts], ends[num_texts:] = lengths.cumsum(), 1
        starts[:num_texts] = ends[:num_texts] - lengths
        segments[:num_tokens], segments[num_tokens:] = np.repeat(np.arange(num_texts), lengths), len(starts) - 1
        positions[:num_tokens] = np.arange(num_tokens) - np.repeat(starts[:num_texts], lengths)
        offsets[1 : num_texts + 1], offsets[num_texts + 1 :], offsets[-1] = ends[:num_texts], num_tokens, len(ids)
        copy_to(self._held, held)


class _Graph:
    """The recorded pass over rows of one size."""

    def __init__(self, layout: FixedPackedLayout, replay: Run) -> None:
        self._layout = layout
        self._replay = replay

    def __call__(self, texts: Sequence[Ids]) -> Tensor:
        self._layout.put(texts)
        return self._replay()[: len(texts)].clone()  # the next replay writes over it


class CudaGraphs:
    """The recorded passes of one encoder. Making them takes a while, in which the encoder must do nothing else.

    Args:
        run: the pass over a row of a fixed size: float32 vectors `[places, D]`.
        ordinary: the pass that they save: texts to vectors.
        filler: see `FixedPackedLayout`.
        device: where it runs.
        recorder: records it.
    """

    def __init__(
        self,
        run: Callable[[FixedPackedLayout], Tensor],
        ordinary: Callable[[Sequence[Ids]], Tensor],
        filler: int,
        device: torch.device,
        recorder: GraphCapturer,
    ) -> None:
        self._lock = threading.Lock()  # a device's lane has two threads, and both may have texts for one graph
        self._graphs: dict[Size, _Graph] = {}
        self._recorded_tokens = 0
        for size in SIZES:
            layout = FixedPackedLayout(size, filler, device)
            graph = _Graph(layout, recorder.record(partial(run, layout)))
            self._recorded_tokens += size.tokens
            if not _is_faster(graph, ordinary, _shortest(size, filler), recorder):
                break
            self._graphs[size] = graph
        log.info("model.graphs", sizes=[size.tokens for size in self.sizes])

    @property
    def sizes(self) -> tuple[Size, ...]:
        """The sizes that are worth it, upwards."""
        return tuple(self._graphs)

    @property
    def kept_tokens(self) -> int:
        """Tokens whose memory is kept; the graph that was not worth it has worked in the same memory as the others."""
        return self._recorded_tokens if self._graphs else 0

    def fitting(self, texts: Sequence[Ids]) -> Size | None:
        """The size for these texts; None where they are too long or too many."""
        num_tokens = sum(len(text) for text in texts)
        size = next((size for size in self._graphs if num_tokens <= size.tokens), None)
        return size if size is not None and len(texts) <= size.texts else None

    def __call__(self, texts: Sequence[Ids], size: Size) -> Tensor:
        """Vectors `[n, D]` of texts that fit into rows of this size."""
        with self._lock:
            return self._graphs[size](texts)


def kept_bytes(tokens: int, token_bytes: int) -> int:
    """Memory that graphs keep, an upper estimate: as though none worked in the memory of another."""
    return tokens * token_bytes + _SEGMENT_BYTES if tokens else 0


def _is_faster(
    graph: _Graph, ordinary: Callable[[Sequence[Ids]], Tensor], texts: Sequence[Ids], recorder: GraphCapturer
) -> bool:
    """By the medians of rounds in which both run, after one that does not count."""
    rounds = [[recorder.seconds(partial(run, texts)) for run in (graph, ordinary)] for _ in range(1 + _NUM_TRIALS)]
    graph_s, ordinary_s = (median(pair[place] for pair in rounds[1:]) for place in (0, 1))
    return graph_s < ordinary_s


def _shortest(size: Size, filler: int) -> list[Ids]:
    """Texts, sorted by length, that make a row just too long for half the size."""
    whole, rest = divmod(size.tokens // 2 + 1, _TRIAL_TOKENS)
    lengths = [rest] * bool(rest) + [_TRIAL_TOKENS] * whole
    return [np.full(length, filler, dtype=np.int64) for length in lengths]
