"""Runs a backend of worker processes over scripted hosts; as a program, it exits when its input ends.

python -m tests.testkit.process_backend
"""

import asyncio
import os
import signal
import sys

from msgspec import structs

from engines.spec import ModelSpec
from router.backends.process.fleet import ProcessFleet
from router.backends.remote import RemoteBackend
from tests.testkit.backends import until, worker_configs


class WorkerProcesses:
    """A backend and its worker processes."""

    def __init__(self, hosts: int, *specs: ModelSpec) -> None:
        models = {spec.model_id: spec for spec in specs}
        self.fleet = ProcessFleet([structs.replace(b, specs=models) for b in worker_configs()[:hosts]], 1, grace_s=5.0)
        self.backend = RemoteBackend(self.fleet, models)

    def pids(self) -> dict[str, int]:
        return {host_id: worker.pid or 0 for host_id, worker in self.fleet.workers.items()}

    def kill(self, host_id: str) -> None:
        os.kill(self.pids()[host_id], signal.SIGKILL)

    async def restarted(self, host_id: str, times: int) -> None:
        def is_so(hosts: object) -> bool:
            return any(
                host.host_id == host_id and host.restarts == times and not host.is_draining
                for host in self.backend.snapshots()
            )

        await until(self.backend, is_so)


async def main() -> None:
    """Print the worker's pid, and wait for the end of the input."""
    here = WorkerProcesses(1)
    await here.backend.start()
    sys.stdout.write(f"{here.pids()['cpu:0']}\n")
    sys.stdout.flush()
    await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(main())
