"""How many cores a thread may use, and whether torch takes them or leaves them to others."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


def finisher(device: torch.device) -> Callable[[], None]:
    """What waits for a device: a CPU has done its work when a call returns.

    For what this thread's stream was given, that is: to wait for the whole device is an error while another thread
    records a graph there.
    """
    return (lambda: None) if device.type == "cpu" else (lambda: torch.cuda.current_stream(device).synchronize())


def device_name(device: torch.device) -> str:
    """What a speed depends on."""
    return device.type if device.type == "cpu" else torch.cuda.get_device_name(device)


class _Here(threading.local):
    num: int | None = None
    is_left: bool = False


_HERE = _Here()


def prepare() -> None:
    """One core, on a thread that begins. torch keeps a number for each thread that asks, but the first asking takes
    over the last number that any of them has set: it comes before ours is."""
    torch.get_num_threads()
    set_threads(1)


def set_threads(num: int) -> None:
    """From now on this thread may use so many."""
    _HERE.num = num
    if not _HERE.is_left:
        torch.set_num_threads(num)


def usable_threads() -> int:
    """How many this thread may use; where nobody has said it, as many as torch takes."""
    return torch.get_num_threads() if _HERE.num is None else _HERE.num


@contextmanager
def reserve_for_onnxruntime(is_so: bool = True) -> Iterator[None]:
    """Inside, if so, torch takes one: its threads wait busily for more work, on cores that another library uses."""
    if not is_so or _HERE.is_left:
        yield
        return
    before, _HERE.num, _HERE.is_left = _HERE.num, usable_threads(), True
    torch.set_num_threads(1)
    try:
        yield
    finally:
        _HERE.is_left = False
        torch.set_num_threads(_HERE.num)
        _HERE.num = None if before is None else _HERE.num
