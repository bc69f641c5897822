"""The errors that `engines` raises. They carry no HTTP status: `router/errors.py` maps each class once.

EngineError
├── InvalidRequest (param)                the request is wrong; a retry fails again
│   ├── InvalidValue
│   ├── ContextLengthExceeded
│   ├── DimensionsNotSupported
│   ├── PromptNotFound
│   ├── InvalidTokenId
│   ├── SpaceMismatch (other_model)
│   └── TaskNotSupported
├── ModelNotFound                         no such model on this host
├── HostNotFound                          no such host
├── Busy (retry_after_s)                  a limit is reached; retry later
│   └── QueueFull
├── Unavailable (retry_after_s)           the server cannot serve the request now
│   ├── ModelLoading                      the model was not ready within the load time-out
│   ├── LoadFailed (kind)                 the model failed to load and is quarantined
│   ├── ShuttingDown
│   ├── DeviceDown                        the device failed, its thread died, or a forward pass hangs
│   ├── HostLost                          the host's process or node died during the request
│   └── OutOfMemory
├── ModelTooLarge                         the model exceeds the memory budget of every device
├── Conflict
│   ├── ModelInUse
│   └── ModelPinned
├── NonFiniteEmbedding (index)
├── EngineFailed                          a forward pass raised
└── BadModel                              the model's files cannot be loaded
    ├── UnsupportedModel                  the files are complete but need an unsupported feature
    ├── BrokenFiles (path)                missing, truncated or corrupt
    ├── FilesChanged                      the files were replaced after they were found
    ├── SelfCheckFailed                   the model loads, but computes wrong vectors
    └── SourceError                       the files cannot be obtained
        ├── SourceNotFound
        ├── AccessDenied                  gated, private, or bad token
        ├── HubUnreachable                network, timeouts, 429, 5xx
        ├── OfflineMode                   not cached, and the network is disabled
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
"""Out-of-memory messages of torch (CPU and CUDA), cuBLAS, cuDNN, ONNX Runtime and the C library."""


_LOST_CODES = frozenset({214, 220, 226, 700, 702, 710, 714, 715, 716, 717, 718, 719, 721, 999})
"""`cudaError_t` of errors after which every call of the process on that device fails ("the process must be terminated
and relaunched", CUDA Runtime API). Others leave it usable: capture errors (900 to 908), missing kernels (209), invalid
arguments (1)."""

_DEVICE_LOST = re.compile(
    r"device-side assert|illegal memory access|illegal instruction|misaligned address|unspecified launch failure"
    r"|launch timed out|hardware stack error|invalid program counter|uncorrectable (?:ECC|NVLink) error"
    r"|not supported on global/shared address space",
    re.IGNORECASE,
)
"""The same errors in words, in messages that carry no code."""


class EngineError(Exception):
    """Base class of all errors. `str()` is the message for the client: both numbers, the remedy, no path, no secret."""


class InvalidRequest(EngineError):
    """The request is invalid; a retry fails again.

    Args:
        message: the cause with both numbers, and the remedy.
        param: the name of the invalid request field, as the client wrote it.
    """

    param: str | None

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class InvalidValue(InvalidRequest):
    """A field's value is outside its allowed range."""


class ContextLengthExceeded(InvalidRequest):
    """An input exceeds the model's maximum tokens, and the request asked for an error instead of truncation."""


class DimensionsNotSupported(InvalidRequest):
    """The model's vectors cannot be truncated to that width."""


class PromptNotFound(InvalidRequest):
    """The model has no prompt of that name."""


class InvalidTokenId(InvalidRequest):
    """A token id lies outside the model's vocabulary."""


class SpaceMismatch(InvalidRequest):
    """The vectors would lie in another space than the client expects.

    `other_model`: a model that the message names beside the request's own, which the client may not be allowed to know.
    """

    other_model: str | None

    def __init__(self, message: str, *, other_model: str | None = None) -> None:
        super().__init__(message, param="expect_space")
        self.other_model = other_model


class TaskNotSupported(InvalidRequest):
    """The model computes something else than the request asks for; the message names what it can do."""


class ModelNotFound(EngineError):
    """This host serves no model of that id."""


class HostNotFound(EngineError):
    """No host of that id exists."""


class Busy(EngineError):
    """A limit is reached; the client may retry after `retry_after_s`."""

    def __init__(self, message: str, *, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class QueueFull(Busy):
    """The model's queue cannot hold all texts of the request."""


class Unavailable(EngineError):
    """The server cannot serve a valid request now; the client may retry after `retry_after_s`."""

    def __init__(self, message: str, *, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class ModelLoading(Unavailable):
    """The model was not ready within the load time-out; the load continues."""


class LoadFailed(Unavailable):
    """The model failed to load and is quarantined for `retry_after_s`.

    `kind` is the machine-readable cause: the `kind` of the underlying error.
    """

    def __init__(self, message: str, *, retry_after_s: float = 10.0, kind: str = "load") -> None:
        super().__init__(message, retry_after_s=retry_after_s)
        self.kind = kind


class ShuttingDown(Unavailable):
    """The host is shutting down and admits no new requests."""


class DeviceDown(Unavailable):
    """The device has failed or does not respond; the process that uses it must be restarted."""


class HostLost(Unavailable):
    """The host's process or node died before it answered the request."""


class OutOfMemory(Unavailable):
    """The device ran out of memory. `stage`: `load`, while loading the model; `run`, in a forward pass of one text."""

    def __init__(self, message: str, *, retry_after_s: float = 1.0, stage: str = "run") -> None:
        super().__init__(message, retry_after_s=retry_after_s)
        self.stage = stage


class ModelTooLarge(EngineError):
    """The model exceeds the memory budget even when all other models are evicted."""


class Conflict(EngineError):
    """An operator's command conflicts with the model's state."""


class ModelInUse(Conflict):
    """The model has running requests, or its load cannot be interrupted."""


class ModelPinned(Conflict):
    """The model is pinned; only a forced eviction frees it."""


class NonFiniteEmbedding(EngineError):
    """A vector contains NaN or infinity; `index` is the input's index in the request."""

    def __init__(self, message: str, *, index: int) -> None:
        super().__init__(message)
        self.index = index


class EngineFailed(EngineError):
    """A forward pass raised an unexpected error that the input did not cause."""


class BadModel(EngineError):
    """The model's files cannot be loaded. `kind` names the class for logs, metrics and quarantine."""

    kind: ClassVar[str] = "bad_model"


class UnsupportedModel(BadModel):
    """The files are complete but need an unsupported feature; the message names the registry key."""

    kind = "unsupported_model"


class BrokenFiles(BadModel):
    """A file is missing, truncated or corrupt; `file` is its name inside the model folder."""

    kind = "broken_files"

    def __init__(self, message: str, *, file: str | None = None) -> None:
        super().__init__(message)
        self.file = file


class FilesChanged(BadModel):
    """The files were replaced after they were found, or written while they were read. The pool locates them again."""

    kind = "files_changed"


class SelfCheckFailed(BadModel):
    """The loaded model does not reproduce the reference forward pass, or its own canary."""

    kind = "self_check_failed"


class SourceError(BadModel):
    """The files cannot be obtained."""

    kind = "source_error"


class SourceNotFound(SourceError):
    """No such repository, revision, folder or package."""

    kind = "source_not_found"


class AccessDenied(SourceError):
    """The hub refused: gated or private repository, missing or wrong token."""

    kind = "access_denied"


class HubUnreachable(SourceError):
    """A network error, a time-out, HTTP 429, or HTTP 5xx of the hub."""

    kind = "hub_unreachable"


class OfflineMode(SourceError):
    """The files are not on disk, and offline mode disables the network."""

    kind = "offline_mode"


class DiskFull(SourceError):
    """The disk has too little free space for the model."""

    kind = "disk_full"


def is_out_of_memory(error: BaseException) -> bool:
    """Tells whether the error is an out-of-memory error of any allocator.

    Some have no class of their own and are recognized by their message: `RuntimeError: DefaultCPUAllocator: can't
    allocate memory`, ONNX Runtime's `Failed to allocate memory`.
    """
    if isinstance(error, MemoryError | OutOfMemory):
        return True
    if isinstance(error, EngineError):
        return False
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    is_torch_oom = any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__)
    return is_torch_oom or _NO_MEMORY.search(str(error)) is not None


def device_loss(error: BaseException) -> str:
    """Returns the cause where the error says that the process can no longer use the device; else an empty string.

    CUDA reports such an error at any later call, on any thread: torch raises it as `AcceleratorError` (with
    `error_code`) or as a `RuntimeError` with its text.
    """
    text, code = str(error), getattr(error, "error_code", None)
    found = _DEVICE_LOST.search(text) if isinstance(error, RuntimeError) and "CUDA" in text else None
    if found is not None:
        return found[0].lower()
    return f"CUDA error {code}" if code in _LOST_CODES else ""


def is_device_error(error: BaseException) -> bool:
    """Tells whether the error is the device's (no memory, or a failure), so that it says nothing about the model."""
    return is_out_of_memory(error) or bool(device_loss(error))
