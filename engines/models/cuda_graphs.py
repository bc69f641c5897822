"""Captures passes over rows of a fixed size, from ids to vectors, as CUDA graphs, and replays each by one call.

A GPU runs a short text faster than Python can launch its kernels, layer by layer; a CUDA graph is launched at once. It
runs the same kernels on the same memory every time, so all that differs between two calls is kept in one tensor at a
fixed address: the tokens, and the places of the texts among them. Filler fills the rest of the row. Only those sizes
are kept whose replay is faster than the ordinary pass over the shortest row that they would be used for.
"""

import threading
import time
from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache, partial
from itertools import accumulate, cycle, pairwise
from statistics import median
from typing import Any, Protocol

import numpy as np
import structlog
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from engines.device.torch_runtime import finisher
from engines.inputs.tokenizer import Ids
from engines.layers.packing import LengthGroup, PackedLayout, WindowMasks, copy_to
from engines.models.base import Size, recording

_NUM_WARM_UPS = 2

_SYNC_OPERATIONS = {
    "_local_scalar_dense", "item", "is_nonzero", "nonzero", "nonzero_numpy", "masked_select", "equal", "allclose",
    "unique_dim", "_unique2", "unique_consecutive", "repeat_interleave.Tensor", "repeat_interleave.self_Tensor",
}  # fmt: skip
"""Operations for which the host must read tensor values."""

CAPTURING = threading.Lock()
"""Held during a capture: CUDA allows one at a time in a process, and no memory may be freed to a device meanwhile."""

Run = Callable[[], Tensor]


class GraphCapturer(Protocol):
    """Records passes so that they can be replayed."""

    def record(self, run: Run) -> Run:
        """Records a pass and returns its replay, which overwrites and returns the same tensor every time."""

    def seconds(self, run: Callable[[], object]) -> float:
        """Runs a pass and returns the seconds until the device has done it."""


class ForbidHostSync(TorchDispatchMode):  # type: ignore[no-untyped-call]  # untyped upstream
    """Makes operations raise, inside the block and on this thread, for which the host would read tensor values.

    The host would have to wait for the device.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # untyped upstream

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an operation.

        Raises:
            NotImplementedError: the host must read tensor values for it.
        """
        name = func.overloadpacket.__name__
        masks = args[1] if name in ("index", "index_put", "index_put_") else ()
        is_mask = any(mask is not None and mask.dtype == torch.bool for mask in masks)
        if is_mask or not _SYNC_OPERATIONS.isdisjoint((name, f"{name}.{func._overloadname}")):
            raise NotImplementedError(
                f"its forward pass reads tensor values on the host ({func}), which no CUDA graph can"
            )
        return func(*args, **(kwargs or {}))


class CudaGraphCapturer:
    """Records CUDA graphs, which share their working memory: one at a time may replay.

    Args:
        device: a GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, run: Run) -> Run:
        """See `GraphCapturer`.

        The pass runs a few times before, as kernels are chosen and loaded when first used. The last of these runs
        forbids reading tensor values, as a failed capture leaves more behind than a failed warm-up. Other threads may
        load models and run batches meanwhile: the capture is restricted to this thread.
        """
        with CAPTURING, torch.cuda.device(self._device):
            stream = _capture_stream(self._device)
            stream.wait_stream(torch.cuda.current_stream())
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.stream(stream):  # around the capture, too: a capture that fails leaves its stream current
                warm_up(run)
                with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
                    vectors = run()
            torch.cuda.current_stream().wait_stream(stream)
        return partial(_replay, graph, vectors)

    def seconds(self, run: Callable[[], object]) -> float:
        """See `GraphCapturer`."""
        return timed(run, finisher(self._device), time.perf_counter)


def capturer_for(device: torch.device) -> GraphCapturer | None:
    """Returns a capturer for a GPU; None for a CPU, which has no graphs and runs each operation at once."""
    return CudaGraphCapturer(device) if device.type == "cuda" else None


def warm_up(run: Run) -> None:
    """Runs a pass a few times.

    Raises:
        NotImplementedError: the pass cannot be recorded.
    """
    for _ in range(_NUM_WARM_UPS - 1):
        run()
    with ForbidHostSync():
        run()


def timed(run: Callable[[], object], finish: Callable[[], None], clock: Callable[[], float]) -> float:
    """Returns the seconds of a run from an idle device to an idle device."""
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
    """Returns the one capture stream of a device: cuBLAS keeps tens of megabytes for every stream that it has used."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # untyped upstream


