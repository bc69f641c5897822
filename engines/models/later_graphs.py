"""Records the passes of an encoder again after its weights were moved, step by step, while no request runs.

The copy of a 0.6B model's weights takes some 20 ms, and recording its passes takes longer. So a model that comes back
answers by the ordinary pass, which its graphs replace and which rounds as they do, and its passes are recorded in the
idle time of the device (`engines/batching/rest_of_recording.py`), one size a step, so that a text waits for one size at
most. They are used once all are recorded and checked.

The sizes are those of the load, no others: their memory, which the model's measured bytes hold, stays charged all the
time, and they need not be timed again.
"""

from collections.abc import Callable

import structlog
import torch

from engines.errors import device_loss, is_out_of_memory
from engines.models.base import ForwardPath, Size
from engines.models.cuda_graphs import CudaGraphs
from engines.models.transformer import TransformerEncoder

log = structlog.get_logger(__name__)

MAX_ATTEMPTS = 3
"""A failed capture leaves some memory behind; after so many the model keeps its ordinary pass until it is loaded."""


class LaterGraphs:
    """The recorded passes of one encoder while they are not recorded.

    Args:
        encoder: on any path.
        check: raises `SelfCheckFailed` where the path in use does not give the vectors of the check at load.
    """

    def __init__(self, encoder: TransformerEncoder, check: Callable[[], None]) -> None:
        self._encoder = encoder
        self._check = check
        self._sizes: tuple[Size, ...] = ()
        self._graphs: CudaGraphs | None = None
        self._num_failures = 0

    @property
    def is_pending(self) -> bool:
        """Tells whether passes are still to be recorded and checked."""
        return bool(self._sizes)

    def drop(self) -> None:
        """Frees the recorded passes, which hold addresses of weights, and notes which there were. No pass may run."""
        self._graphs, self._num_failures = None, 0
        if self._encoder.path == "graphed":
            self._sizes = self._encoder.sizes
            self._encoder.switch_to(self._ordinary())

    @torch.inference_mode()
    def step(self) -> None:
        """Records one size; after the last, checks them all and has them used. No pass runs meanwhile.

        Where that fails, the encoder stays on its ordinary path.

        Raises:
            ForwardPathFailed: a pass runs, or the path has failed: call it later.
            Exception: the device has no memory now, or failed: call it later, while `is_pending`.
        """
        with self._encoder.passes.alone():
            try:
                self._step()
            except Exception as error:
                self._graphs = None
                if self._encoder.path == "graphed":
                    self._encoder.switch_to(self._ordinary())
                self._num_failures += 1
                is_passing = is_out_of_memory(error) or device_loss(error)
                if is_passing and self._num_failures < MAX_ATTEMPTS:
                    raise
                self._sizes = ()
                log.warning("model.graphs_not_recorded", path=self._encoder.path, reason=type(error).__name__)

    def _step(self) -> None:
        graphs = self._graphs = self._encoder.unrecorded() if self._graphs is None else self._graphs
        missing = [size for size in self._sizes if size not in graphs.sizes]
        if missing:
            graphs.add(missing[0])
            return
        self._encoder.switch_to("graphed", graphs)
        self._check()
        self._sizes, self._graphs = (), None
        log.info("model.graphs", sizes=[size.tokens for size in graphs.sizes])

    def _ordinary(self) -> ForwardPath:
        """Returns the path whose passes the graphs replace."""
        return "fused" if "fused" in self._encoder.candidate_paths() else "packed"
