"""Sets how many cores a thread may use, and whether torch or ONNX Runtime uses them; waits for and names devices."""

import threading
from collections.abc import Callable

import torch


def finisher(device: torch.device) -> Callable[[], None]:
    """Returns a function that waits until a device has done its work. A CPU has done it when a call returns.

    It waits for this thread's stream only: to wait for the whole device is an error while another thread records a
    graph there.
    """
    return (lambda: None) if device.type == "cpu" else (lambda: torch.cuda.current_stream(device).synchronize())


def device_name(device: torch.device) -> str:
    """Returns the kind of a CPU or the name of a GPU, by which measured speeds are kept."""
    return device.type if device.type == "cpu" else torch.cuda.get_device_name(device)


def compute_capability(device: torch.device) -> tuple[int, int] | None:
    """Returns the compute capability of a GPU; None for a CPU, and where torch finds no GPU (its devices are then
    simulated)."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_capability(device)


class _ThreadCores(threading.local):
    num: int | None = None
    is_reserved: bool = False


_CORES = _ThreadCores()


def prepare() -> None:
    """Limits a new thread to one core.

    torch keeps a number of threads for each thread that asks for it, but a thread's first query takes over the last
    number that any thread has set: it comes before ours is set.
    """
    torch.get_num_threads()
    set_threads(1)


def set_threads(num: int) -> None:
    """Sets how many cores this thread may use from now on."""
    _CORES.num = num
    if not _CORES.is_reserved:
        torch.set_num_threads(num)


def usable_threads() -> int:
    """Returns how many cores this thread may use; where it was never set, as many as torch uses."""
    return torch.get_num_threads() if _CORES.num is None else _CORES.num


class reserve_for_onnxruntime:  # noqa: N801  # a context manager, named as a function that makes one
    """Limits torch to one core inside the block, if `is_needed`.

    Its threads spin while they wait, on cores that ONNX Runtime uses. A class: a generator takes four calls more.
    """

    __slots__ = ("_before", "_is_needed")

    def __init__(self, is_needed: bool = True) -> None:
        self._is_needed = is_needed

    def __enter__(self) -> None:
        cores = _CORES
        self._is_needed = self._is_needed and not cores.is_reserved
        if self._is_needed:
            self._before, cores.num, cores.is_reserved = cores.num, usable_threads(), True
            torch.set_num_threads(1)

    def __exit__(self, *_: object) -> None:
        if self._is_needed:
            cores = _CORES
            cores.is_reserved = False
            torch.set_num_threads(usable_threads())
            cores.num = None if self._before is None else cores.num
