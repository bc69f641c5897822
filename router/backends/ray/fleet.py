"""`RayFleet`: connects to hosts on a Ray cluster. Router processes keep no state: any number of them may run.

Every host is polled twice a second; the reply has its events, its snapshot, and the generation of its registry. A host
with an older registry than this router, because it has just been started, is sent the current one.
"""

import asyncio
from collections.abc import Callable, Container, Mapping
from contextlib import suppress

import structlog
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle

from engines.errors import EngineError, HostLost, InvalidValue, QueueFull
from engines.rpc.errors import ErrorRecord, error_of
from engines.rpc.messages import (
    CommandResult,
    Evict,
    Generation,
    HostReport,
    PlanRequest,
    Poll,
    Preload,
    Reply,
    Request,
    Run,
    RunResult,
    decode_reply,
    encode_request,
)
from engines.spec import ModelSpec
from engines.types import Budget, HostBudget, HostSnapshot, Result
from router.backends.event_feed import EventFeed
from router.backends.fleet import NotSent, RoutedCall
from router.backends.host_directory import HostDirectory, ready_models
from router.backends.ray.connection import connect
from router.backends.ray.environment import APP, DEPLOYMENT
from router.backends.ray.replica_directory import REPLICAS, ReplicaDirectory, RoutedRequest
from router.backends.remote import RemoteBackend
from router.config.settings import Settings
from router.registry.generation import DesiredRegistry
from router.registry.registry import Registry

_LOAD_TIMEOUT_S = 3600.0

_COMMAND_TIMEOUT_S = 30.0
"""Added to the time that a command may take by itself."""

_RETRY_DELAY_S = 0.05


def timeout_of(request: Request) -> float:
    """Return the timeout of an operator's command. Ray itself waits for ever for an unreachable host."""
    match request:
        case Preload(wait=True):
            return _LOAD_TIMEOUT_S
        case Evict():
            return request.timeout_s + _COMMAND_TIMEOUT_S
        case PlanRequest():
            return request.size_s + _COMMAND_TIMEOUT_S
    return _COMMAND_TIMEOUT_S


async def unanswered_error(routed: RoutedRequest, limit_s: float) -> HostLost:
    """Build the error of a request that timed out, or was given up before it was sent."""
    if routed.is_sent:
        return HostLost(f"host {routed.to} did not reply within {limit_s:g} s; retry the request")
    if routed.call is None:
        return HostLost(f"host {routed.to} no longer exists")
    await asyncio.sleep(_RETRY_DELAY_S)
    return NotSent(f"no host was open for model {routed.call.spec.model_id!r}; retry the request")