log = structlog.get_logger(__name__)

_MAX_TEXTS = 64
"""Most texts of a row: attention processes every place for a text, also the empty ones."""

SIZES = tuple(Size(tokens, min(tokens // 2, _MAX_TEXTS)) for tokens in (32, 64, 128, 256, 512, 1024, 2048))

_TRIAL_TOKENS = 32
"""Tokens of each text with which a size is timed: no table of positions is as short."""

_NUM_TRIALS = 3

_SEGMENT_BYTES = 24 * 2**20
"""Allowance for torch's allocator, which takes 2 and 20 MiB at a time, a bit more than is needed."""


class FixedPackedLayout(PackedLayout):
    """The places of texts in a row of a fixed size, in tensors at fixed addresses.

    One more place after those for texts holds the rest of the row. Places without a text are empty for attention; for
    pooling they begin and end with the row's first token, so that nothing is read outside of the row. Their vectors are
    discarded.

    Args:
        size: of the row.
        filler: the token that fills the rest, all at position 0.
        device: of the tensors.

    Attributes:
        ids: int64 `[T]`, the tokens of the row.
    """

    def __init__(self, size: Size, filler: int, device: torch.device) -> None:
        self.masks = WindowMasks()
        self.num_tokens = self.longest = size.tokens
        self._filler = filler
        places = size.texts + 1
        widths = (size.tokens, size.tokens, size.tokens, places, places, places // 2 + 1)
        self._spans = [slice(*span) for span in pairwise(accumulate(widths, initial=0))]
        self._buffer = torch.zeros(sum(widths), dtype=torch.int64, device=device)
        self.ids, self.positions, self.segments, self.starts, self.ends, offsets = (
            self._buffer[span] for span in self._spans
        )
        self.offsets = offsets.view(torch.int32)[: places + 1]
        self.set_texts([np.array([filler], dtype=np.int64)])

    @cached_property
    def groups(self) -> tuple[LengthGroup, ...]:
        """Not available: the lengths differ from call to call."""
        raise NotImplementedError("its attention runs by text length, which differs between the rows of a CUDA graph")

    def set_texts(self, texts: Sequence[Ids]) -> None:
        """Replaces the texts of the row; they must fit."""
        values = np.zeros(len(self._buffer), dtype=np.int64)
        ids, positions, segments, starts, ends, last = (values[span] for span in self._spans)
        offsets = last.view(np.int32)[: len(starts) + 1]
        lengths = np.array([len(text) for text in texts], dtype=np.int64)
        num_texts, num_tokens = len(texts), int(lengths.sum())
        ids[:num_tokens], ids[num_tokens:] = np.concatenate(texts), self._filler
        ends[:num_texts], ends[num_texts:] = lengths.cumsum(), 1
        starts[:num_texts] = ends[:num_texts] - lengths
        segments[:num_tokens], segments[num_tokens:] = np.repeat(np.arange(num_texts), lengths), len(starts) - 1
        positions[:num_tokens] = np.arange(num_tokens) - np.repeat(starts[:num_texts], lengths)
        offsets[1 : num_texts + 1], offsets[num_texts + 1 :], offsets[-1] = ends[:num_texts], num_tokens, len(ids)
        copy_to(self._buffer, values)


class _Graph:
    """Replays the recorded pass over rows of one size."""

    def __init__(self, layout: FixedPackedLayout, replay: Run) -> None:
        self._layout = layout
        self._replay = replay

    def __call__(self, texts: Sequence[Ids]) -> Tensor:
        self._layout.set_texts(texts)
        return self._replay()[: len(texts)].clone()  # the next replay writes over it


class CudaGraphs:
    """Records the passes of one encoder, and replays them. The encoder must run nothing else while they are recorded.

    Args:
        run: the pass over a row of a fixed size: float32 vectors `[places, D]`.
        ordinary: the pass that the graphs replace: texts to vectors.
        filler: see `FixedPackedLayout`.
        device: of the encoder.
        recorder: records the passes.
    """

    def __init__(
        self,
        run: Callable[[FixedPackedLayout], Tensor],
        ordinary: Callable[[Sequence[Ids]], Tensor],
        filler: int,
        device: torch.device,
        recorder: GraphCapturer,
    ) -> None:
        self._lock = threading.Lock()  # a GPU has two threads, and both may have texts for one graph
        self._run, self._ordinary, self._filler, self._device, self._recorder = run, ordinary, filler, device, recorder
        self._graphs: dict[Size, _Graph] = {}
        self._recorded_tokens = 0

    def recorded(self) -> "CudaGraphs":
        """Records the sizes, up to the first that is not faster than the ordinary pass; returns itself."""
        with recording():
            for size in SIZES:
                graph = self._record(size)
                if not _is_faster(graph, self._ordinary, _shortest_row(size, self._filler), self._recorder):
                    break
                self._graphs[size] = graph
        log.info("model.graphs", sizes=[size.tokens for size in self.sizes])
        return self

    def add(self, size: Size) -> None:
        """Records one size, known to be faster than the ordinary pass and larger than those recorded before."""
        with recording():
            self._graphs[size] = self._record(size)

    def _record(self, size: Size) -> _Graph:
        layout = FixedPackedLayout(size, self._filler, self._device)
        graph = _Graph(layout, self._recorder.record(partial(self._run, layout)))
        self._recorded_tokens += size.tokens
        return graph

    @property
    def sizes(self) -> tuple[Size, ...]:
        """The recorded sizes that are faster than the ordinary pass, in ascending order."""
        return tuple(self._graphs)

    def full_rows(self, texts: Sequence[Ids]) -> list[tuple[Size, list[int]]]:
        """Returns for each size which of the texts fill its row, to check it with them (see `fill_row`).

        A size into which none of them fits is forgotten, as nobody would know whether its pass is right: those of a
        causal reranker are longer than the smallest rows, by their template.
        """
        rows = {size: fill_row(size, texts) for size in self.sizes}
        self._graphs = {size: graph for size, graph in self._graphs.items() if rows[size]}
        return [(size, found) for size, found in rows.items() if found]

    @property
    def kept_tokens(self) -> int:
        """Tokens whose memory is kept; a graph that was not faster has worked in the same memory as the others."""
        return self._recorded_tokens if self._graphs else 0

    def fitting(self, texts: Sequence[Ids]) -> Size | None:
        """Returns the smallest size for these texts; None where they are too long or too many."""
        num_tokens = sum(len(text) for text in texts)
        size = next((size for size in self._graphs if num_tokens <= size.tokens), None)
        return size if size is not None and len(texts) <= size.texts else None

    def __call__(self, texts: Sequence[Ids], size: Size) -> Tensor:
        """Returns the vectors `[n, D]` of texts that fit into a row of this size."""
        with self._lock:
            return self._graphs[size](texts)


def fill_row(size: Size, texts: Sequence[Ids]) -> list[int]:
    """Returns which of the texts, sorted by length, over and over, make the fullest row of a size; sorted again.

    None where all are longer than the row.
    """
    rows: list[int] = []
    left = size.tokens
    for row in cycle(reversed(range(len(texts)))):
        if len(rows) == size.texts or left < len(texts[0]):
            return sorted(rows)
        if len(texts[row]) <= left:
            rows.append(row)
            left -= len(texts[row])
    raise AssertionError("a cycle has no end")


def kept_bytes(tokens: int, token_bytes: int) -> int:
    """Returns an upper estimate of the memory that graphs keep: as though they shared none of it."""
    return tokens * token_bytes + _SEGMENT_BYTES if tokens else 0


def _is_faster(
    graph: _Graph, ordinary: Callable[[Sequence[Ids]], Tensor], texts: Sequence[Ids], recorder: GraphCapturer
) -> bool:
    """Compares the medians of rounds in which both run, after one that does not count."""
    rounds = [[recorder.seconds(partial(run, texts)) for run in (graph, ordinary)] for _ in range(1 + _NUM_TRIALS)]
    graph_s, ordinary_s = (median(pair[index] for pair in rounds[1:]) for index in (0, 1))
    return graph_s < ordinary_s


def _shortest_row(size: Size, filler: int) -> list[Ids]:
    """Returns texts, sorted by length, that make a row just too long for half the size."""
    whole, rest = divmod(size.tokens // 2 + 1, _TRIAL_TOKENS)
    lengths = [rest] * bool(rest) + [_TRIAL_TOKENS] * whole
    return [np.full(length, filler, dtype=np.int64) for length in lengths]
