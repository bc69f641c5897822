"""The backend is chosen by the settings, else by the devices."""

from pathlib import Path

import pytest

from engines.affinity import num_usable_cores
from engines.errors import InvalidValue
from engines.types import Budget
from router.backends.factory import may_have_gpus, open_backend
from router.backends.local import LocalBackend
from router.backends.worker_config import divide_budget, divide_cores
from router.config.settings import Settings
from router.registry.registry import Registry, parse_registry

CPU = ("cpu",)


def test_one_device_is_served_in_this_process() -> None:
    assert isinstance(open_backend(Settings(device=CPU), Registry()), LocalBackend)


def test_the_environment_wins_over_the_registry() -> None:
    registry = parse_registry("version: 1\nbackend: process\nmodels: []\n")

    assert registry.backend == "process"
    assert isinstance(open_backend(Settings(device=CPU, backend="local"), registry), LocalBackend)


def test_a_missing_ray_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "router.backends.ray.fleet", None)

    with pytest.raises(InvalidValue, match=r"pip install 'embedyard\[ray\]'"):
        open_backend(Settings(backend="ray"), Registry())


@pytest.mark.parametrize(
    ("wanted", "files", "expected"),
    [
        (("auto",), [], False),
        (("auto",), ["nvidia0", "nvidiactl", "nvidia-uvm"], False),
        (("auto",), ["nvidia0", "nvidia1", "nvidiactl"], True),
        (("cuda:0",), ["nvidia0", "nvidia1"], False),
        (("cuda:0", "cuda:1"), [], True),
    ],
)
def test_more_than_one_gpu_is_a_reason_to_look_closer(
    tmp_path: Path, wanted: tuple[str, ...], files: list[str], expected: bool
) -> None:
    for name in files:
        (tmp_path / name).touch()

    assert may_have_gpus(wanted, tmp_path) is expected


def test_hosts_share_cores_and_memory() -> None:
    assert (divide_cores(1), divide_cores(10_000)) == (num_usable_cores(), 1)
    assert divide_budget(Budget(fraction=0.8), 2) == Budget(fraction=0.4)
    assert divide_budget(Budget(size_bytes=1001), 2) == Budget(size_bytes=500)
