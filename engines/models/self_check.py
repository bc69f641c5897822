"""Checks one engine: at load, before a path that failed is used again, and after its weights were moved."""

from collections.abc import Callable

import numpy as np
import structlog
import torch
from numpy.typing import NDArray

from engines.errors import SelfCheckFailed, is_device_error, is_out_of_memory
from engines.models.base import ForwardPaths
from engines.models.load_records import LoadRecords
from engines.models.verification import (
    WOKEN_TOLERANCE,
    Canaries,
    ProbeTokenizer,
    check_forms,
    confirm_canary,
    distance,
    kind_of,
    probe_inputs,
    select_forward_path,
)
from engines.types import fingerprint

log = structlog.get_logger(__name__)

_PROVABLE = ("fused", "packed")
"""Paths whose forms may be checked after the first answer: all of them read the weights that the canary has read.
Copies of weights and recorded passes are made anew by every load."""


class SelfCheck:
    """The check of one engine: at load, and again before a path that failed is used again.

    Made before the encoder, whose `EncoderConfig.recheck` is `check_again`.

    Args:
        canaries: vectors of earlier loads.
        records: what earlier loads have proved; None for nothing.
        conditions: what the forms of a path depend on beside the model and the machine.

    Attributes:
        is_pending: whether the forms that an earlier load proved are still to be checked by `finish`.
        is_refuted: whether `finish` has found one that is wrong.
    """

    def __init__(self, canaries: Canaries, records: LoadRecords | None = None, conditions: str = "") -> None:
        self._canaries, self._records, self._conditions = canaries, records, conditions
        self._is_running = self.is_pending = self.is_refuted = False
        self._proof = ""
        self._passed: tuple[ProbeTokenizer, str, NDArray[np.float32]] | None = None

    def run(
        self, paths: ForwardPaths, tokenizer: ProbeTokenizer, dtype: str, key: str, written_s: float
    ) -> tuple[str, ...]:
        """Selects the path that will serve, and compares its vectors with the canary of `key`.

        Where an earlier load of the same files, code and machine has checked every form of that path, the canary is
        enough for now, and `finish` is to be called once the device is idle.

        Args:
            written_s: see `Canaries.compare`.

        Returns:
            What fell back and why.

        Raises:
            SelfCheckFailed, OutOfMemory: see `select_forward_path` and `Canaries.compare`.
        """
        self._proof = fingerprint([key, self._conditions])
        known = self._canaries.known(key)
        self._is_running = True
        try:
            vectors, notes = self._confirmed(paths, tokenizer, dtype, known), paths.notes
            self.is_pending = vectors is not None
            if vectors is None:
                vectors, notes = select_forward_path(paths, tokenizer, dtype, known)
        finally:
            self._is_running = False
        self._canaries.compare(key, vectors, dtype, written_s, kind_of(tokenizer))
        self._passed = tokenizer, dtype, vectors
        if self._records is not None and not self.is_pending:
            self._records.put_path(self._proof, paths.path if notes == paths.notes else "")
        return notes

    def _confirmed(
        self, paths: ForwardPaths, tokenizer: ProbeTokenizer, dtype: str, known: NDArray[np.float32] | None
    ) -> NDArray[np.float32] | None:
        """Returns the canary as the path gives it that an earlier load has proved; None where there is no such path."""
        path = "" if self._records is None else self._records.proved_path(self._proof)
        if known is None or path not in _PROVABLE or path != paths.candidate_paths()[0]:
            return None
        try:
            return confirm_canary(paths, tokenizer, dtype, known)
        except Exception as error:
            if is_device_error(error):
                raise
            log.warning("model.canary_not_confirmed", path=path, reason=str(error))
            return None

    def finish(self, paths: ForwardPaths) -> None:
        """Checks every form of the path in use, which an earlier load had proved; other passes may run meanwhile.

        Raises:
            SelfCheckFailed: one is wrong, or fails. The next load checks all of them before it serves.
            OutOfMemory: the device has no memory now; call it again.
        """
        try:
            self.check_again(paths)
        except Exception as error:
            if is_device_error(error) or is_out_of_memory(error):
                raise
            self.is_refuted, self.is_pending = True, False  # in this order: `RestOfCheck.has_passed`
            if self._records is not None:
                self._records.put_path(self._proof, "")
            if isinstance(error, SelfCheckFailed):
                raise
            raise SelfCheckFailed(f"{type(error).__name__} in a form of the {paths.path} path") from error
        self.is_pending = False

    def check_again(self, paths: ForwardPaths) -> None:
        """Compares the path in use with the vectors of the check at load.

        Raises:
            SelfCheckFailed: it does not give them.
            NotImplementedError: the check at load has not passed.
        """
        if self._passed is None:
            raise NotImplementedError("a path that was not checked at load has nothing to be compared with")
        check_forms(paths, *self._passed)

    def check_woken(self, paths: ForwardPaths) -> None:
        """Compares the path in use, after its weights were moved, with the vectors of the check at load.

        It runs the probes once, as at load, so that little more than the order of sums may differ; where passes were
        recorded again, each of these is checked too.

        Raises:
            SelfCheckFailed: its vectors are others.
        """
        assert self._passed is not None, "an engine that was parked has passed its check"
        tokenizer, dtype, vectors = self._passed
        form = next(iter(paths.forms(probe_inputs(tokenizer, paths.window))))
        expected = torch.from_numpy(vectors)[list(form.rows)]
        far = distance(form.vectors.cpu(), expected, kind_of(tokenizer))
        if not far <= WOKEN_TOLERANCE[dtype]:
            raise SelfCheckFailed(
                f"after waking, vectors are {far:.1e} from those before, more than {WOKEN_TOLERANCE[dtype]:.0e}"
            )
        if paths.path == "graphed":
            self.check_again(paths)

    def while_running(self, preemption_point: Callable[[], None]) -> Callable[[], None]:
        """Returns a function that calls `preemption_point` during the check at load, and else does nothing."""
        return lambda: preemption_point() if self._is_running else None
