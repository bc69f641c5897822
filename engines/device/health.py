"""Decides whether a device still responds, and words the fault when it does not. Pure.

A forward pass cannot be interrupted: all that can be done about one that hangs is to fail the waiting requests, refuse
new ones, and let a supervisor restart the process. The same holds for a GPU that has failed ("device-side assert
triggered"): every later call of the process on it raises.
"""

from collections.abc import Callable, Iterable

from msgspec import Struct, structs

_SELF_CHECK_FACTOR = 5.0
"""A self-check at load may take this many times the limit of a forward pass: it runs the model text by text, which is
slow for a large model on a CPU."""


class DeviceHealth(Struct, frozen=True):
    """The health of a device's thread at one moment.

    Args:
        is_alive: whether the thread runs.
        task_s: seconds that its present task has been running.
        is_check: whether the task is the self-check of a load.
        loss: why the process can no longer use the device; empty while it can.
    """

    is_alive: bool = True
    task_s: float = 0.0
    is_check: bool = False
    loss: str = ""

    @property
    def weighted_runtime_s(self) -> float:
        """Seconds of the present task, those of a self-check divided by `_SELF_CHECK_FACTOR`."""
        return self.task_s / (_SELF_CHECK_FACTOR if self.is_check else 1.0)

    def capped(self, awake_s: float) -> "DeviceHealth":
        """Returns the same health with `task_s` limited to `awake_s`, the time since the process was last paused."""
        return self if self.task_s <= awake_s else structs.replace(self, task_s=awake_s)


ReadHealth = Callable[[], DeviceHealth]


def least_healthy(threads: Iterable[DeviceHealth]) -> DeviceHealth:
    """Returns the health of the thread nearest to its limit, of the threads of one device."""
    return max(threads, key=lambda health: (not health.is_alive, health.weighted_runtime_s))


def describe_fault(device: str, health: DeviceHealth, watchdog_s: float) -> str:
    """Returns what is wrong with the device, for people; empty when nothing is."""
    if health.loss:
        return f"device {device} has failed ({health.loss}), and this process cannot use it again; restart the server"
    if not health.is_alive:
        return f"the thread of device {device} has died; restart the server"
    if health.weighted_runtime_s > watchdog_s:
        limit_s = watchdog_s * (_SELF_CHECK_FACTOR if health.is_check else 1.0)
        work = "a self-check" if health.is_check else "a forward pass"
        return (
            f"device {device} does not answer: {work} has been running for {health.task_s:.0f} s, and {limit_s:g} s "
            "is the limit (WATCHDOG_SECONDS); restart the server"
        )
    return ""
