"""Models that are parked in main memory and come back, through a host of fakes with a manual clock."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from msgspec import structs

from engines.errors import EngineFailed, SelfCheckFailed
from engines.host import Host
from engines.spec import ModelSpec
from engines.testing.fakes import FakeFiles, FakeLoader, FakeTime, fake_host, fake_runtime, fake_vector
from engines.testing.runtime import InlineWorkers, let_run
from engines.types import Budget, EmbedCall, Embeddings

ONE, TWO = 1500, 2500
"""Budgets that hold one and two of the fakes, which take 1,000 bytes and a workspace of 100."""


class ParkingHarness:
    """A host and its fakes."""

    def __init__(self, *models: str | ModelSpec, host_budget_bytes: int, loader: FakeLoader) -> None:
        listed = [m if isinstance(m, ModelSpec) else ModelSpec(model_id=m, source=f"fake/{m}") for m in models]
        self.specs = {spec.model_id: spec for spec in listed}
        self.time, self.loader, self.files = FakeTime(), loader, FakeFiles()
        self.runtime = fake_runtime(time=self.time)
        self.host: Host = fake_host(
            *models,
            budget_bytes=ONE,
            host_budget_bytes=host_budget_bytes,
            files=self.files,
            loader=loader,
            runtime=self.runtime,
        )

    @property
    def workers(self) -> InlineWorkers:
        assert isinstance(self.runtime.workers, InlineWorkers)
        return self.runtime.workers

    async def embed(self, model_id: str) -> None:
        """Asks a model, which may evict others that are past their minimum residency, and checks its vector."""
        await self.time.advance(10)
        asked = asyncio.create_task(self.host.run(EmbedCall(model_id=model_id, texts=("x",))))
        await let_run()
        answer = await asked
        assert isinstance(answer, Embeddings)
        assert (answer.array()[0] == fake_vector(model_id, "x")).all()

    def states(self) -> dict[str, str]:
        return {status.model_id: status.state for status in self.host.snapshot().models}

    def causes(self, model_id: str) -> list[str]:
        return [event.cause for event in self.host.events_since(0) if event.model_id == model_id]


@asynccontextmanager
async def parking_harness(
    *models: str | ModelSpec, host_budget_bytes: int = TWO, loader: FakeLoader | None = None
) -> AsyncIterator[ParkingHarness]:
    """Runs a host; checks at the end that no engine was misused, and that the shutdown frees both memories."""
    made = ParkingHarness(*models, host_budget_bytes=host_budget_bytes, loader=loader or FakeLoader())
    await made.host.start()
    yield made
    await let_run()
    await made.host.aclose(grace_s=1)
    assert made.loader.violations == []
    assert made.loader.resident_bytes == 0
    assert made.host.snapshot().host_used_bytes == 0


async def test_a_model_that_leaves_for_another_is_parked_and_comes_back_without_a_load() -> None:
    async with parking_harness("a", "b") as here:
        await here.embed("a")
        await here.embed("b")
        assert here.states() == {"a": "parked", "b": "ready"}
        here.files.on_disk.clear()

        await here.embed("a")

        assert here.states() == {"a": "ready", "b": "parked"}
        assert here.loader.loads == {"a": 1, "b": 1}
        assert here.host.status("a").wakes == 1


async def test_a_parked_model_is_charged_to_main_memory_only() -> None:
    async with parking_harness("a", "b") as here:
        await here.embed("a")
        await here.embed("b")

        snapshot = here.host.snapshot()

        assert (snapshot.used_bytes, snapshot.host_used_bytes, snapshot.host_budget_bytes) == (1000, 1000, TWO)
        assert snapshot.parked == ("a",)
        assert (here.host.status("a").weight_bytes, here.host.status("a").host_bytes) == (0, 1000)


async def test_without_a_host_budget_models_leave_memory_as_before() -> None:
    async with parking_harness("a", "b", host_budget_bytes=0) as here:
        await here.embed("a")
        await here.embed("b")

        assert here.states() == {"a": "cold", "b": "ready"}
        assert not any(event.target == "parking" for event in here.host.events_since(0))


async def test_the_coldest_parked_model_leaves_main_memory_for_a_warmer_one() -> None:
    async with parking_harness("a", "b", "c", "d") as here:
        for model_id in "abcd":
            await here.embed(model_id)

        assert here.states() == {"a": "cold", "b": "parked", "c": "parked", "d": "ready"}
        assert "left main memory for c, which takes 1000 B" in here.causes("a")


async def test_a_model_larger_than_the_host_budget_is_unloaded() -> None:
    async with parking_harness("a", "b", host_budget_bytes=900) as here:
        await here.embed("a")
        await here.embed("b")

        assert here.states() == {"a": "cold", "b": "ready"}


async def test_a_model_that_cannot_be_parked_is_unloaded() -> None:
    loader = FakeLoader(park_failures={"a": [EngineFailed("on its fallback path")]})
    async with parking_harness("a", "b", loader=loader) as here:
        await here.embed("a")
        await here.embed("b")

        assert here.states() == {"a": "cold", "b": "ready"}


async def test_a_model_that_comes_back_with_other_vectors_is_loaded_from_its_files_for_the_same_request() -> None:
    loader = FakeLoader(wake_failures={"a": [SelfCheckFailed("other vectors")]})
    async with parking_harness("a", "b", loader=loader) as here:
        await here.embed("a")
        await here.embed("b")

        await here.embed("a")

        assert here.loader.loads["a"] == 2
        assert "could not be brought back from main memory (self_check_failed)" in here.causes("a")


async def test_a_request_that_comes_while_its_model_is_being_parked_waits_and_wakes_it() -> None:
    async with parking_harness("a", "b") as here:
        await here.embed("a")
        await here.embed("b")
        await here.time.advance(10)
        here.workers.hold("load")
        evicted = asyncio.create_task(here.host.evict("b", to="host"))
        await let_run()
        assert here.states()["b"] == "parking"
        asked = asyncio.create_task(here.host.run(EmbedCall(model_id="b", texts=("x",))))
        await let_run()
        here.workers.release("load")

        await asked
        await evicted

        assert here.loader.loads["b"] == 1


async def test_an_operator_evicts_to_main_memory_or_to_disk() -> None:
    async with parking_harness("a") as here:
        await here.embed("a")

        parked = await here.host.evict("a", to="host")
        cold = await here.host.evict("a")

        assert (parked.state, parked.host_bytes) == ("parked", 1000)
        assert (cold.state, cold.host_bytes) == ("cold", 0)


async def test_an_idle_model_is_parked_and_leaves_main_memory_after_its_host_keep_alive() -> None:
    spec = ModelSpec(model_id="a", source="fake/a", keep_alive_s=5.0, host_keep_alive_s=60.0)
    async with parking_harness(spec) as here:
        await here.embed("a")
        await here.time.advance(6)
        assert here.states() == {"a": "parked"}

        await here.time.advance(70)

        assert here.states() == {"a": "cold"}


async def test_a_smaller_host_budget_frees_parked_models() -> None:
    async with parking_harness("a", "b") as here:
        await here.embed("a")
        await here.embed("b")

        here.host.set_host_budget(0)
        await let_run()

        assert here.states() == {"a": "cold", "b": "ready"}


async def test_a_registry_with_a_smaller_host_budget_frees_parked_models_in_the_order_of_eviction() -> None:
    async with parking_harness("a", "b", "c", host_budget_bytes=3000) as here:
        here.host.config = structs.replace(here.host.config, host_parts=2, default_host_bytes=2000)
        for model_id in "abc":
            await here.embed(model_id)
        assert here.states() == {"a": "parked", "b": "parked", "c": "ready"}

        await here.host.reload(here.specs, None, Budget(size_bytes=3000))  # of the machine: half of it is this host's
        await let_run()

        assert here.host.snapshot().host_budget_bytes == 1500
        assert here.states() == {"a": "cold", "b": "parked", "c": "ready"}


async def test_a_registry_without_a_host_budget_returns_to_the_default_of_the_machine() -> None:
    async with parking_harness("a", "b", host_budget_bytes=0) as here:
        here.host.config = structs.replace(here.host.config, default_host_bytes=2000)

        await here.host.reload(here.specs)
        assert here.host.snapshot().host_budget_bytes == 0
        await here.host.reload(here.specs, None, "auto")
        await here.embed("a")
        await here.embed("b")

        assert here.host.snapshot().host_budget_bytes == 2000
        assert here.states() == {"a": "parked", "b": "ready"}


async def test_a_parked_model_that_leaves_the_registry_is_freed() -> None:
    async with parking_harness("a", "b") as here:
        await here.embed("a")
        await here.embed("b")

        await here.host.reload({"b": ModelSpec(model_id="b", source="fake/b")})
        await let_run()

        assert here.states() == {"b": "ready"}
        assert here.loader.resident_bytes == 1000


async def test_a_plan_for_a_parked_model_counts_a_copy_instead_of_a_load() -> None:
    async with parking_harness("a", "b") as here:
        await here.embed("a")
        await here.embed("b")

        plan = here.host.plan("a")

        assert (plan.state, plan.evict) == ("parked", ("b",))
        assert plan.seconds is not None
        assert plan.seconds < 1e-3
