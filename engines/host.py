"""`Host`, the public interface of `engines`: one device, its model pool and its engines.

A host does not depend on other devices, on the process it runs in, or on the transport of its callers.

host = Host(config, specs, files, loader)
await host.start()
result = await host.run(EmbedCall(model_id="…", texts=("…",)))
await host.aclose()
"""

from collections.abc import AsyncIterator, Mapping
from functools import partial

import msgspec
import structlog

from engines.device.health import describe_fault
from engines.device.memory import device_memory
from engines.errors import DeviceDown
from engines.pause_detector import PauseDetector
from engines.pool.pool import ModelPool
from engines.pool.runtime import HostConfig, HostRuntime, default_runtime, device_matches
from engines.protocols import Files, Loader
from engines.spec import ModelSpec
from engines.types import Budget, Call, Event, HostBudget, HostSnapshot, ModelStatus, Plan, Result, State, Tier

__all__ = ["Host", "HostConfig", "HostRuntime", "default_runtime", "device_matches"]

log = structlog.get_logger(__name__)


class Host:
    """Serves the models of one device.

    Call it from one event loop only. It raises the errors of `engines/errors.py`.
    """

    def __init__(
        self,
        config: HostConfig,
        specs: Mapping[str, ModelSpec],
        files: Files,
        loader: Loader,
        runtime: HostRuntime | None = None,
    ) -> None:
        """Creates the host; nothing is loaded yet.

        `files` may be shared with other hosts, so that each model is downloaded once for all of them.
        The host serves those of `specs` whose `device` matches its own.
        """
        self.config = config
        runtime = runtime or default_runtime(config)
        self._time = runtime.time
        self._workers = runtime.workers
        self._read_health = runtime.health
        self._pauses = PauseDetector()
        self._form_cache = runtime.form_cache
        self._specs = specs
        self.fault = ""
        self._pool = ModelPool(config, self._matching_specs(specs), files, loader, runtime)

    def __repr__(self) -> str:
        return f"<Host {self.config.host_id} on {self.config.device}: {self._pool!r}>"

    async def start(self) -> None:
        """Reads the device's memory and finds the models that are on disk. Call it before anything else."""
        await self._pool.start()

    async def run(self, call: Call) -> Result:
        """Answer one call; waits for a cold model as long as the call allows.

        Raises:
            DeviceDown: the last `check` found a fault, or one finds it while the call runs.
        """
        if self.fault:
            raise DeviceDown(self.fault)
        began_s = self._time.now_s()
        async with self._pool.lease(call) as engine:
            load_s = self._time.now_s() - began_s
            result = await engine.run(call)
        return msgspec.structs.replace(result, timings=msgspec.structs.replace(result.timings, load_s=load_s))

    async def preload(
        self, model_id: str, *, pin: bool = False, wait: bool = True, may_move: bool = False
    ) -> ModelStatus:
        """Loads the model; returns once it is ready, or immediately if `wait` is false.

        With `may_move` the caller tries another host after a failure, so a failed preload leaves no pin and no retry.
        """
        return await self._pool.preload(model_id, pin=pin, wait=wait, may_move=may_move)

    async def evict(
        self, model_id: str, *, force: bool = False, timeout_s: float = 30.0, to: Tier = "disk"
    ) -> ModelStatus:
        """Waits until the model's running requests have ended, then frees its memory; with `to` `host`, that of the
        device only, where main memory has room (`HostConfig.host_budget_bytes`).

        Raises:
            ModelPinned: the model is pinned and `force` is false.
            ModelInUse: requests were still running after `timeout_s`; the model stays ready.
        """
        return await self._pool.evict(model_id, force=force, timeout_s=timeout_s, to=to)

    async def reload(
        self, specs: Mapping[str, ModelSpec], budget: Budget | None = None, host_budget: HostBudget | None = None
    ) -> None:
        """Replaces the registry, and each budget that is given; unchanged models are not touched."""
        if budget is not None:
            self._pool.set_budget(budget)
        if host_budget is not None:
            self.set_host_budget(await self._share_of(host_budget))
        self._pool.reload(self._matching_specs(specs))
        old, self._specs = self._specs, specs
        if self._form_cache is not None:
            await self._workers.read_disk(partial(self._form_cache.remove_unused, old, specs))

    def set_host_budget(self, budget_bytes: int) -> None:
        """Sets the main memory for parked models; 0 frees them all."""
        self._pool.set_host_budget(budget_bytes)

    async def _share_of(self, budget: HostBudget) -> int:
        """Returns this host's part of the main memory for parked models."""
        if budget == "auto":
            return self.config.default_host_bytes
        reading = await self._workers.read_disk(device_memory("cpu").read)
        return budget.of(reading.total_bytes) // self.config.host_parts

    async def aclose(self, *, grace_s: float = 30.0) -> None:
        """Shuts down: refuses new requests, lets admitted ones finish within `grace_s`, frees all memory."""
        await self._pool.aclose(grace_s)

    def state(self, model_id: str) -> State | None:
        """Returns the model's state on this host, None if it is not served here; cheap enough for every request."""
        return self._pool.state_of(model_id)

    def plan(self, model_id: str) -> Plan:
        """Predicts what loading the model would do, without doing it."""
        return self._pool.plan(model_id)

    async def estimate_size(self, model_id: str) -> None:
        """Estimates the model's memory for `plan`, from its files or from a few kilobytes read from the hub."""
        await self._pool.estimate_size(model_id)

    def status(self, model_id: str) -> ModelStatus:
        """Returns the status of one model.

        Raises:
            ModelNotFound: this host does not serve it.
        """
        return self._pool.status(model_id)

    def snapshot(self) -> HostSnapshot:
        """Returns the present state of the device and of all its models; never blocks."""
        return self._pool.snapshot()

    def check(self) -> str:
        """Checks that the device responds and that loads finish; returns the fault, or an empty string.

        Call it about once a second. When the device is down, every running and waiting call fails at once. While a
        load hangs, the calls that wait for a load fail and models in memory go on serving. When the host is idle,
        it also starts to hash model files.
        """
        since_pause_s = self._pauses.seconds_since_pause(self._time.now_s())
        health = self._read_health().capped(since_pause_s)
        fault = describe_fault(self.config.device, health, self.config.watchdog_s)
        if fault and not self.fault:
            log.error("device.down", host=self.config.host_id, fault=fault)
        if fault:
            self._pool.interrupt(lambda: DeviceDown(fault))
        self.fault = fault
        hung = self._pool.check(since_pause_s)
        if not fault and not hung:
            self._pool.verify_if_idle()
        if fault or not hung:
            return fault
        return f"nothing can be loaded on host {self.config.host_id}: {hung} (WATCHDOG_SECONDS); restart the server"

    def events(self, after: int | None = None) -> AsyncIterator[Event]:
        """Yields events from this call on; with `after`, the retained events with a higher `seq` first."""
        return self._pool.log.follow(after)

    def events_since(self, after: int) -> tuple[Event, ...]:
        """Returns the retained events with a `seq` higher than `after`."""
        return tuple(self._pool.log.since(after))

    async def event_arrived(self, after: int) -> bool:
        """Waits for an event with a `seq` higher than `after`; returns False if the log is closed first."""
        return await self._pool.log.arrived(after)

    def _matching_specs(self, specs: Mapping[str, ModelSpec]) -> dict[str, ModelSpec]:
        return {model_id: spec for model_id, spec in specs.items() if device_matches(self.config.device, spec.device)}
