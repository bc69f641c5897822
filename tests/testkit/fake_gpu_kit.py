"""Loads and runs models on the fake GPU (`tests/testkit/fake_gpu.py`) as the server does on a real one."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import pytest
import torch
import transformers.utils.import_utils
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten

from engines.batching.engine import EmbeddingEngine
from engines.device.scheduler import DeviceScheduler
from engines.inputs.tokenizer_threads import TokenizerThreads
from engines.loading import builders, module_weights, scorers, weight_reader
from engines.loading.loader import LoaderSettings, TorchLoader
from engines.models import adapters, base, cuda_graphs
from engines.spec import ModelSpec
from engines.types import EmbedCall, Embeddings, ModelFiles
from tests.testkit.encoders import FakeGraphCapturer
from tests.testkit.fake_gpu import GPU, FakeGpu, twin

Result = TypeVar("Result")

CPU = torch.device("cpu")

CAPABILITY = (9, 0)
"""An H100's or H200's."""

_NUM_SIZES = 1
"""Sizes of graphs that are recorded: the body is the same for all, and 2,048 tokens take the twins a second."""


class FakeGpuKit:
    """A fake GPU, the thread that uses it, and a loader."""

    def __init__(self, gpu: FakeGpu) -> None:
        self.gpu = gpu
        self.lane = DeviceScheduler("fake-gpu", gpu.begin)
        self.threads = TokenizerThreads(1)

    def close(self) -> None:
        self.lane.close()
        self.threads.close()

    def call(self, function: Callable[[], Result]) -> Result:
        """Runs a function on the device's thread."""
        return asyncio.run(self.lane.call(function))

    def load(self, folder: Path, settings: LoaderSettings | None = None, **spec: Any) -> EmbeddingEngine:
        """Loads a folder and warms it up, as a host does."""
        loader = TorchLoader(str(GPU), self.lane, self.threads, settings or LoaderSettings())
        files = ModelFiles(path=str(folder), revision="r1", size_bytes=0)
        model = ModelSpec(**{"model_id": "m", "source": str(folder), **spec})
        engine = self.call(lambda: loader.load(model, files))
        asyncio.run(engine.warm_up())
        return engine

    def passes(self, run: Callable[[], Result]) -> Result:
        """Runs a function on the device's thread as a bfloat16 pass, in which float32 is a finding."""

        def watched() -> Result:
            self.gpu.is_pass = True
            try:
                return run()
            finally:
                self.gpu.is_pass = False

        return self.call(watched)

    def embed(self, engine: EmbeddingEngine, **call: Any) -> Embeddings:
        """Returns the answer to one request."""
        got = asyncio.run(engine.run(EmbedCall(model_id="m", **call)))
        assert isinstance(got, Embeddings)
        return got


