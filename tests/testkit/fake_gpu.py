"""Imitates a GPU on a machine without one: torch's fake CUDA tensors, each with a twin on the CPU that has its values.

torch's `FakeTensorMode` knows the device, shape and dtype of every result, and raises where tensors of two devices
meet. Beside it, each operation runs on the twins, so that a model can be loaded, checked and served as on a GPU, and
what the host reads has values. Every operation is watched for three things, which are kept as `Finding`:

- `device`: tensors of two devices meet;
- `sync`: the host waits for the GPU: it reads values, or copies from memory that is not pinned;
- `float32`: a pass of a bfloat16 model computes in float32 or float64.

Kernels, streams and memory of a real GPU are beyond it.
"""

import sys
import weakref
from functools import cache
from pathlib import Path
from subprocess import SubprocessError
from types import FrameType
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils import cpp_extension
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from tests.testkit.fake_gpu_kernels import KERNELS, READS, chosen_attention

GPU = torch.device("cuda:0")

_SDPA = torch.ops.aten.scaled_dot_product_attention.default

Kind = Literal["device", "sync", "float32"]

_REPOSITORY = Path(__file__).parents[2]


class Finding(NamedTuple):
    """What an operation did that costs time on a GPU, or fails there.

    Attributes:
        place: the innermost function of Embedyard, transformers or a test that was running: `package/module.py:name`;
            of what a head runs, the head.
        operation: of torch.
    """

    kind: Kind
    place: str
    operation: str


@cache
def register_guard() -> str:
    """Registers a CUDA device guard in this process, built once and kept by torch's extension cache.

    Returns:
        Why that is not possible; empty where it is done.
    """
    if torch.version.cuda is not None:  # it has one, or registers one where no GPU is there
        return ""
    try:
        cpp_extension.load(
            "embedyard_cuda_guard", [str(Path(__file__).with_name("cuda_guard.cpp"))], is_python_module=False
        )
    except (RuntimeError, OSError, UserWarning, SubprocessError) as error:  # none of either, or no place for it
        return f"fake CUDA tensors need a C++ compiler and ninja to build tests/testkit/cuda_guard.cpp: {error}"
    return ""


