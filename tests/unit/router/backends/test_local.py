"""Several hosts in this process: placement, and operations on all of them."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

import pytest

from engines.errors import (
    HubUnreachable,
    LoadFailed,
    ModelNotFound,
    ModelPinned,
    ModelTooLarge,
    OutOfMemory,
    SelfCheckFailed,
    ShuttingDown,
)
from engines.host import Host, HostConfig, HostRuntime
from engines.spec import ModelSpec
from engines.testing.engine import Attempts
from engines.testing.fakes import (
    FakeFiles,
    FakeLoader,
    FakeMemory,
    InlineWorkers,
    fake_runtime,
    fake_specs,
    fake_vector,
)
from engines.testing.runtime import let_run
from engines.types import Budget, EmbedCall, Event, ModelStatus
from router.backends.base import Backend
from router.backends.local import LocalBackend


def call(model_id: str, text: str = "x") -> EmbedCall:
    return EmbedCall(model_id=model_id, texts=(text,))


class Fleet:
    """Hosts on fake devices, and their backend."""

    def __init__(self, specs: Mapping[str, ModelSpec], budgets: Mapping[str, int], files: FakeFiles) -> None:
        self.files = files
        self.loaders = {device: FakeLoader() for device in budgets}
        self.worlds: dict[str, HostRuntime] = {device: fake_runtime() for device in budgets}
        self.hosts = {
            device: Host(
                HostConfig(host_id=device, device=device, budget=Budget(size_bytes=budget), workspace_bytes=100),
                specs,
                files,
                self.loaders[device],
                self.worlds[device],
            )
            for device, budget in budgets.items()
        }
        self.closed = 0
        self.backend = LocalBackend(list(self.hosts.values()), specs, self._on_close)

    def _on_close(self) -> None:
        self.closed += 1

    def loads(self, model_id: str) -> list[int]:
        """Count the loads of the model on each host."""
        return [loader.loads[model_id] for loader in self.loaders.values()]

    def hold(self) -> None:
        for world in self.worlds.values():
            assert isinstance(world.workers, InlineWorkers)
            world.workers.hold("load")

    def release(self) -> None:
        for world in self.worlds.values():
            assert isinstance(world.workers, InlineWorkers)
            world.workers.release("load")


@asynccontextmanager
async def fleet(specs: Mapping[str, ModelSpec], files: FakeFiles | None = None, **budgets: int) -> AsyncIterator[Fleet]:
    made = Fleet(specs, {name.replace("_", ":"): budget for name, budget in budgets.items()}, files or FakeFiles())
    await made.backend.start()
    yield made
    await made.backend.aclose()
    assert all(loader.violations == [] and loader.resident_bytes == 0 for loader in made.loaders.values())


def test_the_local_backend_is_a_backend() -> None:
    backend: Backend = LocalBackend([], {})

    assert backend.snapshots() == ()


async def test_simultaneous_requests_for_a_cold_model_go_to_one_host() -> None:
    async with fleet(fake_specs("a"), FakeFiles(on_disk=()), cuda_0=5000, cuda_1=5000) as here:
        answers = await asyncio.gather(*(here.backend.run(call("a", str(index))) for index in range(30)))

        assert sorted(here.loads("a")) == [0, 1]
        assert here.files.fetches["a"] == 1
        assert all((answer.array()[0] == fake_vector("a", str(index))).all() for index, answer in enumerate(answers))


async def test_simultaneous_requests_for_many_cold_models_do_not_over_commit_one_host() -> None:
    specs = fake_specs(*"abcdef")
    async with fleet(specs, cuda_0=3200, cuda_1=3200) as here:
        here.hold()
        requests = [asyncio.create_task(here.backend.run(call(model_id))) for model_id in specs]
        await let_run()
        here.release()
        await asyncio.gather(*requests)

        assert [loader.loads.total() for loader in here.loaders.values()] == [3, 3]
        assert all(status.evictions == 0 for host in here.backend.snapshots() for status in host.models)


async def test_a_ready_model_is_answered_where_it_is() -> None:
    async with fleet(fake_specs("a"), cuda_0=5000, cuda_1=5000) as here:
        for index in range(5):
            await here.backend.run(call("a", str(index)))

        assert sorted(here.loads("a")) == [0, 1]


async def test_a_model_that_is_ready_twice_is_answered_by_the_less_busy_host() -> None:
    async with fleet(fake_specs("a"), cuda_0=5000, cuda_1=5000) as here:
        gate = asyncio.Event()

        async def wait(seconds: float) -> None:
            if seconds > 0:
                await gate.wait()

        for loader in here.loaders.values():
            loader.embed_s, loader.sleep = 1.0, wait
        for host in here.hosts.values():
            await host.preload("a")
        requests = [asyncio.create_task(here.backend.run(call("a"))) for _ in range(6)]
        await let_run()

        assert [host.status("a").leases for host in here.hosts.values()] == [3, 3]

        gate.set()
        await asyncio.gather(*requests)


async def test_a_copy_that_cannot_be_had_costs_no_request_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    specs = {"a": ModelSpec(model_id="a", source="fake/a", replicas=2)}
    async with fleet(specs, cuda_0=5000, cuda_1=5000) as here:
        gate = asyncio.Event()

        async def wait(seconds: float) -> None:
            if seconds > 0:
                await gate.wait()

        async def refuse(model_id: str, **asked: bool) -> ModelStatus:
            refused.append(model_id)
            raise ModelTooLarge("no room for a copy")

        refused: list[str] = []
        for loader in here.loaders.values():
            loader.embed_s, loader.sleep = 1.0, wait
        await here.hosts["cuda:0"].preload("a")
        monkeypatch.setattr(here.hosts["cuda:1"], "preload", refuse)
        requests = [asyncio.create_task(here.backend.run(call("a"))) for _ in range(2)]
        await let_run()
        gate.set()
        answers = await asyncio.gather(*requests)

    assert refused, "a copy was wanted"
    assert [len(answer.token_counts) for answer in answers] == [1, 1]


async def test_a_model_stays_on_the_devices_that_its_entry_names() -> None:
    specs = {
        "a": ModelSpec(model_id="a", source="x", device="cuda:1"),
        "b": ModelSpec(model_id="b", source="x", device="cpu"),
    }
    async with fleet(specs, cpu=5000, cuda_0=5000, cuda_1=5000) as here:
        await here.backend.run(call("a"))
        await here.backend.run(call("b"))

        assert (here.loads("a"), here.loads("b")) == ([0, 0, 1], [1, 0, 0])


async def test_a_model_for_a_device_that_is_not_here_says_so() -> None:
    async with fleet({"a": ModelSpec(model_id="a", source="x", device="cuda:7")}, cpu=5000) as here:
        with pytest.raises(LoadFailed, match="requires device 'cuda:7'; this server has cpu"):
            await here.backend.run(call("a"))


async def test_an_unknown_model_is_not_found() -> None:
    async with fleet(fake_specs("a"), cpu=5000) as here:
        with pytest.raises(ModelNotFound):
            await here.backend.run(call("nobody"))
        with pytest.raises(ModelNotFound):
            await here.backend.plan("nobody")


async def test_a_model_goes_to_the_one_device_that_is_large_enough() -> None:
    files = FakeFiles(on_disk=(), weight_bytes={"a": 4000})
    async with fleet(fake_specs("a"), files, cuda_0=2000, cuda_1=9000, cuda_2=3000) as here:
        await here.backend.run(call("a"))

        assert here.loads("a") == [0, 1, 0]


async def test_a_model_too_large_for_every_device_is_refused() -> None:
    files = FakeFiles(on_disk=(), weight_bytes={"a": 10_000})
    async with fleet(fake_specs("a"), files, cuda_0=2000, cuda_1=9000) as here:
        with pytest.raises(ModelTooLarge):
            await here.backend.run(call("a"))
        with pytest.raises(ModelTooLarge):
            await here.backend.preload("a")

        assert files.fetches["a"] == 0


async def first_choice(here: Fleet, model_id: str) -> str:
    """Return the device where a cold model would be loaded."""
    return (await here.backend.plan(model_id)).host_id


def break_loads(here: Fleet, device: str, model_id: str, error: Exception) -> None:
    """Make every load of the model on that device fail."""
    here.loaders[device]._loads = Attempts({model_id: [error] * 99})


@pytest.mark.parametrize(
    "error", [RuntimeError("CUDA error"), OutOfMemory("full"), SelfCheckFailed("wrong vectors"), MemoryError()]
)
async def test_a_load_that_fails_on_one_device_is_tried_on_another_before_requests_fail(error: Exception) -> None:
    async with fleet(fake_specs("a"), cuda_0=5000, cuda_1=5000) as here:
        sick = await first_choice(here, "a")
        break_loads(here, sick, "a", error)

        answers = await asyncio.gather(*(here.backend.run(call("a", str(index))) for index in range(5)))
        loads = here.loaders[sick].loads["a"]
        again = await here.backend.run(call("a"))

        assert all((answer.array()[0] == fake_vector("a", str(index))).all() for index, answer in enumerate(answers))
        assert len(again.token_counts) == 1
        assert here.hosts[sick].status("a").state == "failed"
        assert here.loaders[sick].loads["a"] == loads, "a sick device was tried again while another has the model"


async def test_a_cold_model_that_failed_somewhere_goes_elsewhere_at_once() -> None:
    async with fleet(fake_specs("a"), cuda_0=5000, cuda_1=5000) as here:
        sick = await first_choice(here, "a")
        break_loads(here, sick, "a", RuntimeError("CUDA error"))
        await here.backend.run(call("a"))
        await here.backend.evict("a")

        assert await first_choice(here, "a") != sick


async def test_when_no_device_can_load_it_the_caller_gets_retry_after() -> None:
    async with fleet(fake_specs("a"), cuda_0=5000, cuda_1=5000, cuda_2=900) as here:
        for device in ("cuda:0", "cuda:1"):
            break_loads(here, device, "a", RuntimeError("CUDA error"))
        with pytest.raises(LoadFailed, match=r"'a' failed to load \(load\)"):
            await here.backend.run(call("a"))

        assert here.loads("a")[:2] == [1, 1]


async def test_what_every_device_would_say_alike_is_said_after_the_first() -> None:
    files = FakeFiles(on_disk=(), failures={"a": [HubUnreachable("no hub")] * 9})
    async with fleet(fake_specs("a"), files, cuda_0=5000, cuda_1=5000) as here:
        with pytest.raises(LoadFailed, match="hub_unreachable"):
            await here.backend.run(call("a"))

        assert files.fetches["a"] == 1


async def test_a_device_whose_memory_other_processes_hold_passes_the_call_on() -> None:
    async with fleet(fake_specs("a", "b"), cuda_0=5000, cuda_1=5000) as here:
        taken = await first_choice(here, "a")
        memory = here.worlds[taken].memory
        assert isinstance(memory, FakeMemory)
        memory.ceiling_bytes = 300

        answer = await asyncio.wait_for(here.backend.run(call("a")), 5)

        assert (answer.array()[0] == fake_vector("a", "x")).all()
        assert here.loaders[taken].loads["a"] == 0
        assert await first_choice(here, "b") != taken


async def test_a_preload_goes_on_to_another_device_and_is_pinned_where_it_is_ready() -> None:
    async with fleet(fake_specs("a"), cuda_0=5000, cuda_1=5000) as here:
        sick = await first_choice(here, "a")
        break_loads(here, sick, "a", RuntimeError("CUDA error"))

        status = await here.backend.preload("a", pin=True)

        assert (status.host_id != sick, status.state, status.pinned) == (True, "ready", True)
        assert not here.hosts[sick].status("a").pinned


async def test_pinned_and_preloaded_models_are_loaded_once_each_at_the_start() -> None:
    specs = {
        **fake_specs("lazy"),
        "pinned": ModelSpec(model_id="pinned", source="x", pinned=True),
        "warm": ModelSpec(model_id="warm", source="y", preload=True),
    }
    async with fleet(specs, cuda_0=5000, cuda_1=5000) as here:
        await let_run()

        assert (sum(here.loads("pinned")), sum(here.loads("warm")), sum(here.loads("lazy"))) == (1, 1, 0)


async def test_a_reload_brings_new_models_and_loads_those_that_are_wanted() -> None:
    async with fleet(fake_specs("a", "b"), cuda_0=5000, cuda_1=5000) as here:
        await here.backend.run(call("a"))
        specs = {**fake_specs("a"), "c": ModelSpec(model_id="c", source="x", preload=True)}

        await here.backend.reload(specs)
        await let_run()

        assert (sum(here.loads("a")), sum(here.loads("c"))) == (1, 1)
        with pytest.raises(ModelNotFound):
            await here.backend.run(call("b"))
        await here.backend.reload(specs)
        await let_run()
        assert sum(here.loads("c")) == 1


async def test_evict_frees_the_model_everywhere() -> None:
    async with fleet(fake_specs("a"), cuda_0=5000, cuda_1=5000) as here:
        for host in here.hosts.values():
            await host.preload("a", pin=True)
        with pytest.raises(ModelPinned):
            await here.backend.evict("a")

        statuses = await here.backend.evict("a", force=True)

        assert [(status.host_id, status.state) for status in statuses] == [("cuda:0", "cold"), ("cuda:1", "cold")]


async def test_a_plan_is_that_of_the_best_host() -> None:
    async with fleet(fake_specs("a", "b"), cuda_0=1500, cuda_1=1500) as here:
        await here.backend.run(call("a"))
        home = next(host.host_id for host in here.backend.snapshots() if host.residents)

        assert (await here.backend.plan("a")).host_id == home
        assert (await here.backend.plan("b")).host_id != home
        assert (await here.backend.plan("b")).evict == ()


async def test_events_of_all_hosts_come_as_one_stream_and_can_be_caught_up_with() -> None:
    async with fleet(fake_specs("a", "b"), cuda_0=1500, cuda_1=1500) as here:
        followed = here.backend.events()
        await asyncio.gather(*(here.backend.run(call(model_id)) for model_id in "ab"))
        live = [await anext(followed) for _ in range(8)]
        assert isinstance(followed, AsyncIterator)

        caught_up = here.backend.events({"cuda:0": 0})
        again = [await anext(caught_up) for _ in range(4)]

        assert {event.host_id for event in live} == {"cuda:0", "cuda:1"}
        assert [event.seq for event in again] == [1, 2, 3, 4]
        assert {event.host_id for event in again} == {"cuda:0"}
        for stream in (followed, caught_up):
            await stream.aclose()  # type: ignore[attr-defined]  # an async generator


async def test_closing_ends_everything_and_tells_what_the_hosts_shared() -> None:
    async with fleet(fake_specs("a"), cuda_0=1500, cuda_1=1500) as here:
        seen: list[Event] = []

        async def follow() -> None:
            seen.extend([event async for event in here.backend.events()])

        following = asyncio.create_task(follow())
        await let_run()
        await here.backend.run(call("a"))

        await here.backend.aclose()
        await following

        await here.backend.aclose()
        assert here.closed == 1
        assert seen[-1].cause == "its memory is free"
        with pytest.raises(ShuttingDown):
            await here.backend.run(call("a"))
