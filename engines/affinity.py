"""Tells on which cores this process may run: in a container these can be fewer than the machine has."""

import os


def usable_cores() -> list[int]:
    """Returns the cores that the calling thread may run on, rising; empty where the operating system does not say."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def num_usable_cores() -> int:
    """Returns the number of cores that the calling thread may run on, at least one."""
    return len(usable_cores()) or os.cpu_count() or 1