class _WatchedCapturer(FakeGraphCapturer):
    """Records passes, in which nothing may wait."""

    def __init__(self, gpu: FakeGpu) -> None:
        super().__init__()
        self._gpu = gpu

    def record(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        def watched() -> Tensor:
            self._gpu.is_capturing = self._gpu.is_pass = True
            try:
                return run()
            finally:
                self._gpu.is_capturing = self._gpu.is_pass = False

        replay = super().record(watched)

        def unwatched() -> Tensor:
            """Runs what was watched when it was recorded."""
            was, self._gpu.is_pass = self._gpu.is_pass, False
            try:
                return replay()
            finally:
                self._gpu.is_pass = was

        return unwatched


def _outside(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a function that reads files: its tensors are on the CPU and real."""

    def real(*args: Any, **kwargs: Any) -> Any:
        with _disable_current_modes():
            return function(*args, **kwargs)

    return real


class _HostMemory(TorchDispatchMode):  # type: ignore[no-untyped-call]  # untyped upstream
    """Counts what operations allocate on the host, inside the block; a map of a file is not allocated."""

    def __init__(self, gpu: FakeGpu) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # untyped upstream
        self._gpu = gpu

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an operation."""
        out = func(*args, **(kwargs or {}))
        given = {_storage_of(value) for value in tree_flatten((args, kwargs))[0] if isinstance(value, Tensor)}
        for made in tree_flatten(out)[0]:
            if isinstance(made, Tensor) and made.device.type == "cpu" and _storage_of(made) not in given:
                self._gpu.hold(made, "cpu")
        return out


def _storage_of(tensor: Tensor) -> int:
    place: int = tensor.untyped_storage()._cdata
    return place


def _counted(gpu: FakeGpu, read: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the function that reads a model, and counts what it holds of the host's memory."""

    def read_and_count(*args: Any, **kwargs: Any) -> Any:
        with _HostMemory(gpu):
            model = read(*args, **kwargs)
        for tensor in (*model.parameters(), *model.buffers()):
            gpu.hold(tensor, "cpu")
        return model

    return read_and_count


def _numpy(tensor: FakeTensor) -> Any:
    if tensor.device.type != "cpu":
        raise TypeError(f"can't convert {tensor.device} device type tensor to numpy")
    with _disable_current_modes():
        return twin(tensor).numpy()


def _bytes_of_twin(bytes_at: Callable[[Tensor], memoryview]) -> Callable[[Tensor], memoryview]:
    """Returns the function that gives a tensor's memory, for fake ones too."""

    def of_twin(tensor: Tensor) -> memoryview:
        with _disable_current_modes():
            return bytes_at(twin(tensor))

    return of_twin


def _set_data(tensor: FakeTensor, value: Tensor) -> None:
    Tensor.data.__set__(tensor, value)  # type: ignore[attr-defined]  # a getset descriptor
    setattr(tensor, "twin", twin(value))  # noqa: B010  # torch's class has no such attribute


@contextmanager
def imitated(gpu: FakeGpu) -> Iterator[None]:
    """Makes torch and transformers answer as though this GPU were there, and the loader read files as it does."""
    with pytest.MonkeyPatch.context() as patch:
        stream = SimpleNamespace(synchronize=lambda: gpu.note("sync", "stream.synchronize"))
        properties = SimpleNamespace(major=CAPABILITY[0], minor=CAPABILITY[1], total_memory=80 * 2**30, name="fake")
        for name, answer in {
            "set_device": None, "current_device": 0, "device_count": 1, "get_device_capability": CAPABILITY,
            "get_device_name": "fake", "get_device_properties": properties, "current_stream": stream,
            "empty_cache": None, "mem_get_info": (80 * 2**30, 80 * 2**30), "is_bf16_supported": True,
        }.items():  # fmt: skip
            patch.setattr(torch.cuda, name, lambda *_, _answer=answer, **__: _answer)
        patch.setattr(torch.cuda, "synchronize", lambda *_: gpu.note("sync", "cuda.synchronize"))
        patch.setattr(FakeTensor, "numpy", _numpy, raising=False)
        patch.setattr(FakeTensor, "data", property(Tensor.data.__get__, _set_data), raising=False)  # type: ignore[attr-defined]  # as above
        patch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # modes are a thread's own
        imports = transformers.utils.import_utils
        patch.setattr(imports, "is_fake_tensor", lambda tensor: False)  # values of ours can be read
        patch.setattr(imports, "is_cuda_stream_capturing", lambda: gpu.is_capturing)
        patch.setattr(weight_reader, "_bytes_at", _bytes_of_twin(weight_reader._bytes_at))
        for module in (builders, scorers):  # both import them by name
            patch.setattr(module, "read_model", _outside(_counted(gpu, module.read_model)))
            patch.setattr(
                module, "capturer_for", lambda device: _WatchedCapturer(gpu) if device.type == "cuda" else None
            )
        patch.setattr(cuda_graphs, "SIZES", cuda_graphs.SIZES[:_NUM_SIZES])
        patch.setattr(module_weights, "_read", _outside(module_weights._read))
        measure = adapters.storage_bytes
        patch.setattr(base, "storage_bytes", lambda tensors: measure([twin(tensor) for tensor in tensors]))
        yield
