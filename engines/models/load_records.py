"""Remembers what loads have proved of a model's files, so that later loads of the same files may serve before they
prove it again.

A record holds as long as the code and the libraries that compute vectors are the same, on the same kind of processor
(`environment`). The canary (`engines/models/self_check.py`) guards what no record can: the weights themselves.
"""

import threading
import time
from collections.abc import Iterable
from functools import cache, partial
from pathlib import Path
from typing import Any

import onnxruntime
import torch
import transformers
from msgspec import Struct

import engines
from engines.device.cpu_features import cpu_flags
from engines.models.observation import KnownObservation, Observed, observe
from engines.storage import JsonStore
from engines.types import fingerprint

MAX_RECORDS = 512
"""Records that are kept; the oldest makes room for a new one."""


class LoadRecord(Struct, frozen=True):
    """What one load proved. `at_s`: when, in Unix seconds.

    Args:
        path: the forward path whose every form gave the canary; empty in a record of an observation.
        observed: what an observed pass showed of the model that a config describes.
        names: of the stored tensors that the model was made of.
    """

    at_s: float
    path: str = ""
    observed: KnownObservation | None = None
    names: tuple[str, ...] = ()


class LoadRecords:
    """Keeps records between starts. Thread-safe; blocks on the disk.

    Args:
        folder: where; None keeps them in memory only.
    """

    def __init__(self, folder: Path | None) -> None:
        self._lock = threading.Lock()
        self._kept: JsonStore[LoadRecord] = JsonStore(
            folder / "loads.json" if folder else None, dict[str, LoadRecord], keep=_newest
        )

    def proved_path(self, key: str) -> str:
        """Returns the path that an earlier load of the same files proved right in every form; empty without one.

        It is read anew, as another process may have proved it, or taken it back.
        """
        with self._lock:
            self._kept.refresh()
            record = self._kept.get(_key("path", key))
        return "" if record is None else record.path

    def put_path(self, key: str, path: str) -> None:
        """Keeps the path that this load has proved right in every form; an empty one takes it back."""
        if path != self.proved_path(key):
            self._put(_key("path", key), LoadRecord(time.time(), path=path))

    def observation(self, key: str) -> KnownObservation | None:
        """Returns what was observed of the model of a config; None where nothing is known."""
        with self._lock:
            record = self._kept.get(_key("observed", key))
        return None if record is None else record.observed

    def put_observation(self, key: str, observed: KnownObservation) -> None:
        """Keeps what was observed."""
        self._put(_key("observed", key), LoadRecord(time.time(), observed=observed))

    def tensor_names(self, key: str) -> tuple[str, ...]:
        """Returns the stored tensors that a model was made of; none where no load is known."""
        with self._lock:
            record = self._kept.get(_key("tensors", key))
        return () if record is None else record.names

    def put_tensor_names(self, key: str, names: Iterable[str]) -> None:
        """Keeps the names of the stored tensors that a model was made of."""
        self._put(_key("tensors", key), LoadRecord(time.time(), names=tuple(sorted(names))))

    def _put(self, key: str, record: LoadRecord) -> None:
        with self._lock:
            self._kept.put(key, record)


class Observation:
    """What is known of how a model attends: from an earlier load, or from a pass that is run for it.

    Args:
        model: on its device.
        vocab_size, device: see `observe`.
        records: of earlier loads.
        key: what the observation depends on beside the environment; empty where no record may be used.

    Attributes:
        observed: without its calls where it is from a record.
    """

    def __init__(self, model: Any, vocab_size: int, device: torch.device, records: LoadRecords, key: str) -> None:
        self._run = partial(observe, model, vocab_size, device)
        self._records, self._key = records, key
        self._known = records.observation(key) if key else None
        self.observed: Observed = self._run() if self._known is None else self._known.observed()

    def why_not_packed(self, max_tokens: int) -> tuple[str, ...]:
        """See `Observed`; keeps the answer for later loads."""
        known = self._known.reasons if self._known is not None else {}
        if str(max_tokens) in known:
            return known[str(max_tokens)]
        observed = self.observed if self._known is None else self._run()
        reasons = observed.why_not_packed(max_tokens)
        if self._key and observed.width is not None:  # a pass that failed may have failed by chance
            self._records.put_observation(self._key, KnownObservation.of(observed, {**known, str(max_tokens): reasons}))
        return reasons


@cache
def environment() -> str:
    """Returns a digest of what computes vectors: this package's own code, its libraries, and the kind of processor."""
    files = sorted(Path(engines.__file__).parent.rglob("*.py"))
    stamps = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    libraries = (torch.__version__, transformers.__version__, onnxruntime.__version__)
    return fingerprint([*libraries, *sorted(cpu_flags()), *stamps])


def _key(kind: str, key: str) -> str:
    return fingerprint([kind, key, environment()])


def _newest(records: dict[str, LoadRecord]) -> dict[str, LoadRecord]:
    if len(records) <= MAX_RECORDS:
        return records
    return dict(sorted(records.items(), key=lambda item: item[1].at_s)[-MAX_RECORDS:])
