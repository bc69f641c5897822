"""A server process with one worker, which ends without a word when its input does. `test_fleet.py` runs it."""

import asyncio
import sys

from tests.unit.router.backends.process.test_fleet import Yard


async def main() -> None:
    """Print the worker's pid, and wait for the end of the input."""
    here = Yard(1)
    await here.backend.start()
    sys.stdout.write(f"{here.pids()['cpu:0']}\n")
    sys.stdout.flush()
    await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(main())
