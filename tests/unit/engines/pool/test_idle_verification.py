"""Files are hashed while the host is idle; a model with damaged files is evicted, and reloaded after a new download."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from engines.errors import BrokenFiles, FilesChanged, HubUnreachable, SelfCheckFailed
from engines.host import Host
from engines.pool.idle_verification import IDLE_S, RECHECK_S
from engines.spec import ModelSpec
from engines.testing.fakes import FakeFiles, FakeLoader, FakeTime, fake_host, fake_runtime
from engines.testing.runtime import let_run
from engines.types import EmbedCall, ModelFiles


class Idle:
    """A host that is checked every second."""

    def __init__(self, *models: str, files: FakeFiles, loader: FakeLoader) -> None:
        self.time, self.files, self.loader = FakeTime(), files, loader
        self.host: Host = fake_host(*models, files=files, loader=loader, runtime=fake_runtime(time=self.time))

    async def embed(self, model_id: str) -> None:
        await self.host.run(EmbedCall(model_id=model_id, texts=("x",)))

    async def watch(self, seconds: float) -> None:
        for _ in range(int(seconds)):
            self.host.check()
            await let_run()
            await self.time.advance(1)


@asynccontextmanager
async def idle(*models: str, files: FakeFiles | None = None, loader: FakeLoader | None = None) -> AsyncIterator[Idle]:
    made = Idle(*models, files=files or FakeFiles(), loader=loader or FakeLoader())
    await made.host.start()
    yield made
    await made.host.aclose(grace_s=0)


async def test_models_are_verified_in_idle_time_those_in_memory_first() -> None:
    async with idle("a", "b", "c") as here:
        await here.embed("b")
        await here.watch(IDLE_S - 1)
        before = list(here.files.verified)
        await here.watch(10)

    assert before == []
    assert here.files.verified == ["b", "a", "c"]


async def test_nothing_is_verified_under_traffic() -> None:
    async with idle("a") as here:
        for _ in range(20):
            await here.embed("a")
            await here.watch(1)

    assert here.files.verified == []


async def test_a_request_pauses_what_is_under_way() -> None:
    class Asking(FakeFiles):
        answers: list[bool]

        def verify(self, spec: ModelSpec, files: ModelFiles, go_on: object, *, is_anew: bool = False) -> None:
            assert callable(go_on)
            here.host._pool._state.holders[99] = here.host._pool._state.current["a"]
            paused = go_on()
            del here.host._pool._state.holders[99]
            self.answers = [paused, go_on()]

    files = Asking()
    async with idle("a", files=files) as here:
        await here.watch(2)

    assert files.answers == [False, True]


async def test_a_model_is_looked_at_again_after_a_while() -> None:
    async with idle("a") as here:
        await here.watch(RECHECK_S)
        once = len(here.files.verified)
        await here.watch(2)

    assert (once, len(here.files.verified)) == (1, 2)


async def test_a_model_in_memory_whose_file_is_damaged_comes_back_from_a_good_one() -> None:
    async with idle("a") as here:
        await here.embed("a")
        here.files.damaged.add("a")
        await here.watch(IDLE_S + 3)
        status = here.host.status("a")
        events = here.host.events_since(0)
        await here.embed("a")

    assert here.files.discarded == [("a", "weights")]
    assert (here.files.fetches["a"], here.loader.loads["a"]) == (1, 2)
    assert (status.state, status.last_error) == ("ready", None)
    assert [event.reason for event in events if event.target == "unloading"][:1] == ["damaged"]
    assert any("broken_files" in event.reason for event in events)


async def test_a_damaged_model_that_cannot_be_fetched_is_refused_and_says_why() -> None:
    files = FakeFiles(failures={"a": [HubUnreachable("the hub is away")]})
    async with idle("a", files=files) as here:
        await here.embed("a")
        files.damaged.add("a")
        await here.watch(IDLE_S + 3)
        status = here.host.status("a")
        await here.watch(15)
        later = here.host.status("a")

    assert (status.state, here.loader.resident_bytes) == ("failed", 0)
    assert "the hub is away" in (status.last_error or "")
    assert later.state == "ready", "what was in memory is wanted there again"


async def test_a_damaged_model_that_is_not_in_memory_says_so_and_is_fetched_when_it_is_asked_for() -> None:
    class FilesDamaged(FakeFiles):
        def is_current(self, spec: ModelSpec, files: ModelFiles) -> bool:
            return spec.model_id not in self.damaged

        def locate(self, spec: ModelSpec) -> ModelFiles | None:
            return None if spec.model_id in self.damaged else super().locate(spec)

        def fetch(self, spec: ModelSpec, on_progress: object) -> ModelFiles:
            assert callable(on_progress)
            self.damaged.discard(spec.model_id)
            return super().fetch(spec, on_progress)

    files = FilesDamaged()
    async with idle("a", files=files) as here:
        files.damaged.add("a")
        await here.watch(3)
        status = here.host.status("a")
        await here.embed("a")

    assert (status.state, status.last_error) == ("cold", "broken_files: weights are damaged")
    assert (files.fetches["a"], here.loader.loads["a"]) == (1, 1)


async def test_a_model_whose_files_were_replaced_is_loaded_from_the_new_ones() -> None:
    class Replaced(FakeFiles):
        is_replaced = False

        def verify(self, spec: ModelSpec, files: ModelFiles, go_on: object, *, is_anew: bool = False) -> None:
            if self.is_replaced:
                self.is_replaced = False
                raise FilesChanged("replaced")

    files = Replaced()
    async with idle("a", files=files) as here:
        await here.embed("a")
        files.is_replaced = True
        await here.watch(IDLE_S + 3)
        status = here.host.status("a")

    assert (here.loader.loads["a"], files.fetches["a"], files.discarded) == (2, 0, [])
    assert status.state == "ready"


@pytest.mark.parametrize("error", [SelfCheckFailed("moved by 0.04"), BrokenFiles("config.json is odd", file="config")])
@pytest.mark.parametrize("is_warm_up", [False, True])
async def test_a_load_that_fails_on_a_damaged_file_has_that_file_fetched(error: Exception, is_warm_up: bool) -> None:
    failures = {"a": [error]}
    loader = FakeLoader(warm_failures=failures) if is_warm_up else FakeLoader(failures=failures)
    async with idle("a", loader=loader) as here:
        here.files.damaged.add("a")
        await here.embed("a")

    assert here.files.discarded == [("a", "weights")]
    assert loader.loads["a"] == 2
