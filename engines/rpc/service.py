"""Executes requests of `engines/rpc/messages.py` on a host of this process, for any transport."""

import asyncio
from contextlib import suppress

from engines.host import Host
from engines.rpc.errors import error_record_of
from engines.rpc.messages import (
    Cancel,
    CommandResult,
    Drain,
    Evict,
    Generation,
    HostReport,
    PlanRequest,
    Poll,
    Preload,
    Reload,
    Reply,
    Request,
    Run,
    RunResult,
)
from engines.types import ModelStatus


class HostService:
    """Serves one host; tracks the generation of its registry.

    Args:
        host: a started host.
        generation: the version of the registry that the host was created with.
    """

    def __init__(self, host: Host, generation: Generation = Generation()) -> None:  # noqa: B008  # frozen
        self.host = host
        self._generation = generation

    async def answer(self, request: Request) -> Reply:
        """Executes the request; errors become replies too. Cancelling it cancels the host's work."""
        try:
            if isinstance(request, Run):
                return RunResult(result=await self.host.run(request.call))
            return await self._command(request)
        except Exception as error:  # noqa: BLE001  # sent as a record, and raised where the reply is awaited
            return error_record_of(error)

    def poll(self, after: int = 0) -> HostReport:
        """Checks the host; returns its snapshot and its events after `after`."""
        return HostReport(
            fault=self.host.check(),
            snapshot=self.host.snapshot(),
            events=self.host.events_since(after),
            generation=self._generation,
        )

    async def _command(self, request: Request) -> Reply:
        match request:
            case Preload():
                status = await self.host.preload(
                    request.model_id, pin=request.pin, wait=request.wait, may_move=request.may_move
                )
                return self._command_result(status)
            case Evict():
                status = await self.host.evict(
                    request.model_id, force=request.force, timeout_s=request.timeout_s, to=request.to
                )
                return self._command_result(status)
            case PlanRequest():
                return await self._plan(request)
            case Reload():
                await self._reload(request)
            case Poll():
                return self.poll(request.after)
            case Drain():
                await self.host.aclose(grace_s=request.grace_s)
            case Run() | Cancel():
                raise AssertionError(f"{request} is not a command")
        return self._command_result()

    async def _plan(self, request: PlanRequest) -> Reply:
        with suppress(TimeoutError):
            await asyncio.wait_for(self.host.estimate_size(request.model_id), request.size_s)
        return CommandResult(snapshot=self.host.snapshot(), plan=self.host.plan(request.model_id))

    async def _reload(self, request: Reload) -> None:
        """Applies a registry of a higher generation; of several routers, older registries may arrive late."""
        if request.generation > self._generation:
            await self.host.reload(request.specs, request.budget, request.host_budget)
            self._generation = request.generation

    def _command_result(self, status: ModelStatus | None = None) -> CommandResult:
        return CommandResult(snapshot=self.host.snapshot(), status=status)
