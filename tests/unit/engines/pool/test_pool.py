"""`ModelPool` on a real event loop, with a manual clock, inline workers, and engines that record every misuse."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from random import Random

import pytest

from engines.errors import (
    BrokenFiles,
    HubUnreachable,
    LoadFailed,
    ModelInUse,
    ModelLoading,
    ModelNotFound,
    OutOfMemory,
    SelfCheckFailed,
    ShuttingDown,
)
from engines.host import Host, HostRuntime
from engines.spec import ModelSpec
from engines.testing.fakes import FakeFiles, FakeLoader, FakeTime, InlineWorkers, fake_host, fake_runtime, fake_vector
from engines.testing.runtime import FakeMemory, let_run
from engines.types import EmbedCall, Embeddings, ModelStatus, State


def call(
    model_id: str, text: str = "x", *, keep_alive_s: float | None = None, load_timeout_s: float = 1e9
) -> EmbedCall:
    return EmbedCall(model_id=model_id, texts=(text,), keep_alive_s=keep_alive_s, load_timeout_s=load_timeout_s)


class PoolHarness:
    """A host and the fakes that its test controls."""

    def __init__(self, *models: str | ModelSpec, budget_bytes: int, loader: FakeLoader, files: FakeFiles) -> None:
        self.time = FakeTime()
        self.runtime: HostRuntime = fake_runtime(time=self.time)
        self.files = files
        self.loader = loader
        self.host: Host = fake_host(
            *models, budget_bytes=budget_bytes, files=files, loader=loader, runtime=self.runtime
        )

    @property
    def workers(self) -> InlineWorkers:
        assert isinstance(self.runtime.workers, InlineWorkers)
        return self.runtime.workers

    @property
    def memory(self) -> FakeMemory:
        assert isinstance(self.runtime.memory, FakeMemory)
        return self.runtime.memory

    def ask(self, call: EmbedCall) -> asyncio.Task[Embeddings]:
        async def run() -> Embeddings:
            answer = await self.host.run(call)
            assert isinstance(answer, Embeddings)
            return answer

        return asyncio.create_task(run())

    async def until(self, model_id: str, state: State) -> None:
        """Returns in the same iteration of the event loop in which the model reaches the state."""
        for _ in range(100):
            if self.host.state(model_id) == state:
                return
            await asyncio.sleep(0)
        raise AssertionError(f"{model_id} is {self.host.state(model_id)}, not {state}")

    def leases(self) -> int:
        return sum(status.leases for status in self.host.snapshot().models)


@asynccontextmanager
async def pool_harness(
    *models: str | ModelSpec,
    budget_bytes: int = 10**6,
    loader: FakeLoader | None = None,
    files: FakeFiles | None = None,
) -> AsyncIterator[PoolHarness]:
    """Runs a host; checks at the end that no lease is left, no engine was misused, and all memory is freed."""
    made = PoolHarness(*models, budget_bytes=budget_bytes, loader=loader or FakeLoader(), files=files or FakeFiles())
    await made.host.start()
    yield made
    await let_run()
    assert made.leases() == 0
    closing = asyncio.create_task(made.host.aclose(grace_s=1))
    await made.time.advance(20)
    await closing
    assert made.loader.violations == []
    assert made.loader.resident_bytes == 0


async def test_a_cold_model_is_loaded_and_answers_with_right_vectors() -> None:
    async with pool_harness("a") as here:
        answer = await here.host.run(call("a", "hello"))

        assert (answer.array()[0] == fake_vector("a", "hello")).all()
        assert here.host.status("a").state == "ready"


async def test_twenty_requests_for_a_cold_model_load_it_once() -> None:
    async with pool_harness("a", files=FakeFiles(on_disk=())) as here:
        answers = await asyncio.gather(*(here.host.run(call("a", str(index))) for index in range(20)))

        assert all((answer.array()[0] == fake_vector("a", str(index))).all() for index, answer in enumerate(answers))
        assert (here.files.fetches["a"], here.loader.loads["a"]) == (1, 1)


async def test_a_lease_on_a_ready_model_takes_no_turn_of_the_loop() -> None:
    async with pool_harness("a") as here:
        await here.host.run(call("a"))
        lease = here.host._pool.lease(call("a"))

        entering = lease.__aenter__()

        with pytest.raises(StopIteration):
            entering.send(None)  # a coroutine that ends at its first step has never suspended
        await lease.__aexit__(None, None, None)


async def test_when_the_first_requester_disconnects_the_second_gets_its_answer() -> None:
    async with pool_harness("a") as here:
        here.workers.hold("load")
        first, second = here.ask(call("a", "one")), here.ask(call("a", "two"))
        await let_run()
        first.cancel()
        await let_run()

        here.workers.release("load")

        assert ((await second).array()[0] == fake_vector("a", "two")).all()
        assert here.loader.loads["a"] == 1


@pytest.mark.parametrize("num_models", [1, 2])
async def test_cancelled_after_any_number_of_steps_a_request_gives_back_its_lease(num_models: int) -> None:
    """Cancels at every await of a request: with two models, half of the requests must wait for an eviction."""
    survived = 0
    for steps in range(40):
        loader = FakeLoader(workspace_bytes={})
        async with pool_harness(*"ab"[:num_models], budget_bytes=1500, loader=loader) as here:
            await here.host.run(call("ab"[num_models - 1]))
            await here.time.advance(10)
            request = here.ask(call("a"))
            await let_run(steps)
            request.cancel()
            outcome = (await asyncio.gather(request, return_exceptions=True))[0]
            survived += isinstance(outcome, Embeddings)

            await let_run()

            assert here.leases() == 0
            assert isinstance(outcome, Embeddings | asyncio.CancelledError)
    assert 0 < survived < 40


async def test_a_grant_and_a_cancellation_in_the_same_tick_leave_no_lease() -> None:
    async with pool_harness("a") as here:
        here.workers.hold("load")
        request = here.ask(call("a"))
        await let_run()
        here.workers.release("load")
        await here.until("a", "ready")
        assert (here.leases(), request.done()) == (1, False)

        request.cancel()

        with pytest.raises(asyncio.CancelledError):
            await request
        assert here.leases() == 0
        assert here.host.status("a").state == "ready"


async def test_of_a_hundred_waiters_sixty_leave_at_random_and_nothing_leaks() -> None:
    for seed in range(10):
        random = Random(seed)
        async with pool_harness("a") as here:
            here.workers.hold("load")
            requests = [here.ask(call("a", str(index))) for index in range(100)]
            leaving = random.sample(range(100), 60)
            for index in leaving[:30]:
                await let_run(random.randrange(3))
                requests[index].cancel()
            here.workers.release("load")
            for index in leaving[30:]:
                await let_run(random.randrange(2))
                requests[index].cancel()

            outcomes = await asyncio.gather(*requests, return_exceptions=True)

            answered = [index for index, outcome in enumerate(outcomes) if isinstance(outcome, Embeddings)]
            assert set(range(100)) - set(leaving) <= set(answered)
            assert (here.leases(), here.host.status("a").waiters, here.loader.loads["a"]) == (0, 0, 1)


async def test_six_models_with_a_budget_for_two_over_300_interleaved_requests() -> None:
    async with pool_harness(*"abcdef", budget_bytes=2100, loader=FakeLoader(embed_s=0.05)) as here:
        here.loader.sleep = here.time.sleep
        random = Random(1)
        asked = [(random.choice("abcdef"), f"text {index}") for index in range(300)]
        requests: list[asyncio.Task[Embeddings]] = []
        highest = 0
        for start in range(0, 300, 10):
            requests += [here.ask(call(model_id, text)) for model_id, text in asked[start : start + 10]]
            await here.time.advance(1.0)
            highest = max(highest, here.host.snapshot().used_bytes, here.loader.resident_bytes)
        for _ in range(100):
            await here.time.advance(2.0)
            highest = max(highest, here.host.snapshot().used_bytes, here.loader.resident_bytes)

        answers = await asyncio.gather(*requests)

        pairs = zip(asked, answers, strict=True)
        assert all((answer.array()[0] == fake_vector(model_id, text)).all() for (model_id, text), answer in pairs)
        assert highest == 2000
        assert max(here.loader.loads.values()) > 1


async def test_two_models_that_cannot_both_fit_both_progress_under_constant_load() -> None:
    async with pool_harness("a", "b", budget_bytes=1500) as here:
        here.loader.embed_s, here.loader.sleep = 0.5, here.time.sleep
        served = {"a": 0, "b": 0}
        followed = here.host.events()

        async def client(model_id: str) -> None:
            while True:
                await here.host.run(call(model_id))
                served[model_id] += 1

        clients = [asyncio.create_task(client(model_id)) for model_id in "aabb"]
        await here.time.advance(60)
        for task in clients:
            task.cancel()
        await asyncio.gather(*clients, return_exceptions=True)

        assert min(served.values()) > 20
        assert 2 <= here.loader.loads.total() <= 60 / 5 + 2
        seen = [await anext(followed) for _ in range(40)]
        assert any(event.missing_bytes == 600 and "take turns" in event.cause for event in seen)


async def test_a_caller_whose_load_timeout_ends_gets_an_error_and_the_load_goes_on() -> None:
    async with pool_harness("a") as here:
        here.workers.hold("load")
        request = here.ask(call("a", load_timeout_s=5))
        await here.time.advance(5)

        with pytest.raises(ModelLoading, match="the load continues"):
            await request

        here.workers.release("load")
        await let_run()
        assert here.host.status("a").state == "ready"


async def test_a_ready_model_answers_while_another_is_fetched_and_loaded() -> None:
    async with pool_harness("a", "b", files=FakeFiles(on_disk=("a",))) as here:
        await here.host.run(call("a"))
        for kind in ("fetch", "load"):
            here.workers.hold(kind)
            cold = here.ask(call("b"))
            await let_run()
            await here.host.run(call("a"))
            assert not cold.done()
            here.workers.release(kind)
            await cold
            await here.host.evict("b")


async def test_a_quarantine_holds_and_ends_by_the_clock() -> None:
    files = FakeFiles(on_disk=(), failures={"a": [HubUnreachable("the hub answers 503")]})
    async with pool_harness("a", files=files) as here:
        with pytest.raises(LoadFailed, match="the hub answers 503") as failed:
            await here.host.run(call("a"))
        assert (failed.value.kind, failed.value.retry_after_s) == ("hub_unreachable", 10)
        assert here.host.status("a").last_error == "hub_unreachable: the hub answers 503"
        assert here.host.status("a").retry_at == here.time.unix_s() + 10
        await here.time.advance(9)
        with pytest.raises(LoadFailed):
            await here.host.run(call("a"))
        assert files.fetches["a"] == 1

        await here.time.advance(1)
        await here.host.run(call("a"))

        assert files.fetches["a"] == 2


async def test_every_waiter_gets_the_cause_of_a_failed_load() -> None:
    loader = FakeLoader(failures={"a": [RuntimeError("/secret/path/model.safetensors")]})
    async with pool_harness("a", loader=loader) as here:
        outcomes = await asyncio.gather(*(here.host.run(call("a")) for _ in range(5)), return_exceptions=True)

        assert [type(outcome) for outcome in outcomes] == [LoadFailed] * 5
        assert "RuntimeError; the server's log has the details" in str(outcomes[0])
        assert "secret" not in str(outcomes[0])


async def test_a_failed_warm_up_frees_the_engine_and_is_reported() -> None:
    loader = FakeLoader(warm_failures={"a": [SelfCheckFailed("cosine 0.2 to the reference")]})
    async with pool_harness("a", loader=loader) as here:
        with pytest.raises(LoadFailed, match=r"cosine 0\.2"):
            await here.host.run(call("a"))
        await let_run()

        assert loader.resident_bytes == 0
        assert here.host.snapshot().used_bytes == 0


@pytest.mark.parametrize(
    "error", [OutOfMemory("no"), MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
async def test_out_of_memory_evicts_and_tries_once_more(error: Exception) -> None:
    async with pool_harness("a", "b", budget_bytes=2300, loader=FakeLoader(failures={"b": [error]})) as here:
        await here.host.run(call("a"))
        await here.time.advance(10)

        await here.host.run(call("b"))

        assert here.loader.loads["b"] == 2
        assert here.host.status("a").state == "cold"


async def test_a_broken_file_is_fetched_anew() -> None:
    loader = FakeLoader(failures={"a": [BrokenFiles("size differs", file="model.safetensors")]})
    async with pool_harness("a", loader=loader) as here:
        await here.host.run(call("a"))

        assert here.files.discarded == [("a", "model.safetensors")]
        assert here.files.fetches["a"] == 1


async def test_others_using_the_device_are_seen_before_each_load() -> None:
    async with pool_harness("a") as here:
        here.memory.ceiling_bytes = 500
        request = here.ask(call("a"))
        await here.time.advance(3)
        assert here.host.status("a").state == "waiting_space"

        here.memory.ceiling_bytes = None
        await here.time.advance(1)

        assert (await request).dimensions == 16


async def test_an_unreadable_device_does_not_stop_the_queue() -> None:
    async with pool_harness("a") as here:
        healthy = here.memory.read
        here.memory.read = lambda: 1 / 0  # type: ignore[method-assign,assignment,return-value]  # a broken driver

        answer = await here.host.run(call("a"))

        here.memory.read = healthy  # type: ignore[method-assign]  # as above
        assert isinstance(answer, Embeddings)
        assert answer.dimensions == 16


async def test_an_engine_that_cannot_be_closed_does_not_hold_up_the_next_model() -> None:
    async with pool_harness("a", "b", budget_bytes=1500) as here:
        await here.host.run(call("a"))
        broken = here.loader.engines[0]
        broken.close = lambda: 1 / 0  # type: ignore[method-assign,assignment]  # scripted
        await here.time.advance(10)

        await here.host.run(call("b"))

        assert here.host.status("a").state == "cold"
        broken.is_closed = True


async def test_keep_alive_0_frees_the_model_after_the_request() -> None:
    async with pool_harness("a") as here:
        await here.host.run(call("a", keep_alive_s=0))
        await let_run()

        assert here.host.status("a").state == "cold"


async def test_idle_models_leave_by_the_clock() -> None:
    async with pool_harness(ModelSpec(model_id="a", source="x", keep_alive_s=60)) as here:
        await here.host.run(call("a"))
        await here.time.advance(40)
        await here.host.run(call("a"))
        await here.time.advance(59)
        assert here.host.status("a").state == "ready"

        await here.time.advance(1)

        assert here.host.status("a").state == "cold"


async def test_evict_waits_for_requests_and_reports() -> None:
    async with pool_harness("a") as here:
        here.loader.embed_s, here.loader.sleep = 5.0, here.time.sleep
        request = here.ask(call("a"))
        await let_run()
        eviction = asyncio.create_task(here.host.evict("a"))
        await here.time.advance(4)
        assert not eviction.done()

        await here.time.advance(1)

        assert (await eviction).state == "cold"
        assert (await request).dimensions == 16


async def test_an_eviction_that_takes_too_long_gives_up_and_the_model_serves_on() -> None:
    async with pool_harness("a") as here:
        here.loader.embed_s, here.loader.sleep = 50.0, here.time.sleep
        request = here.ask(call("a"))
        await let_run()
        eviction = asyncio.create_task(here.host.evict("a", timeout_s=3))
        await here.time.advance(3)

        with pytest.raises(
            ModelInUse, match="model 'a' still has 1 running requests after 3 s; the eviction was cancelled"
        ):
            await eviction

        assert here.host.status("a").state == "ready"
        await here.time.advance(50)
        await request


async def test_preload_waits_until_ready_or_not_at_all() -> None:
    async with pool_harness("a", "b") as here:
        assert (await here.host.preload("a", pin=True)).state == "ready"
        assert here.host.status("a").pinned
        here.workers.hold("load")

        assert (await here.host.preload("b", wait=False)).state == "waiting_space"

        here.workers.release("load")
        await let_run()
        assert here.host.status("b").state == "ready"
        with pytest.raises(ModelNotFound):
            await here.host.preload("nobody", wait=False)


async def begin_load(here: PoolHarness, model_id: str) -> asyncio.Task[ModelStatus]:
    """Starts a preload whose load runs until "load" is released."""
    here.workers.hold("load")
    asked = asyncio.create_task(here.host.preload(model_id))
    await let_run()
    here.workers.release("load")  # the device is read
    here.workers.hold("load")
    await here.until(model_id, "loading")
    return asked


async def test_a_preload_after_an_eviction_is_answered_with_a_model_that_is_ready_and_pinned() -> None:
    async with pool_harness("a") as here:
        first = await begin_load(here, "a")
        evicting = asyncio.create_task(here.host.evict("a"))
        await let_run()
        pinning = asyncio.create_task(here.host.preload("a", pin=True))
        await let_run()
        here.workers.release("load")
        pinned = await pinning

        with pytest.raises(
            ModelInUse, match="'a' was preloaded before its eviction was done; the eviction was cancelled"
        ):
            await evicting
        assert (pinned.state, pinned.pinned, here.host.status("a").state) == ("ready", True, "ready")
        assert (await first).state == "ready"


async def test_a_preload_overtaken_by_a_later_eviction_fails() -> None:
    async with pool_harness("a") as here:
        preloading = await begin_load(here, "a")
        evicting = asyncio.create_task(here.host.evict("a"))
        await let_run()
        here.workers.release("load")

        with pytest.raises(ModelInUse, match="'a' was evicted before its preload was done; preload it again"):
            await preloading
        assert (await evicting).state == "cold"


async def test_an_eviction_that_waits_for_a_load_says_so() -> None:
    async with pool_harness("a") as here:
        preloading = await begin_load(here, "a")
        evicting = asyncio.create_task(here.host.evict("a", timeout_s=5))
        await here.time.advance(6)

        with pytest.raises(
            ModelInUse,
            match="'a' is still loading after 5 s, and a load cannot be interrupted; the eviction was cancelled",
        ):
            await evicting
        here.workers.release("load")
        assert (await preloading).state == "ready"


async def test_shutdown_finishes_what_runs_and_refuses_what_comes() -> None:
    async with pool_harness("a") as here:
        here.loader.embed_s, here.loader.sleep = 5.0, here.time.sleep
        running = here.ask(call("a"))
        await let_run()
        closing = asyncio.create_task(here.host.aclose(grace_s=30))
        await let_run()
        with pytest.raises(ShuttingDown):
            await here.host.run(call("a"))
        with pytest.raises(ShuttingDown):
            await here.host.preload("a", wait=False)

        await here.time.advance(5)
        await closing

        assert (await running).dimensions == 16


async def test_at_the_end_of_the_grace_time_requests_are_interrupted_with_an_error() -> None:
    async with pool_harness("a", "b") as here:
        here.loader.embed_s, here.loader.sleep = 500.0, here.time.sleep
        running = here.ask(call("a"))
        await let_run()
        waiting = here.ask(call("b"))
        await here.until("b", "loading")
        here.workers.hold("load")
        closing = asyncio.create_task(here.host.aclose(grace_s=10))
        await here.time.advance(10)
        here.workers.release("load")
        await here.time.advance(10)
        await closing

        with pytest.raises(ShuttingDown, match="before the request was done"):
            await running
        with pytest.raises(ShuttingDown, match="before the request was done"):
            await waiting
        assert here.loader.engines[0].cancelled == 1


async def test_a_request_cancelled_by_its_owner_during_shutdown_stays_cancelled() -> None:
    async with pool_harness("a") as here:
        here.loader.embed_s, here.loader.sleep = 500.0, here.time.sleep
        running = here.ask(call("a"))
        await let_run()
        closing = asyncio.create_task(here.host.aclose(grace_s=10))
        await let_run()
        running.cancel()
        await here.time.advance(1)
        await closing

        assert running.cancelled()


async def test_a_running_download_ends_when_the_host_closes() -> None:
    here = PoolHarness("a", budget_bytes=10**6, loader=FakeLoader(), files=FakeFiles(on_disk=()))
    await here.host.start()
    here.workers.hold("fetch")
    request = here.ask(call("a"))
    await let_run()

    await here.host.aclose(grace_s=1)

    with pytest.raises(ShuttingDown):
        await request
    assert here.loader.loads["a"] == 0


async def test_reload_touches_only_what_changed() -> None:
    async with pool_harness("a", "b") as here:
        await here.host.run(call("a"))
        await here.host.run(call("b"))
        specs = {
            "a": ModelSpec(model_id="a", source="fake/a", description="new words"),
            "b": ModelSpec(model_id="b", source="fake/b", revision="v2"),
            "c": ModelSpec(model_id="c", source="fake/c", device="cuda"),
        }

        await here.host.reload(specs)
        await let_run()

        assert (here.loader.loads["a"], here.loader.loads["b"]) == (1, 2)
        assert here.host.state("c") is None
