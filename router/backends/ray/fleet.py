"""`RayFleet`: the way to hosts on a Ray cluster. The router process keeps nothing: any number of them may run.

A host is asked twice a second how it is; the answer brings its events, its snapshot, and the generation of its
registry: a host that serves an older one than this router, because it has just been started, is told then.
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
from engines.types import Budget, HostSnapshot, Result
from router.backends.event_feed import EventFeed
from router.backends.fleet import NotSent, RoutedCall
from router.backends.host_directory import HostDirectory, hot
from router.backends.ray.deploy import connect
from router.backends.ray.environment import APP, DEPLOYMENT
from router.backends.ray.replica_directory import REPLICAS, ReplicaDirectory, RoutedRequest
from router.backends.remote import RemoteBackend
from router.config.settings import Settings
from router.registry.generation import DesiredRegistry
from router.registry.registry import Registry

_LOAD_S = 3600.0


_COMMAND_S = 30.0
"""Beside the time that a command may take by itself."""


_AGAIN_S = 0.05


def limit_of(request: Request) -> float:
    """How long an operator's command may take. Ray itself waits for ever for a host that is cut off."""
    match request:
        case Preload(wait=True):
            return _LOAD_S
        case Evict():
            return request.timeout_s + _COMMAND_S
        case PlanRequest():
            return request.size_s + _COMMAND_S
    return _COMMAND_S


async def no_answer(errand: RoutedRequest, limit_s: float) -> HostLost:
    """The error of a request that was not answered in time, or given up before it was sent."""
    if errand.is_sent:
        return HostLost(f"host {errand.to} did not answer within {limit_s:g} s; ask again")
    if errand.ticket is None:
        return HostLost(f"host {errand.to} is not there any more")
    await asyncio.sleep(_AGAIN_S)
    return NotSent(f"no host was open for model {errand.ticket.spec.model_id!r}; ask again")


