"""Everything that can go wrong below the HTTP edge. Knows no status codes: `router/errors.py` maps each class once.

EngineError
├── InvalidRequest (param)                the caller's fault; asking again does not help
│   ├── InvalidValue
│   ├── ContextLengthExceeded
│   ├── DimensionsNotSupported
│   ├── PromptNotFound
│   └── InvalidTokenId
├── ModelNotFound                         no such model on this host
├── HostNotFound                          no such host
├── Busy (retry_after_s)                  the caller may ask again
│   └── QueueFull
├── Unavailable (retry_after_s)           the server cannot now
│   ├── ModelLoading                      the wait for a cold model ran out
│   ├── LoadFailed (kind)                 the model failed to load and is quarantined
│   ├── ShuttingDown
│   ├── DeviceDown                        its thread died, or a forward pass hangs
│   ├── HostLost                          its process or node ended under the request
│   └── OutOfMemory
├── ModelTooLarge                         no device could ever hold it
├── Conflict
│   ├── ModelInUse
│   └── ModelPinned
├── NonFiniteEmbedding (index)
├── EngineFailed                          a forward pass raised
└── BadModel                              a model's files refuse to become a model (raised while loading)
    ├── UnsupportedModel                  the files are whole, but ask for something we do not do
    ├── BrokenFiles (path)                missing, truncated or corrupt
    ├── FilesChanged                      others than those that were looked at before
    ├── SelfCheckFailed                   loads, but computes wrong vectors
    └── SourceError                       the files cannot be had
        ├── SourceNotFound
        ├── AccessDenied                  gated, private, or bad token
        ├── HubUnreachable                network, timeouts, 429, 5xx
        ├── OfflineMode                   not cached, and the network is forbidden
        └── DiskFull
"""

import errno
import re
from typing import ClassVar

_NO_MEMORY = re.compile(
    r"out of memory|can'?t allocate memory|cannot allocate memory|not enough memory|failed to allocate|bad_alloc"
    r"|bad allocation|_STATUS_ALLOC_FAILED|cudaErrorMemoryAllocation",
    re.IGNORECASE,
)
"""How allocators of torch (CPU and CUDA), cuBLAS, cuDNN, ONNX Runtime and the C library say that there is no room."""


class EngineError(Exception):
    """Base of all; `str()` is a message fit for the caller: both numbers, the remedy, no path, no secret."""


class InvalidRequest(EngineError):
    """The request can never be served as asked.

    Args:
        message: what was wrong, with both numbers, and what to do.
        param: the request field at fault, as the client spelt it.
    """

    param: str | None

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class InvalidValue(InvalidRequest):
    """A field's value is out of its bounds."""


class ContextLengthExceeded(InvalidRequest):
    """An input is longer than the model reads, and the caller asked for an error instead of a cut."""


class DimensionsNotSupported(InvalidRequest):
    """The model cannot be cut to that width."""


class PromptNotFound(InvalidRequest):
    """The model has no prompt of that name."""


class InvalidTokenId(InvalidRequest):
    """A token id lies outside the model's vocabulary."""


class ModelNotFound(EngineError):
    """No model of that id is known here."""


class HostNotFound(EngineError):
    """No host of that id is known here."""


class Busy(EngineError):
    """Refused now, welcome later."""

    def __init__(self, message: str, *, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class QueueFull(Busy):
    """The model's queue has no room for the whole request."""


class Unavailable(EngineError):
    """The server, not the caller, is why this cannot be served now."""

    def __init__(self, message: str, *, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class ModelLoading(Unavailable):
    """The model was still loading when the caller's patience ended; the load goes on."""


class LoadFailed(Unavailable):
    """The model could not be loaded and is quarantined for `retry_after_s`.

    `kind` is the machine-readable cause: the `kind` of the error underneath.
    """

    def __init__(self, message: str, *, retry_after_s: float = 10.0, kind: str = "load") -> None:
        super().__init__(message, retry_after_s=retry_after_s)
        self.kind = kind


class ShuttingDown(Unavailable):
    """The host drains and admits nothing new."""


class DeviceDown(Unavailable):
    """The device does not answer any more; the server must be restarted."""


class HostLost(Unavailable):
    """The process or the node that had the request ended before it was answered."""


class OutOfMemory(Unavailable):
    """The device ran out of memory. `stage`: `load`, no memory for the model on this host; `run`, for a single text."""

    def __init__(self, message: str, *, retry_after_s: float = 1.0, stage: str = "run") -> None:
        super().__init__(message, retry_after_s=retry_after_s)
        self.stage = stage


class ModelTooLarge(EngineError):
    """The model would not fit on any device even when everything else had left."""


class Conflict(EngineError):
    """An operator's command contradicts the state of the model."""


class ModelInUse(Conflict):
    """Requests still run on the model."""


class ModelPinned(Conflict):
    """The model is pinned and leaves only when forced."""


class NonFiniteEmbedding(EngineError):
    """A vector came out with NaN or infinity; `index` is the input's index in the request."""

    def __init__(self, message: str, *, index: int) -> None:
        super().__init__(message)
        self.index = index


class EngineFailed(EngineError):
    """A forward pass raised something that is nobody's input's fault."""


class BadModel(EngineError):
    """The model's files do not become a model. `kind` names the class for logs, metrics and quarantine."""

    kind: ClassVar[str] = "bad_model"


class UnsupportedModel(BadModel):
    """The files are whole but ask for something that is not supported; the message names the registry key."""

    kind = "unsupported_model"


class BrokenFiles(BadModel):
    """A file is missing, truncated or corrupt; `file` is its name inside the model folder."""

    kind = "broken_files"

    def __init__(self, message: str, *, file: str | None = None) -> None:
        super().__init__(message)
        self.file = file


class FilesChanged(BadModel):
    """The files are not those that were looked at, or were written while they were read. They are looked at again."""

    kind = "files_changed"


class SelfCheckFailed(BadModel):
    """The loaded model does not reproduce the reference forward pass, or its own canary."""

    kind = "self_check_failed"


class SourceError(BadModel):
    """The files cannot be had."""

    kind = "source_error"


class SourceNotFound(SourceError):
    """No such repository, revision, folder or package."""

    kind = "source_not_found"


class AccessDenied(SourceError):
    """The hub refused: gated or private repository, missing or wrong token."""

    kind = "access_denied"


class HubUnreachable(SourceError):
    """Network trouble, a time-out, too many requests, or the hub's own failure."""

    kind = "hub_unreachable"


class OfflineMode(SourceError):
    """The files are not on disk and the network is switched off."""

    kind = "offline_mode"


class DiskFull(SourceError):
    """The disk has no room for the model."""

    kind = "disk_full"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocator refused, whichever it was. Known by words where its errors have no class of their own:
    `RuntimeError: DefaultCPUAllocator: can't allocate memory`, ONNX Runtime's `Failed to allocate memory`."""
    if isinstance(error, MemoryError | OutOfMemory):
        return True
    if isinstance(error, EngineError):
        return False
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    is_torchs = any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__)
    return is_torchs or _NO_MEMORY.search(str(error)) is not None
