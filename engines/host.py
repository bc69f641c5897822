"""The door: one device, its pool and its engines. Unaware of other devices, of where it runs, and of who calls.

host = Host(config, specs, files, loader)
await host.start()
embeddings = await host.embed(EmbedCall(model_id="…", texts=("…",)))
await host.aclose()
"""

from collections.abc import AsyncIterator, Mapping

import msgspec
import structlog

from engines.device.health import describe_fault
from engines.errors import DeviceDown
from engines.pause_detector import PauseDetector
from engines.pool.pool import ModelPool
from engines.pool.runtime import HostConfig, HostRuntime, default_runtime, device_matches
from engines.protocols import Files, Loader
from engines.spec import ModelSpec
from engines.types import Budget, EmbedCall, Embeddings, Event, HostSnapshot, ModelStatus, Plan, State

__all__ = ["Host", "HostConfig", "HostRuntime", "default_runtime", "device_matches"]

log = structlog.get_logger(__name__)


class Host:
    """The models of one device. All calls come from one event loop; errors are those of `engines/errors.py`."""

    def __init__(
        self,
        config: HostConfig,
        specs: Mapping[str, ModelSpec],
        files: Files,
        loader: Loader,
        world: HostRuntime | None = None,
    ) -> None:
        """`files` may be shared with other hosts: then a model is fetched once for all of them.

        Of `specs`, the host serves those that may run on its device. It loads none of them unasked.
        """
        self.config = config
        world = world or default_runtime(config)
        self._time = world.time
        self._pulse = world.health
        self._awake = PauseDetector()
        self.fault = ""
        self._pool = ModelPool(config, self._own(specs), files, loader, world)

    def __repr__(self) -> str:
        return f"<Host {self.config.host_id} on {self.config.device}: {self._pool!r}>"

    async def start(self) -> None:
        """Read the device and look what is on disk; afterwards calls are served."""
        await self._pool.start()

    async def embed(self, call: EmbedCall) -> Embeddings:
        """Texts in, vectors out; a cold model is waited for as long as the call allows.

        Raises:
            DeviceDown: since the last `check`, or because of it.
        """
        if self.fault:
            raise DeviceDown(self.fault)
        asked_s = self._time.now_s()
        async with self._pool.lease(call) as engine:
            load_s = self._time.now_s() - asked_s
            answer = await engine.embed(call)
        return msgspec.structs.replace(answer, timings=msgspec.structs.replace(answer.timings, load_s=load_s))

    async def preload(
        self, model_id: str, *, pin: bool = False, wait: bool = True, may_move: bool = False
    ) -> ModelStatus:
        """Load the model; returns when it is ready, or at once when `wait` is false.

        With `may_move` another host is asked where it cannot be had here, so nothing of the wish stays then.
        """
        return await self._pool.preload(model_id, pin=pin, wait=wait, may_move=may_move)

    async def evict(self, model_id: str, *, force: bool = False, timeout_s: float = 30.0) -> ModelStatus:
        """Wait for the running requests, then free the model.

        Raises:
            ModelPinned: pinned, and not forced.
            ModelInUse: requests were still running at the time-out; the model serves on.
        """
        return await self._pool.evict(model_id, force=force, timeout_s=timeout_s)

    async def reload(self, specs: Mapping[str, ModelSpec], budget: Budget | None = None) -> None:
        """Serve these models from now on, in this much memory; only what changed is touched."""
        if budget is not None:
            self._pool.set_budget(budget)
        self._pool.reload(self._own(specs))

    async def aclose(self, *, grace_s: float = 30.0) -> None:
        """Admit nothing new, finish what was admitted within the grace time, free everything."""
        await self._pool.aclose(grace_s)

    def state(self, model_id: str) -> State | None:
        """Where the model stands here, None when this host does not serve it; cheap enough for every request."""
        return self._pool.state_of(model_id)

    def plan(self, model_id: str) -> Plan:
        """What loading the model would do, without doing it."""
        return self._pool.plan(model_id)

    async def size(self, model_id: str) -> None:
        """Learn what the model takes before it is planned: from its files, or a few kilobytes of them from the hub."""
        await self._pool.size(model_id)

    def status(self, model_id: str) -> ModelStatus:
        """One model here.

        Raises:
            ModelNotFound: not served by this host.
        """
        return self._pool.status(model_id)

    def snapshot(self) -> HostSnapshot:
        """Everything here, now; never blocks."""
        return self._pool.snapshot()

    def check(self) -> str:
        """Look whether the device still answers, and loads end; what is wrong, empty when nothing is.

        Calls that wait for what will not come are told at once: to be called every second or so. While a load hangs,
        models that are in memory serve on. In time that nobody else needs it
        also has files hashed.
        """
        awake_s = self._awake.seconds_since_pause(self._time.now_s())
        pulse = self._pulse().capped(awake_s)
        fault = describe_fault(self.config.device, pulse, self.config.watchdog_s)
        if fault and not self.fault:
            log.error("device.down", host=self.config.host_id, fault=fault)
        if fault:
            self._pool.interrupt(lambda: DeviceDown(fault))
        self.fault = fault
        hung = self._pool.check(awake_s)
        if not fault and not hung:
            self._pool.verify_if_idle()
        if fault or not hung:
            return fault
        return f"nothing can be loaded on host {self.config.host_id}: {hung} (WATCHDOG_SECONDS); restart the server"

    def events(self, after: int | None = None) -> AsyncIterator[Event]:
        """Events from this call on; with `after`, the remembered ones since that `seq` first."""
        return self._pool.log.follow(after)

    def events_since(self, after: int) -> tuple[Event, ...]:
        """The remembered events after that `seq`, now."""
        return tuple(self._pool.log.since(after))

    async def event_arrived(self, after: int) -> bool:
        """Wait for an event after that `seq`; False when there will be none."""
        return await self._pool.log.arrived(after)

    def _own(self, specs: Mapping[str, ModelSpec]) -> dict[str, ModelSpec]:
        return {model_id: spec for model_id, spec in specs.items() if device_matches(self.config.device, spec.device)}
