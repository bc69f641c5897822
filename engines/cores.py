"""How many cores a thread may use, and whether torch takes them or leaves them to others."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class _Here(threading.local):
    num: int | None = None
    is_left: bool = False


_HERE = _Here()


def prepare() -> None:
    """One core, on a thread that begins. torch keeps a number for each thread that asks, but the first asking takes
    over the last number that any of them has set: it comes before ours is."""
    torch.get_num_threads()
    use(1)


def use(num: int) -> None:
    """From now on this thread may use so many."""
    _HERE.num = num
    if not _HERE.is_left:
        torch.set_num_threads(num)


def usable() -> int:
    """How many this thread may use; where nobody has said it, as many as torch takes."""
    return torch.get_num_threads() if _HERE.num is None else _HERE.num


@contextmanager
def left_to_others(is_so: bool = True) -> Iterator[None]:
    """Inside, if so, torch takes one: its threads wait busily for more work, on cores that another library uses."""
    if not is_so or _HERE.is_left:
        yield
        return
    before, _HERE.num, _HERE.is_left = _HERE.num, usable(), True
    torch.set_num_threads(1)
    try:
        yield
    finally:
        _HERE.is_left = False
        torch.set_num_threads(_HERE.num)
        _HERE.num = None if before is None else _HERE.num
