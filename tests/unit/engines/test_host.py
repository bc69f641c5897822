"""Tests a host: calls, snapshots, plans and events."""

import asyncio
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from msgspec import structs

from engines.errors import ModelNotFound, ModelTooLarge
from engines.form_cache import FormCache
from engines.host import Host, HostConfig, HostRuntime, device_matches
from engines.pool.estimates import Measurements
from engines.pool.runtime import LOAD_LOCK, Threads
from engines.pool.slot import PoolPolicy
from engines.protocols import Progress
from engines.spec import ModelSpec
from engines.testing.fakes import (
    WIDTH,
    FakeFiles,
    FakeLoader,
    FakeTime,
    fake_host,
    fake_runtime,
    fake_specs,
    fake_vector,
)
from engines.testing.runtime import FakeMemory, let_run
from engines.types import Budget, EmbedCall, Embeddings, Event, ModelFiles


def call(model_id: str) -> EmbedCall:
    return EmbedCall(model_id=model_id, texts=("x",))


def test_the_host_module_does_not_import_torch() -> None:
    code = "import sys, engines.host, engines.testing.fakes, router.backends.local; sys.exit('torch' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


async def test_the_wait_for_a_cold_model_is_timed() -> None:
    time = FakeTime()
    runtime = fake_runtime(time=time)
    host = fake_host("a", loader=FakeLoader(embed_s=2, sleep=time.sleep), runtime=runtime)
    await host.start()
    cold = asyncio.create_task(host.run(call("a")))
    runtime.workers.hold("load")  # type: ignore[attr-defined]  # the fake workers can be held
    await time.advance(3)
    runtime.workers.release("load")  # type: ignore[attr-defined]  # as above
    await time.advance(2)
    warm = asyncio.create_task(host.run(call("a")))
    await time.advance(2)

    timings = [(await cold).timings, (await warm).timings]

    assert [(timing.load_s, timing.forward_s) for timing in timings] == [(3, 2), (0, 2)]


async def test_a_snapshot_adds_up() -> None:
    loader = FakeLoader(weight_bytes={"a": 3000, "b": 2000}, workspace_bytes={"a": 50, "b": 70})
    host = fake_host("a", "b", "c", budget_bytes=10_000, loader=loader)
    await host.start()
    for model_id in "ab":
        await host.run(call(model_id))

    seen = host.snapshot()

    assert (seen.total_bytes, seen.budget_bytes) == (10**9, 10_000)
    assert (seen.used_bytes, seen.workspace_bytes, seen.free_bytes) == (5000, 70, 4930)
    assert [(model.model_id, model.state) for model in seen.models] == [("a", "ready"), ("b", "ready"), ("c", "cold")]
    assert seen.models[0].info is not None and seen.models[0].info.dimensions == 16
    assert (seen.models[0].loads, seen.models[0].leases) == (1, 0)
    await host.aclose()
    assert (host.snapshot().used_bytes, host.snapshot().is_draining) == (0, True)


async def test_residents_are_listed_in_the_order_in_which_they_would_leave() -> None:
    time = FakeTime()
    host = fake_host("a", "b", "c", runtime=fake_runtime(time=time))
    await host.start()
    await host.preload("c", pin=True)
    for model_id in "aba":
        await host.run(call(model_id))
        await time.advance(1)

    assert host.snapshot().residents == ("b", "a", "c")


async def test_waiting_claims_are_counted_for_placement() -> None:
    runtime = fake_runtime()
    host = fake_host("a", "b", runtime=runtime)
    await host.start()
    runtime.workers.hold("load")  # type: ignore[attr-defined]  # the fake workers can be held
    requests = [asyncio.create_task(host.run(call(model_id))) for model_id in "ab"]
    await let_run()

    claimed = host.snapshot().claimed_bytes

    runtime.workers.release("load")  # type: ignore[attr-defined]  # as above
    await asyncio.gather(*requests)
    assert (claimed, host.snapshot().claimed_bytes) == (2000, 0)


async def test_a_plan_says_what_would_happen_without_doing_it() -> None:
    time = FakeTime()
    files = FakeFiles(weight_bytes={"huge": 10**7, "unknown": None})
    host = fake_host("a", "b", "huge", "unknown", budget_bytes=1500, files=files, runtime=fake_runtime(time=time))
    await host.start()
    assert host.plan("a").reason == "fits in free memory"
    await host.run(call("a"))

    plans = {model_id: host.plan(model_id) for model_id in ("a", "b", "huge", "unknown")}

    assert (plans["a"].reason, plans["a"].seconds, plans["a"].fits) == ("ready already", 0.0, True)
    assert (plans["b"].evict, plans["b"].fits, plans["b"].need_bytes, plans["b"].free_bytes) == (
        ("a",),
        True,
        1100,
        400,
    )
    assert plans["b"].reason == "600 B are missing; other models are evicted once idle"
    assert (plans["huge"].fits, plans["huge"].evict) == (False, ())
    assert "it can never fit" in plans["huge"].reason
    assert host.state("b") == "cold"
    await host.preload("a", pin=True)
    assert not host.plan("b").fits
    assert "pinned models use 1.1 KiB" in host.plan("b").reason
    with pytest.raises(ModelNotFound):
        host.plan("nobody")


