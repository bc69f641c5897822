"""Protocols that the pool depends on; tests put fakes in their place (`engines/testing/fakes.py`).

`Files` and `Loader` block and are called on threads; `Engine.embed` and `Engine.warm_up` run on the event loop.
"""

from collections.abc import Callable
from typing import Protocol

from engines.spec import ModelSpec
from engines.types import EmbedCall, Embeddings, ModelFiles, ModelInfo

Clock = Callable[[], float]
"""Seconds from an arbitrary start, never going back (`time.monotonic`)."""

Progress = Callable[[int, int], None]
"""Called from the fetching thread with (bytes done, bytes in all); perhaps often, and with the same figures again."""


class Engine(Protocol):
    """One model on one device. `warm_up` comes first; after it the byte figures are measured, not estimated."""

    @property
    def info(self) -> ModelInfo:
        """What the model is: widths, limits, prompts."""

    @property
    def weight_bytes(self) -> int:
        """Device memory that stays as long as the engine lives."""

    @property
    def workspace_bytes(self) -> int:
        """Device memory that one forward pass needs on top, at the most."""

    @property
    def queue_items(self) -> int:
        """Texts admitted and not yet run."""

    async def warm_up(self) -> None:
        """Run, measure and check the model once.

        Raises:
            SelfCheckFailed: its vectors are not those of the reference.
            OutOfMemory: the device could not run it.
        """

    async def embed(self, call: EmbedCall) -> Embeddings:
        """Texts in, vectors out. Cancelling drops what has not run yet.

        Raises:
            InvalidRequest, QueueFull, NonFiniteEmbedding, OutOfMemory, EngineFailed.
        """

    def close(self) -> None:
        """Free everything, device memory included; blocks, so call it on a thread. No call may be running."""


class Files(Protocol):
    """Where model files come from."""

    def locate(self, spec: ModelSpec) -> ModelFiles | None:
        """The model's files when they are whole on disk, without touching the network; None when they are not."""

    def fetch(self, spec: ModelSpec, on_progress: Progress) -> ModelFiles:
        """Bring the files to disk, verified. Safe to call again after any failure.

        Raises:
            SourceError, BrokenFiles.
        """

    def is_current(self, spec: ModelSpec, files: ModelFiles) -> bool:
        """Whether the files are still those that `locate` or `fetch` found. Cheap enough for every load."""

    def verify(self, spec: ModelSpec, files: ModelFiles, go_on: Callable[[], bool], *, is_anew: bool = False) -> None:
        """Hash what has not been hashed since it was written, or all of it when `is_anew`; returns early, and goes on
        in the next call, when `go_on` says no.

        Raises:
            BrokenFiles: a file is damaged.
            FilesChanged: a file was replaced since they were found.
        """

    def discard(self, spec: ModelSpec, file: str | None) -> bool:
        """Remove a corrupt file (or all, when None) so that the next `fetch` brings it anew.

        Returns False where nothing may be removed: a local folder, an installed package.
        """

    def weight_bytes(self, spec: ModelSpec, device: str) -> int | None:
        """Bytes of the weights on `device` in the spec's dtype, without downloading them.

        From the safetensors headers (by range requests where the files are not here); None when unknown.
        """


class Loader(Protocol):
    """Folder → engine on the loader's device."""

    def load(self, spec: ModelSpec, files: ModelFiles) -> Engine:
        """Build the engine; blocks. Only one load runs in a process at a time: the caller holds the load lock.

        Raises:
            BadModel, OutOfMemory.
        """
