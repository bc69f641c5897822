"""A GPU that is not there (`tests/testkit/fake_gpu.py`), for one file of tests: what it replaces is put back after."""

from collections.abc import Iterator

import pytest

from benchmarks.lib.engine_kit import Kit
from benchmarks.lib.models import wider
from tests.testkit.fake_gpu import FakeGpu, register_guard
from tests.testkit.fake_gpu_kit import FakeGpuKit, imitated


@pytest.fixture(scope="module")
def fake() -> Iterator[FakeGpuKit]:
    """A fake GPU with its thread."""
    if problem := register_guard():
        pytest.skip(problem)
    gpu = FakeGpu()
    fake = FakeGpuKit(gpu)
    with imitated(gpu):
        yield fake
    fake.close()


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kit]:
    """Real models, whose attention heads are 16 wide: the kernel for packed rows takes multiples of 8."""
    with wider(64):
        kit = Kit(tmp_path_factory.mktemp("models"))
        yield kit
    kit.close()