def is_cancelled_by_caller() -> bool:
    """Whether the running task is being cancelled; Serve raises CancelledError, too, for requests that it gives up."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def open_ray_backend(settings: Settings, registry: Registry) -> RemoteBackend:
    """Connect to the cluster and find the deployment.

    Raises:
        InvalidValue: no cluster answers, or nothing is deployed there.
    """
    connect(None)
    try:
        handle = serve.get_deployment_handle(DEPLOYMENT, APP)
        status = serve.status().applications.get(APP)
    except RayServeException as error:
        raise _not_deployed_error() from error
    if status is None:
        raise _not_deployed_error()
    fleet = RayFleet(
        handle,
        REPLICAS,
        run_timeout_s=settings.watchdog_seconds + settings.grace_seconds,
        grace_s=settings.grace_seconds,
    )
    return RemoteBackend(fleet, registry.models)


def _not_deployed_error() -> InvalidValue:
    return InvalidValue("no hosts are deployed on this Ray cluster: run `embedyard ray deploy` first")


log = structlog.get_logger()

POLL_INTERVAL_S = 0.5
_POLL_TIMEOUT_S = 2.0
_MAX_MISSED_POLLS = 3
_REPLACEMENT_TIMEOUT_S = 120.0

_DISCOVERY_TIMEOUT_S = 10.0
"""How long `open` waits for Serve to list the replicas; hosts that start later are found, too."""


class RayFleet:
    """See `Fleet`.

    Args:
        handle: of the deployment.
        replicas: directory of this process, which Serve's router reads, too.
        run_timeout_s: how long a call may run beyond the wait for its model. Ray itself waits for ever.
        grace_s: how long a host that is recycled may take to finish its calls.
    """

    def __init__(
        self,
        handle: DeploymentHandle,
        replicas: ReplicaDirectory,
        *,
        run_timeout_s: float = 180.0,
        grace_s: float = 30.0,
        poll_interval_s: float = POLL_INTERVAL_S,
    ) -> None:
        self.feed = EventFeed()
        self._handle = handle
        self._replicas = replicas
        self._run_timeout_s = run_timeout_s
        self._grace_s = grace_s
        self._poll_interval_s = poll_interval_s
        self._desired = DesiredRegistry({})
        self._faults: dict[str, str] = {}
        self._missed_polls: dict[str, int] = {}
        self._poller: asyncio.Task[None] | None = None

    @property
    def directory(self) -> HostDirectory:
        """The directory of this process; Serve's router writes to it, too."""
        return self._replicas.directory

    async def open(self, specs: Mapping[str, ModelSpec], on_change: Callable[[], None]) -> None:
        self._desired = DesiredRegistry(specs)
        self._replicas.on_change = on_change
        if not self._handle.is_initialized:
            self._handle._init(_run_router_in_separate_loop=False)  # the replica directory lives on this loop
        with suppress(TimeoutError):
            async with asyncio.timeout(_DISCOVERY_TIMEOUT_S):
                while not self._replicas.running:  # noqa: ASYNC110 - Serve tells when it is there
                    await asyncio.sleep(0.05)
        await self._poll_all()
        self._poller = asyncio.create_task(self._poll_forever())

    async def send(self, routed: RoutedCall) -> Result:
        limit_s = routed.call.load_timeout_s + self._run_timeout_s
        reply = await self._request(RoutedRequest(call=routed), Run(call=routed.call), limit_s)
        assert isinstance(reply, RunResult), "the reply to a call is a RunResult"
        return reply.result

    async def ask(self, host_id: str, request: Request) -> Reply:
        reply = await self._request(RoutedRequest(to=host_id), request, timeout_of(request))
        if isinstance(reply, CommandResult):
            self._replicas.update(reply.snapshot)
        return reply

    async def reload(
        self, specs: Mapping[str, ModelSpec], budget: Budget | None, host_budget: HostBudget | None = None
    ) -> None:
        await self._poll_all()  # another router may have just sent them a registry
        self._desired.change(specs, budget, host_budget)
        await asyncio.gather(*(self._send_registry(host_id) for host_id in self.directory.devices()))

    async def recycle(self, host_id: str) -> None:
        """See `Fleet`. Serve starts another replica in its place, with another id."""
        before = self.directory.snapshot(host_id)
        others = set(self.directory.devices())
        self.directory.close(host_id)
        name = self._replicas.begin(RoutedRequest(to=host_id))
        try:
            async with asyncio.timeout(self._grace_s + _REPLACEMENT_TIMEOUT_S):
                await self._handle.options(method_name="leave", session_id=name).remote(self._grace_s)
        except (RayError, RayServeException, TimeoutError):
            log.info("host.left", host=host_id)  # exited before it could reply, or is unreachable: Serve notices both
        finally:
            self._replicas.end(name)
        fresh = await self._replacement(others)
        for status in ready_models(before):
            with suppress(EngineError):
                await self.ask(fresh, Preload(model_id=status.model_id, pin=status.pinned, wait=False))

    async def _replacement(self, others: Container[str]) -> str:
        """Wait for a host that is none of these, and return its id."""
        try:
            async with asyncio.timeout(_REPLACEMENT_TIMEOUT_S):
                while not (fresh := [one for one in self.directory.devices() if one not in others]):  # noqa: ASYNC110 - Serve tells when it is there
                    await asyncio.sleep(POLL_INTERVAL_S)
        except TimeoutError:
            raise HostLost(f"no replacement host started within {_REPLACEMENT_TIMEOUT_S:g} s") from None
        return fresh[0]

    def snapshots(self) -> tuple[HostSnapshot, ...]:
        return self.directory.snapshots()

    def faults(self) -> Mapping[str, str]:
        known = self.directory.devices()
        return {host_id: fault for host_id, fault in self._faults.items() if fault and host_id in known}

    def quarantine(self, model_id: str) -> None:
        """Do nothing: which model a lost replica was running is unknown; Serve starts another replica."""

    async def aclose(self, grace_s: float) -> None:
        """Stop polling. The hosts keep running: they belong to the cluster."""
        if self._poller is not None:
            self._poller.cancel()
            await asyncio.gather(self._poller, return_exceptions=True)

    # ---- one request ----

    async def _request(self, routed: RoutedRequest, request: Request, limit_s: float) -> Reply:
        """Send a request and return its reply. Cancelling also cancels it on the replica: Ray does not by itself.

        Raises:
            EngineError: raised by the host.
            HostLost: the replica or its node ended before it replied, or did not reply in time.
        """
        model_id = routed.call.spec.model_id if routed.call is not None else ""
        name = self._replicas.begin(routed)
        handle = self._handle.options(method_name="ask", session_id=name, multiplexed_model_id=model_id)
        response = handle.remote(encode_request(request))
        try:
            async with asyncio.timeout(limit_s) as routed.limit:
                head, body = await response
        except TimeoutError:
            response.cancel()
            raise await unanswered_error(routed, limit_s) from None
        except asyncio.CancelledError:
            response.cancel()
            if is_cancelled_by_caller():
                raise
            raise HostLost(f"host {routed.to} ended before it replied; retry the request") from None
        except BackPressureError as error:
            raise QueueFull("all hosts have reached their concurrency limit; retry the request in a moment") from error
        except Exception as error:  # hosts return their errors as replies, so what is raised comes from Ray
            log.warning("host.lost", host=routed.to, reason=type(error).__name__)
            raise HostLost(f"host {routed.to} ended before it replied; retry the request") from error
        finally:
            self._replicas.end(name)
        reply = decode_reply(head, body)
        if isinstance(reply, ErrorRecord):
            raise error_of(reply)
        return reply

    # ---- polling ----

    async def _poll_forever(self) -> None:
        while True:
            await asyncio.sleep(self._poll_interval_s)
            try:
                await self._poll_all()
            except Exception:  # any error: the next poll may succeed
                log.exception("hosts.not_seen")

    async def _poll_all(self) -> None:
        """Poll all hosts, then send the registry to those that lack it: the newest generation is known only then."""
        host_ids = list(self._replicas.running)
        generations = await asyncio.gather(*(self._poll(host_id) for host_id in host_ids))
        self._desired.settle([generation for generation in generations if generation is not None])
        pairs = zip(host_ids, generations, strict=True)
        lacking = [host for host, generation in pairs if generation and self._desired.is_outdated(generation)]
        await asyncio.gather(*(self._send_registry(host_id) for host_id in lacking))

    async def _poll(self, host_id: str) -> Generation | None:
        """Poll one host. One that does not reply gets no calls until it does; Serve reports the ones that are gone."""
        try:
            request = Poll(after=self.feed.last_seq(host_id))
            reply = await self._request(RoutedRequest(to=host_id), request, _POLL_TIMEOUT_S)
        except EngineError:
            self._missed_polls[host_id] = self._missed_polls.get(host_id, 0) + 1
            if self._missed_polls[host_id] >= _MAX_MISSED_POLLS:
                self.directory.close(host_id)
            return None
        self._missed_polls[host_id] = 0
        assert isinstance(reply, HostReport), "the reply to a Poll is a HostReport"
        self._on_report(host_id, reply)
        return reply.generation

    def _on_report(self, host_id: str, report: HostReport) -> None:
        self._replicas.update(report.snapshot)
        self._faults[host_id] = report.fault
        self._desired.observe(report.generation)
        for event in report.events:
            if event.seq > self.feed.last_seq(host_id):
                self.feed.add(event)

    async def _send_registry(self, host_id: str) -> None:
        with suppress(EngineError):  # the next poll shows that it was not received
            await self.ask(host_id, self._desired.message)