async def test_the_size_of_a_model_not_on_disk_is_unknown_until_it_is_requested() -> None:
    host = fake_host("a", files=FakeFiles(on_disk=()))
    await host.start()

    assert "size is unknown" in host.plan("a").reason


async def test_the_measured_size_of_a_model_is_stored() -> None:
    measurements = Measurements()
    runtime = fake_runtime()
    runtime = HostRuntime(time=runtime.time, workers=runtime.workers, memory=runtime.memory, measurements=measurements)
    loader = FakeLoader(weight_bytes={"a": 5000}, workspace_bytes={"a": 600})
    host = fake_host("a", loader=loader, runtime=runtime)
    await host.start()
    await host.run(call("a"))
    await let_run()
    second = fake_host("a", loader=loader, runtime=runtime)

    await second.start()

    assert second.plan("a").need_bytes == 5600
    assert second.plan("a").seconds is not None


async def test_a_remembered_size_over_the_budget_is_tried_and_only_a_fresh_measurement_refuses() -> None:
    runtime = fake_runtime()
    first = fake_host("a", loader=FakeLoader(weight_bytes={"a": 5000}), runtime=runtime)
    await first.start()
    await first.run(call("a"))
    await let_run()
    smaller = FakeLoader(weight_bytes={"a": 1200})
    fits = fake_host("a", loader=smaller, runtime=runtime, budget_bytes=1500)
    still_large = FakeLoader(weight_bytes={"a": 5000})
    does_not = fake_host("a", loader=still_large, runtime=runtime, budget_bytes=1500)
    await fits.start()
    await does_not.start()

    assert fits.plan("a").fits
    answer = await fits.run(call("a"))
    assert isinstance(answer, Embeddings)
    assert answer.dimensions == WIDTH
    for _ in range(2):
        with pytest.raises(ModelTooLarge, match=r"needs 5\.0 KiB, but the memory budget is 1\.5 KiB"):
            await does_not.run(call("a"))

    assert (smaller.loads["a"], still_large.loads["a"]) == (1, 1)


async def test_events_are_numbered_and_can_be_caught_up_with() -> None:
    host = fake_host("a")
    await host.start()
    await host.run(call("a"))
    seen: list[Event] = []

    async for event in host.events(after=1):
        seen.append(event)
        if event.target == "ready":
            break

    assert [event.seq for event in seen] == [2, 3, 4, 5]
    assert [event.target for event in seen] == ["waiting_space", "loading", "warming", "ready"]
    assert {event.host_id for event in seen} == {"fake"}


async def test_a_follower_begins_with_what_comes_after_its_call() -> None:
    host = fake_host("a")
    await host.start()
    followed = host.events()
    await host.run(call("a"))

    assert (await anext(followed)).target == "waiting_space"


async def test_a_slow_follower_loses_events_and_sees_the_gap() -> None:
    config = HostConfig(host_id="short", budget=Budget(size_bytes=10**6), max_events=3)
    host = Host(config, fake_specs("a"), FakeFiles(), FakeLoader(), fake_runtime())
    await host.start()
    followed = host.events()
    for _ in range(5):
        await host.run(call("a"))
        await host.evict("a")

    seqs = [(await anext(followed)).seq for _ in range(3)]

    assert seqs == [seqs[0], seqs[0] + 1, seqs[0] + 2]
    assert seqs[0] > 2


async def test_a_position_from_an_earlier_process_returns_all_buffered_events() -> None:
    host = fake_host("a")
    await host.start()

    assert (await anext(host.events(after=10_000))).seq == 1


async def test_followers_end_when_the_host_closes() -> None:
    host = fake_host("a")
    await host.start()
    following = asyncio.create_task(_count(host))
    await host.run(call("a"))

    await host.aclose()

    assert await following > 5


async def _count(host: Host) -> int:
    return len([event async for event in host.events()])


async def test_a_model_for_another_device_is_not_served_here() -> None:
    host = fake_host(ModelSpec(model_id="a", source="x", device="cuda"))
    await host.start()

    with pytest.raises(ModelNotFound):
        await host.run(call("a"))


@pytest.mark.parametrize(
    ("device", "wish", "expected"),
    [
        ("cpu", "auto", True),
        ("cpu", "cpu", True),
        ("cpu", "cuda", False),
        ("cuda:1", "cuda", True),
        ("cuda:1", "cuda:1", True),
        ("cuda:1", "cuda:0", False),
    ],
)
def test_a_wish_for_a_device(device: str, wish: str, expected: bool) -> None:
    assert device_matches(device, wish) is expected


async def test_a_model_that_can_never_fit_is_refused_before_its_download() -> None:
    files = FakeFiles(on_disk=(), weight_bytes={"a": 2000})
    host = fake_host("a", files=files, budget_bytes=1500)
    await host.start()

    with pytest.raises(ModelTooLarge, match=r"needs 2\.0 KiB, but the memory budget is 1\.5 KiB"):
        await host.run(call("a"))

    assert files.fetches["a"] == 0


