"""Whether a device still answers, and in which words to say that it does not. Pure.

A forward pass cannot be interrupted: all that can be done about one that hangs is to tell those who wait, refuse those
who come, and let a supervisor start the process anew.
"""

from collections.abc import Callable, Iterable

from msgspec import Struct, structs

_SELF_CHECK_FACTOR = 5.0
"""A load's self-check runs the model text by text, and on a CPU a large one takes its time."""


class DeviceHealth(Struct, frozen=True):
    """A device's thread at one moment. `turn_s`: how long its turn has been running; `is_check`: one of a load."""

    is_alive: bool = True
    task_s: float = 0.0
    is_check: bool = False

    @property
    def weighted_runtime_s(self) -> float:
        """Seconds of the present turn, in the measure of a forward pass."""
        return self.task_s / (_SELF_CHECK_FACTOR if self.is_check else 1.0)

    def capped(self, awake_s: float) -> "DeviceHealth":
        """The same where only so many seconds of the turn count."""
        return self if self.task_s <= awake_s else structs.replace(self, task_s=awake_s)


ReadHealth = Callable[[], DeviceHealth]


def least_healthy(pulses: Iterable[DeviceHealth]) -> DeviceHealth:
    """Of the threads of one device, the one nearest to its limit."""
    return max(pulses, key=lambda pulse: (not pulse.is_alive, pulse.weighted_runtime_s))


def describe_fault(device: str, pulse: DeviceHealth, watchdog_s: float) -> str:
    """What is wrong with the device; empty when nothing is."""
    if not pulse.is_alive:
        return f"the thread of device {device} has died; restart the server"
    if pulse.weighted_runtime_s > watchdog_s:
        limit_s = watchdog_s * (_SELF_CHECK_FACTOR if pulse.is_check else 1.0)
        work = "a self-check" if pulse.is_check else "a forward pass"
        return (
            f"device {device} does not answer: {work} has been running for {pulse.task_s:.0f} s, and {limit_s:g} s "
            "is the limit (WATCHDOG_SECONDS); restart the server"
        )
    return ""