def is_cancelled_by_caller() -> bool:
    """Whether the running task is to end; Serve raises the same where it has given a request up by itself."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def open_ray_backend(settings: Settings, registry: Registry) -> RemoteBackend:
    """Join the cluster and find the deployment.

    Raises:
        InvalidValue: there is no cluster, or nothing is deployed there.
    """
    connect(None)
    try:
        handle = serve.get_deployment_handle(DEPLOYMENT, APP)
        status = serve.status().applications.get(APP)
    except RayServeException as error:
        raise _nothing_there() from error
    if status is None:
        raise _nothing_there()
    fleet = RayFleet(
        handle,
        REPLICAS,
        patience_s=settings.watchdog_seconds + settings.grace_seconds,
        grace_s=settings.grace_seconds,
    )
    return RemoteBackend(fleet, registry.models)


def _nothing_there() -> InvalidValue:
    return InvalidValue("no hosts are deployed on this Ray cluster: run `embedyard ray deploy` first")


log = structlog.get_logger()


LOOK_EVERY_S = 0.5


_LOOK_S = 2.0


_SILENT_LOOKS = 3


_REPLACED_S = 120.0


_FIRST_S = 10.0
"""How long Serve may take to name the replicas; hosts that come later are heard of, too."""


class RayFleet:
    """See `Fleet`.

    Args:
        handle: of the deployment.
        board: that of this process, which Serve's router reads, too.
        patience_s: how long a call may run beside the wait for its model. Ray itself waits for ever.
        grace_s: how long a host that is recycled may finish what it has.
    """

    def __init__(
        self,
        handle: DeploymentHandle,
        board: ReplicaDirectory,
        *,
        patience_s: float = 180.0,
        grace_s: float = 30.0,
        look_every_s: float = LOOK_EVERY_S,
    ) -> None:
        self.feed = EventFeed()
        self._handle = handle
        self._board = board
        self._patience_s = patience_s
        self._grace_s = grace_s
        self._look_every_s = look_every_s
        self._desired = DesiredRegistry({})
        self._faults: dict[str, str] = {}
        self._silences: dict[str, int] = {}
        self._looking: asyncio.Task[None] | None = None

    @property
    def directory(self) -> HostDirectory:
        """Of this process; Serve's router writes to it, too."""
        return self._board.ledger

    async def open(self, specs: Mapping[str, ModelSpec], on_change: Callable[[], None]) -> None:
        self._desired = DesiredRegistry(specs)
        self._board.on_change = on_change
        if not self._handle.is_initialized:
            self._handle._init(_run_router_in_separate_loop=False)  # the board lives on this loop
        with suppress(TimeoutError):
            async with asyncio.timeout(_FIRST_S):
                while not self._board.running:  # noqa: ASYNC110 - Serve tells when it is there
                    await asyncio.sleep(0.05)
        await self._look_at_all()
        self._looking = asyncio.create_task(self._look_on())

    async def send(self, ticket: RoutedCall) -> Result:
        limit_s = ticket.call.load_timeout_s + self._patience_s
        reply = await self._request(RoutedRequest(ticket=ticket), Run(call=ticket.call), limit_s)
        assert isinstance(reply, RunResult), "a call is answered with a result"
        return reply.result

    async def ask(self, host_id: str, request: Request) -> Reply:
        reply = await self._request(RoutedRequest(to=host_id), request, limit_of(request))
        if isinstance(reply, CommandResult):
            self._board.note(reply.snapshot)
        return reply

    async def reload(self, specs: Mapping[str, ModelSpec], budget: Budget | None) -> None:
        await self._look_at_all()  # another router may have told them something just now
        self._desired.change(specs, budget)
        await asyncio.gather(*(self._tell_registry(host_id) for host_id in self.directory.devices()))

    async def recycle(self, host_id: str) -> None:
        """Serve puts another replica in its place, with another id."""
        before = self.directory.snapshot(host_id)
        others = set(self.directory.devices())
        self.directory.close(host_id)
        name = self._board.begin(RoutedRequest(to=host_id))
        try:
            async with asyncio.timeout(self._grace_s + _REPLACED_S):
                await self._handle.options(method_name="leave", session_id=name).remote(self._grace_s)
        except (RayError, RayServeException, TimeoutError):
            log.info("host.left", host=host_id)  # it ends before it can answer, or is cut off: Serve knows of it then
        finally:
            self._board.end(name)
        fresh = await self._replacement(others)
        for status in hot(before):
            with suppress(EngineError):
                await self.ask(fresh, Preload(model_id=status.model_id, pin=status.pinned, wait=False))

    async def _replacement(self, others: Container[str]) -> str:
        """A host that is none of these, as soon as there is one."""
        try:
            async with asyncio.timeout(_REPLACED_S):
                while not (fresh := [one for one in self.directory.devices() if one not in others]):  # noqa: ASYNC110 - Serve tells when it is there
                    await asyncio.sleep(LOOK_EVERY_S)
        except TimeoutError:
            raise HostLost(f"the cluster has put no other host in its place within {_REPLACED_S:g} s") from None
        return fresh[0]

    def snapshots(self) -> tuple[HostSnapshot, ...]:
        return self.directory.snapshots()

    def faults(self) -> Mapping[str, str]:
        known = self.directory.devices()
        return {host_id: fault for host_id, fault in self._faults.items() if fault and host_id in known}

    def quarantine(self, model_id: str) -> None:
        """Nothing: which model a lost replica was running is not known here; Serve starts another replica."""

    async def aclose(self, grace_s: float) -> None:
        """The hosts go on: they belong to the cluster."""
        if self._looking is not None:
            self._looking.cancel()
            await asyncio.gather(self._looking, return_exceptions=True)

    # ---- one request ----

    async def _request(self, errand: RoutedRequest, request: Request, limit_s: float) -> Reply:
        """Send it where the errand says. When its caller leaves it is cancelled where it runs: Ray does not by itself.

        Raises:
            EngineError: as the host raised it.
            HostLost: the replica or its node ended first, or did not answer in time.
        """
        model_id = errand.ticket.spec.model_id if errand.ticket is not None else ""
        name = self._board.begin(errand)
        handle = self._handle.options(method_name="ask", session_id=name, multiplexed_model_id=model_id)
        response = handle.remote(encode_request(request))
        try:
            async with asyncio.timeout(limit_s) as errand.limit:
                head, body = await response
        except TimeoutError:
            response.cancel()
            raise await no_answer(errand, limit_s) from None
        except asyncio.CancelledError:
            response.cancel()
            if is_cancelled_by_caller():
                raise
            raise HostLost(f"host {errand.to} ended before it answered; ask again") from None
        except BackPressureError as error:
            raise QueueFull("the hosts have all the requests that they take; send it again in a moment") from error
        except Exception as error:  # hosts answer with their errors, so what is raised is the way's
            log.warning("host.lost", host=errand.to, reason=type(error).__name__)
            raise HostLost(f"host {errand.to} ended before it answered; ask again") from error
        finally:
            self._board.end(name)
        reply = decode_reply(head, body)
        if isinstance(reply, ErrorRecord):
            raise error_of(reply)
        return reply

    # ---- looking ----

    async def _look_on(self) -> None:
        while True:
            await asyncio.sleep(self._look_every_s)
            try:
                await self._look_at_all()
            except Exception:  # whatever it is, the next look may go well
                log.exception("hosts.not_seen")

    async def _look_at_all(self) -> None:
        """Only when all have said what they serve it is known what is new to them."""
        asked = list(self._board.running)
        shown = await asyncio.gather(*(self._look_at(host_id) for host_id in asked))
        self._desired.settle([generation for generation in shown if generation is not None])
        pairs = zip(asked, shown, strict=True)
        lacking = [host for host, generation in pairs if generation and self._desired.is_outdated(generation)]
        await asyncio.gather(*(self._tell_registry(host_id) for host_id in lacking))

    async def _look_at(self, host_id: str) -> Generation | None:
        """A host that does not answer gets no calls until it does; that it is gone, Serve will say."""
        try:
            request = Poll(after=self.feed.last_seq(host_id))
            reply = await self._request(RoutedRequest(to=host_id), request, _LOOK_S)
        except EngineError:
            self._silences[host_id] = self._silences.get(host_id, 0) + 1
            if self._silences[host_id] >= _SILENT_LOOKS:
                self.directory.close(host_id)
            return None
        self._silences[host_id] = 0
        assert isinstance(reply, HostReport), "a look is answered with what is seen"
        self._hear(host_id, reply)
        return reply.generation

    def _hear(self, host_id: str, seen: HostReport) -> None:
        self._board.note(seen.snapshot)
        self._faults[host_id] = seen.fault
        self._desired.observe(seen.generation)
        for event in seen.events:
            if event.seq > self.feed.last_seq(host_id):
                self.feed.add(event)

    async def _tell_registry(self, host_id: str) -> None:
        with suppress(EngineError):  # the next look shows that it was not told
            await self.ask(host_id, self._desired.message)