async def test_two_hosts_with_real_threads_load_one_at_a_time_in_the_whole_process() -> None:
    inside: list[str] = []
    together: list[int] = []
    wake = threading.Event()

    def pause(model_id: str) -> None:
        inside.append(model_id)
        together.append(len(inside))
        wake.wait(0.01)
        inside.remove(model_id)

    hosts = [threaded_host(f"host-{index}", FakeLoader(pause=pause)) for index in range(2)]
    for host in hosts:
        await host.start()

    answers = await asyncio.gather(*(host.run(call(model_id)) for host in hosts for model_id in "abc"))

    assert together == [1] * 6
    assert [answer.array().tobytes() for answer in answers if isinstance(answer, Embeddings)] == [
        fake_vector(m, "x").tobytes() for m in "abcabc"
    ]
    for host in hosts:
        await host.aclose()
    assert not LOAD_LOCK.locked()


class SilentHub(FakeFiles):
    """Files on a hub that does not answer before the test ends."""

    def __init__(self, on_disk: tuple[str, ...]) -> None:
        super().__init__(on_disk=on_disk)
        self.gate = threading.Event()

    def weight_bytes(self, spec: ModelSpec, device: str) -> int | None:
        if spec.model_id not in self.on_disk and not spec.source.startswith("/"):
            assert self.gate.wait(10)
        return super().weight_bytes(spec, device)

    def fetch(self, spec: ModelSpec, on_progress: Progress) -> ModelFiles:
        assert spec.source.startswith("/") or self.gate.wait(10)
        return super().fetch(spec, on_progress)


async def test_a_silent_hub_delays_neither_models_on_disk_nor_local_folders() -> None:
    files = SilentHub(on_disk=("here",))
    away = [f"away-{index}" for index in range(8)]
    runtime = structs.replace(fake_runtime(), workers=Threads("host"))
    folder = ModelSpec(model_id="folder", source="/models/folder")
    host = fake_host(*away, "here", folder, files=files, runtime=runtime)
    await host.start()
    waiting = [asyncio.create_task(host.run(call(model_id))) for model_id in away]
    await let_run()
    try:
        async with asyncio.timeout(5):
            answers = [await host.run(call(model_id)) for model_id in ("here", "folder")]
    finally:
        files.gate.set()

    assert [len(answer.token_counts) for answer in answers] == [1, 1]
    await asyncio.gather(*waiting)
    await host.aclose()


async def test_the_loop_turns_while_a_thread_loads() -> None:
    gate = threading.Event()
    begun = asyncio.Event()
    loop = asyncio.get_running_loop()

    def pause(model_id: str) -> None:
        if model_id == "b":
            loop.call_soon_threadsafe(begun.set)
            assert gate.wait(10)

    host = threaded_host("host", FakeLoader(pause=pause))
    await host.start()
    await host.run(call("a"))
    cold = asyncio.create_task(host.run(call("b")))
    await begun.wait()

    await host.run(call("a"))

    assert not cold.done()
    gate.set()
    await cold
    await host.aclose()


async def test_download_progress_is_throttled_and_ends_with_the_whole() -> None:
    host = threaded_host("host", FakeLoader(), files=ChattyFiles(on_disk=()))
    await host.start()
    followed = host.events()
    await host.run(call("a"))
    await host.aclose()

    progress = [event async for event in followed if event.kind == "progress"]

    assert 1 <= len(progress) <= 5
    assert all(event.done_bytes <= event.total_bytes == 1000 for event in progress)


class ChattyFiles(FakeFiles):
    """A download that reports every byte."""

    def fetch(self, spec: ModelSpec, on_progress: Progress) -> ModelFiles:
        for done_bytes in range(1000):
            on_progress(done_bytes, 1000)
        return super().fetch(spec, on_progress)


def threaded_host(host_id: str, loader: FakeLoader, files: FakeFiles | None = None) -> Host:
    """A host on real threads and the loop's own clock."""
    base = fake_runtime()
    runtime = HostRuntime(
        time=base.time,
        workers=Threads(host_id),
        memory=FakeMemory(),
        measurements=base.measurements,
        jitter=lambda: 0.5,
    )
    config = HostConfig(host_id=host_id, budget=Budget(size_bytes=10**6), workspace_bytes=100, rules=PoolPolicy())
    return Host(config, fake_specs("a", "b", "c"), files or FakeFiles(), loader, runtime)


async def test_a_reload_removes_the_quantised_weights_of_models_that_left_the_registry(tmp_path: Path) -> None:
    forms = FormCache(tmp_path)
    specs = {name: structs.replace(spec, dtype="int8") for name, spec in fake_specs("a", "b").items()}
    paths = {name: forms.path(spec) for name, spec in specs.items()}
    for path in filter(None, paths.values()):
        path.touch()
    host = fake_host("a", "b", runtime=structs.replace(fake_runtime(), form_cache=forms))
    await host.start()
    await host.reload(specs)

    await host.reload({"b": specs["b"]})

    assert {name for name, path in paths.items() if path is not None and path.exists()} == {"b"}