class FakeGpu(TorchDispatchMode):  # type: ignore[no-untyped-call]  # untyped upstream
    """One GPU. Tensors are fake, and operations watched, on threads that are inside `with gpu:` or called `begin`.

    Attributes:
        findings: what was found since the last `take`.
        is_pass: whether a bfloat16 pass runs, in which float32 is a finding.
        is_capturing: whether a CUDA graph is being captured.
        held_bytes, peak_bytes: bytes held now, and the most at once since `reset_peak`: `cuda`, `cpu` and `both`.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # untyped upstream
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._storages: dict[int, int] = {}
        self.held_bytes = {"cuda": 0, "cpu": 0, "both": 0}
        self.peak_bytes = dict(self.held_bytes)
        self.findings: list[Finding] = []
        self.is_pass = self.is_capturing = False

    def __enter__(self) -> "FakeGpu":
        self._fake.__enter__()
        super().__enter__()  # type: ignore[no-untyped-call]  # untyped upstream
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]  # untyped upstream
        self._fake.__exit__(*error)

    def begin(self) -> None:
        """Enters for good, on a thread that does nothing else."""
        self.__enter__()

    def take(self) -> list[Finding]:
        """Returns the findings and forgets them."""
        found, self.findings = self.findings, []
        return found

    def reset_peak(self) -> None:
        """Starts a new peak."""
        self.peak_bytes = dict(self.held_bytes)

    def note(self, kind: Kind, operation: str) -> None:
        """Keeps a finding of the code that runs now."""
        self.findings.append(Finding(kind, _place(), operation))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an operation on the fake tensors and on their twins."""
        kwargs = kwargs or {}
        if func.namespace == "prim":  # asks for a tensor's device
            return func(*args, **kwargs)
        if (
            func is _SDPA
            and args[0].device.type == "cuda"
            and (kernel := chosen_attention(*args, **kwargs)) is not None
        ):
            return self._run(*kernel)[0]
        if _is_composite(func):
            super().__enter__()  # type: ignore[no-untyped-call]  # in inference mode they come here in one piece
            try:
                return func.decompose(*args, **kwargs)
            finally:
                super().__exit__(None, None, None)  # type: ignore[no-untyped-call]  # untyped upstream
        name = func.overloadpacket.__name__
        tensors = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, Tensor)]
        if name in ("is_pinned", "_pin_memory"):
            return self._pinning(name, args[0])
        on_gpu = [tensor for tensor in tensors if tensor.device.type == "cuda"]
        if on_gpu or "cuda" in str(kwargs.get("device")):
            self._watch_waiting(func, name, args, kwargs)
        device = on_gpu[0].device if on_gpu else torch.device("cpu")
        if not READS.isdisjoint((name, f"{name}.{func._overloadname}")):
            return self._read(func, args, kwargs, device)
        if _has_mask(name, args):
            args = self._without_masks(args)
        return self._run(func, args, kwargs)

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        try:
            out = func(*args, **kwargs)
        except RuntimeError as error:
            if "on the same device" in str(error) or "device" in type(error).__name__.lower():
                self.note("device", str(func))
            raise
        found = tree_flatten(out)[0]
        if any(isinstance(made, FakeTensor) for made in found):
            for made, value in zip(found, tree_flatten(self._on_twins(func, args, kwargs))[0], strict=False):
                if isinstance(made, FakeTensor) and isinstance(value, Tensor):
                    self._attach(made, value)
            self._watch_dtype(func, found[0])
        return out

    def _read(self, func: Any, args: Any, kwargs: Any, device: torch.device) -> Any:
        """Runs an operation whose result depends on values: the twins have them."""
        with unset_fake_temporarily():
            value = func(*tree_map(_on_cpu, args), **tree_map(_on_cpu, kwargs))
        return tree_map(lambda part: self._like(part, device) if isinstance(part, Tensor) else part, value)

    def _like(self, value: Tensor, device: torch.device) -> Tensor:
        """Returns a fake tensor on a device that has these values."""
        with self._fake:
            made = torch.empty(value.shape, dtype=value.dtype, device=device)
        self._attach(made, value)
        return made

    def _without_masks(self, args: Any) -> Any:
        """Replaces masks among the indices of an operation by the indices of what they keep, as a GPU does."""
        indices: list[Tensor | None] = []
        for index in args[1]:
            if index is None or index.dtype != torch.bool:
                indices.append(index)
            else:
                with unset_fake_temporarily():
                    kept = twin(index).nonzero().unbind(1)
                indices += [self._like(part, index.device) for part in kept]
        return (args[0], indices, *args[2:])

    def _on_twins(self, func: Any, args: Any, kwargs: Any) -> Any:
        kernel = KERNELS.get(func.overloadpacket.__name__, func)
        with unset_fake_temporarily():
            return kernel(*tree_map(_on_cpu, args), **tree_map(_on_cpu, kwargs))

    def _attach(self, made: Tensor, value: Tensor) -> None:
        if getattr(made, "twin", None) is not None:
            return  # it was changed in place, and its twin as well
        setattr(made, "twin", value)  # noqa: B010  # torch's class has no such attribute
        self.hold(value, made.device.type)

    def hold(self, value: Tensor, kind: str) -> None:
        """Counts the memory of a tensor as held on a type of device until it is freed."""
        storage = value.untyped_storage()
        if storage._cdata not in self._storages:
            self._storages[storage._cdata] = storage.nbytes()
            weakref.finalize(storage, self._free, storage._cdata, kind)
            for place in (kind, "both"):
                self.held_bytes[place] += storage.nbytes()
                self.peak_bytes[place] = max(self.peak_bytes[place], self.held_bytes[place])

    def _free(self, storage: int, kind: str) -> None:
        num_bytes = self._storages.pop(storage)
        for place in (kind, "both"):
            self.held_bytes[place] -= num_bytes

    def _pinning(self, name: str, tensor: Tensor) -> Any:
        if name == "is_pinned":
            return getattr(tensor, "pinned", False)
        pinned = self._run(torch.ops.aten.clone.default, (tensor,), {})
        setattr(pinned, "pinned", True)  # noqa: B010  # as above
        return pinned

    def _watch_waiting(self, func: Any, name: str, args: Any, kwargs: Any) -> None:
        """Notes an operation for which the host waits for the GPU."""
        if name in ("_to_copy", "copy_"):
            to, source = (kwargs.get("device"), args[0]) if name == "_to_copy" else (args[0].device, args[1])
            host = (source if torch.device(to).type == "cuda" else args[0]) if to is not None else source
            crosses = to is not None and source.device.type != torch.device(to).type
            is_async = kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2])
            waits = crosses and not (is_async and getattr(host, "pinned", False))
        else:
            reads = not READS.isdisjoint((name, f"{name}.{func._overloadname}"))
            indices = args[1] if name in ("index", "index_put", "index_put_", "_unsafe_index") else ()
            waits = reads or any(index is not None and _is_waited_for(index) for index in indices)
        if waits:
            self.note("sync", str(func))
            if self.is_capturing:
                raise RuntimeError(f"operation not permitted when stream is capturing: {func}")

    def _watch_dtype(self, func: Any, made: Any) -> None:
        """Notes a float32 result of a bfloat16 pass; norms give their statistics as well, not first."""
        is_wide = isinstance(made, FakeTensor) and made.device.type == "cuda" and made.dtype in _WIDE
        if self.is_pass and is_wide and made.ndim > 1 and func.namespace != "prim":
            self.note("float32", str(func))


