"""Describes the device that is measured on, in a process of its own: the parts could not be forked beside CUDA."""

from importlib.metadata import PackageNotFoundError, version
from platform import python_version
from typing import Any

from benchmarks.gpu.results import Device
from benchmarks.gpu.runner import PartContext
from benchmarks.lib.machine import Watch

PACKAGES = ("torch", "triton", "transformers", "tokenizers", "sentence-transformers", "numpy", "litestar", "uvicorn")


def describe(context: PartContext) -> None:
    """Record the device as a `Device`."""
    import torch  # late: the parent that names this function imports no torch

    if context.is_cuda and torch.cuda._is_in_bad_fork():
        raise SystemExit("CUDA was in use before this process was forked: run it with --spawn")
    if context.is_cuda and not torch.cuda.is_available():
        raise SystemExit("torch finds no GPU here; --device cpu runs what a CPU can")
    machine = Watch().machine
    facts: dict[str, Any] = {
        "cpu": machine.cpu, "cores": machine.cores, "memory_bytes": machine.memory_bytes, "system": machine.system,
        "cuda": torch.version.cuda,
    }  # fmt: skip
    name = f"{machine.cpu} {machine.cores} cores"
    if context.is_cuda:
        found = torch.cuda.get_device_properties(context.device)
        name = found.name
        facts |= {
            "gpu_memory_bytes": found.total_memory, "capability": f"{found.major}.{found.minor}",
            "multiprocessors": found.multi_processor_count,
        }  # fmt: skip
    kind = "cuda" if context.is_cuda else "cpu"
    context.record(kind=kind, name=name, facts=facts, python=python_version(), packages=packages())


def packages() -> dict[str, str]:
    """Return the versions of the packages on which figures depend."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


PART_ENTRY = f"{__name__}:describe"


def read_device(record: dict[str, Any]) -> Device:
    """Return the device that a record describes."""
    return Device(**record)
