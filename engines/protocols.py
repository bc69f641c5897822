"""Protocols that the pool depends on: `Engine`, `Files`, `Loader`; `engines/testing/fakes.py` implements fakes.

`Files` and `Loader` block and are called on threads; `Engine.run` and `Engine.warm_up` run on the event loop.
"""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

from msgspec import Struct

from engines.spec import ModelSpec
from engines.types import Call, ModelFiles, ModelInfo, Result

Clock = Callable[[], float]
"""Seconds from an arbitrary start, never going back (`time.monotonic`)."""

Progress = Callable[[int, int], None]
"""Called on the downloading thread with (bytes done, total bytes); may be called often and with repeated figures."""


class ModelParts(Struct, frozen=True, kw_only=True):
    """The bytes of a model's parts in the order of a pass: everything but the layers, then each layer. And those that
    its batches need on each device."""

    parts: tuple[int, ...]
    workspace_bytes: int


class Placement(Struct, frozen=True, kw_only=True):
    """Where the parts of a model go: so many consecutive ones to each device, the first to the model's own, and the
    last ones to main memory, from where each is copied to the last device for its turn."""

    devices: tuple[str, ...]
    num_parts: tuple[int, ...]
    num_host_parts: int = 0


class Engine(Protocol):
    """One model on one device. Call `warm_up` first; after it the byte figures are measured, not estimated."""

    @property
    def info(self) -> ModelInfo:
        """The model's widths, limits and prompts."""

    @property
    def weight_bytes(self) -> int:
        """Device memory that the engine holds until `close`."""

    @property
    def workspace_bytes(self) -> int:
        """Additional device memory that the largest forward pass needs."""

    @property
    def queue_items(self) -> int:
        """Texts admitted whose batch has not run yet."""

    async def warm_up(self) -> None:
        """Runs the model once: measures its memory and verifies its vectors.

        Raises:
            SelfCheckFailed: its vectors differ from those of the reference.
            OutOfMemory: the device ran out of memory.
        """

    async def run(self, call: Call) -> Result:
        """Answer one call. Cancelling drops what has not run yet.

        Raises:
            InvalidRequest, QueueFull, NonFiniteEmbedding, OutOfMemory, EngineFailed.
        """

    def park(self) -> int:
        """Moves what is on the device to main memory, and returns the bytes that it takes there.

        Blocks, so call it on a thread; no call may be running, and none may follow before `wake` and `resume`.

        Raises:
            EngineFailed: it cannot be parked. After any error only `close` may be called.
        """

    def wake(self) -> None:
        """Moves what `park` moved back to the device, and frees it in main memory. Blocks, so call it on a thread.

        Raises:
            OutOfMemory: the device ran out of memory. After any error only `close` may be called.
        """

    async def resume(self) -> None:
        """Checks a woken engine, which may be called again then.

        Raises:
            SelfCheckFailed: its vectors differ from those before it was parked.
        """

    def close(self) -> None:
        """Frees everything, device memory included. Blocks, so call it on a thread; no call may be running."""


class Files(Protocol):
    """Finds, downloads, verifies and deletes model files."""

    def locate(self, spec: ModelSpec) -> ModelFiles | None:
        """Returns the model's files if all of them are on disk, else None. Does not use the network."""

    def fetch(self, spec: ModelSpec, on_progress: Progress) -> ModelFiles:
        """Downloads the files and verifies them. Safe to call again after any failure.

        Raises:
            SourceError, BrokenFiles.
        """

    def is_current(self, spec: ModelSpec, files: ModelFiles) -> bool:
        """Tells whether the files are still those that `locate` or `fetch` returned. Cheap enough for every load."""

    def verify(self, spec: ModelSpec, files: ModelFiles, go_on: Callable[[], bool], *, is_anew: bool = False) -> None:
        """Hashes the files that were written since their last hash, or all files if `is_anew`.

        Returns early when `go_on` returns False; the next call continues there.

        Raises:
            BrokenFiles: a file is damaged.
            FilesChanged: a file was replaced after `locate` or `fetch` returned it.
        """

    def discard(self, spec: ModelSpec, file: str | None) -> bool:
        """Deletes a corrupt file (all files if None), so that the next `fetch` downloads it again.

        Returns False if the files may not be deleted: a local folder, an installed package.
        """

    def weight_bytes(self, spec: ModelSpec, device: str) -> int | None:
        """Computes the bytes of the weights on `device` in the spec's dtype, without downloading them.

        Reads the safetensors headers, by range requests if the files are not on disk; None if unknown.
        """


class Loader(Protocol):
    """Builds engines from model folders, on one device."""

    def load(self, spec: ModelSpec, files: ModelFiles) -> Engine:
        """Builds the engine; blocks. The caller holds the load lock: only one load runs in a process at a time.

        Raises:
            BadModel, OutOfMemory.
        """


@runtime_checkable
class SplitLoader(Loader, Protocol):
    """A loader that can also split a model over devices; models of other loaders are never split."""

    def parts(self, spec: ModelSpec, files: ModelFiles) -> ModelParts | None:
        """Measures the parts of a model from its config.json; None where it cannot be split. Blocks. The caller holds
        the load lock.

        Raises:
            BadModel.
        """

    def load_split(self, spec: ModelSpec, files: ModelFiles, placement: Placement) -> Engine:
        """Builds an engine whose layers are on several devices or in main memory; as `load`."""
