"""`HostReplica`: one host as a replica of the Serve deployment. Runs on a node of the cluster."""

import os
from typing import Any

import msgspec
import structlog
from msgspec import structs
from ray import serve

from engines.errors import DeviceDown
from engines.rpc.messages import Drain, decode_request, encode_reply
from engines.rpc.service import HostService
from router.backends.worker_config import WorkerConfig, start_host
from router.observability.logs import configure_logging

log = structlog.get_logger()


class HostReplica:
    """Serves one device of one node. Its host id is the replica's id, so that a router can name it to Serve."""

    async def __init__(self, config: WorkerConfig) -> None:  # type: ignore[misc]  # Serve awaits it
        host_id = serve.get_replica_context().replica_id.unique_id
        configure_logging(config.settings.log_format, config.settings.log_level)
        structlog.contextvars.bind_contextvars(host=host_id)
        self._host = config.open(structs.replace(config, host_id=host_id), lambda _: None)
        await start_host(self._host)
        self._service = HostService(self._host, config.generation)

    async def ask(self, head: bytes) -> tuple[bytes, bytes]:
        """Answer one request of `engines/rpc/messages.py`; errors are encoded as replies, never raised into Ray."""
        return encode_reply(await self._service.answer(decode_request(head)))

    async def leave(self, grace_s: float) -> None:
        """Drain and exit the process: Serve starts another replica in its place."""
        await self._service.answer(Drain(grace_s=grace_s))
        log.info("replica.leaves")
        os._exit(0)

    def record_routing_stats(self) -> dict[str, Any]:
        """Return the snapshot for the routers. Called by Serve."""
        return {"snapshot": msgspec.to_builtins(self._host.snapshot())}

    def record_replica_metadata(self) -> dict[str, Any]:
        """Return the constant properties of the host. Called by Serve."""
        snapshot = self._host.snapshot()
        return {"device": snapshot.device, "budget_bytes": snapshot.budget_bytes}

    def check_health(self) -> None:
        """Raise when the host is faulty. Called by Serve, which then replaces the replica.

        Raises:
            DeviceDown: the device has failed, its thread has died, or a forward pass hangs.
        """
        fault = self._host.check()
        if fault:
            raise DeviceDown(fault)

    async def __del__(self) -> None:
        """Close the host. Called by Serve when it stops the replica."""
        if hasattr(self, "_host"):
            await self._host.aclose(grace_s=0.0)
