"""Parts of a measurement that do what a test says, each in the process that the runner gives it."""

import os
import subprocess
import sys
import time

from benchmarks.gpu.runner import PartContext


def finds(context: PartContext) -> None:
    """Two findings."""
    context.record(device=context.device, size=context.settings["size"])
    context.record(left=context.left_s > 0)


def declines(context: PartContext) -> str:
    """Nothing to measure here."""
    return "no vLLM here"


def raises(context: PartContext) -> None:
    """A finding, then an error."""
    context.record(step=1)
    raise ValueError("the kernel is wrong")


def dies(context: PartContext) -> None:
    """A finding, then the end of the process, as by a signal of the driver."""
    context.record(step=1)
    os._exit(9)


def hangs(context: PartContext) -> None:
    """A finding with the id of a child process, then nothing for a minute."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    context.record(child=child.pid)
    time.sleep(60)