@cache
def _is_composite(func: Any) -> bool:
    """Whether an operation is made of others on every device."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")


_WIDE = (torch.float32, torch.float64)


def twin(tensor: Tensor) -> Tensor:
    """Returns the values of a tensor: those of a fake one are beside it."""
    if not isinstance(tensor, FakeTensor):
        return tensor
    found = getattr(tensor, "twin", None)
    if found is None and tensor.constant is not None:
        found = tensor.constant
    assert isinstance(found, Tensor), "an operation that was not watched made this tensor"
    return found


def _on_cpu(value: Any) -> Any:
    """Returns an argument as the twins' operations take it."""
    if isinstance(value, torch.device):
        return torch.device("cpu") if value.type == "cuda" else value
    return twin(value) if isinstance(value, Tensor) else value


def _has_mask(name: str, args: Any) -> bool:
    return name in ("index", "index_put", "index_put_") and any(
        index is not None and index.dtype == torch.bool for index in args[1]
    )


def _is_waited_for(index: Tensor) -> bool:
    """Whether an index is read on the host (a mask, for the number of what it keeps) or copied to the GPU first."""
    return index.dtype == torch.bool or index.device.type == "cpu"


_HEADS = {"ScoreHead.__call__"}
"""Functions that stand for all that they call: a head runs code of transformers that its backbone may run as well."""


def _place() -> str:
    frame: FrameType | None = sys._getframe(1)
    place = ""
    while frame is not None:
        name, function = _source(frame.f_code.co_filename), frame.f_code.co_qualname
        if name and (not place or function in _HEADS):
            place = f"{name}:{function}"
        frame = frame.f_back
    return place or "elsewhere"


@cache
def _source(filename: str) -> str:
    """Returns the name of a source file of Embedyard, transformers or a test; empty for any other."""
    _, package, module = filename.rpartition("/site-packages/transformers/")
    if package:  # first, as an environment may lie inside the repository
        return f"transformers/{module}"
    path = Path(filename)
    name = path.relative_to(_REPOSITORY).as_posix() if path.is_relative_to(_REPOSITORY) else ""
    return name if name.startswith(("engines/", "tests/")) and not name.startswith("tests/testkit/") else ""
