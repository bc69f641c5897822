"""Worker processes that crash: which calls fail, which are retried, and what is restored."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import psutil
import pytest
from msgspec import structs

from engines.errors import DeviceDown, HostLost, InvalidValue, LoadFailed, ShuttingDown
from engines.rpc.errors import error_record_of
from engines.spec import ModelSpec
from engines.types import Budget, Embeddings, Event, Result
from router.backends.base import Backend
from router.backends.process.child import fit_lines
from router.backends.process.fleet import ProcessFleet, find_devices_elsewhere
from router.backends.process.worker import prepare_forkserver
from router.backends.remote import RemoteBackend
from tests.testkit.backends import crowd, open_broken_host, open_slow_host, scripted, until, worker_configs
from tests.testkit.process_backend import WorkerProcesses
from tests.unit.router.backends.conformance import call, homes, loads, serving

ROOT = Path(__file__).parents[5]
prepare_forkserver(("router.backends.process.child", "tests.testkit.backends"))


@asynccontextmanager
async def worker_processes(*specs: ModelSpec, hosts: int = 2) -> AsyncIterator[WorkerProcesses]:
    made = WorkerProcesses(hosts, *specs)
    await made.backend.start()
    try:
        yield made
    finally:
        await made.backend.aclose(grace_s=0)


async def test_no_request_is_lost_when_one_of_two_hosts_is_killed_under_64_clients() -> None:
    models = [scripted(f"m{index}", embed_s=0.005) for index in range(4)]
    async with worker_processes(*models) as here:
        async with crowd(here.backend, *(spec.model_id for spec in models)) as clients:
            await clients.until(30)
            home = homes(here.backend.snapshots())["m0"][0]
            here.kill(home)
            await clients.until(30)
            await here.restarted(home, 1)
            await clients.until(30)
        hosts = await until(here.backend, lambda hosts: len(homes(hosts)) == 4)

    assert clients.wrong == []
    assert loads(hosts)["m0"] >= 1, "loaded again, on demand"


async def test_the_only_host_comes_back_and_then_answers_what_it_had() -> None:
    async with worker_processes(scripted("a", embed_s=0.1), hosts=1) as here:
        await here.backend.preload("a")
        asked = [asyncio.create_task(here.backend.run(call("a", str(index)))) for index in range(5)]
        await asyncio.sleep(0.03)
        here.kill("cpu:0")
        answers = await asyncio.gather(*asked)

    assert [len(answer.token_counts) for answer in answers] == [1] * 5


async def test_models_that_must_be_in_memory_come_back_unasked() -> None:
    async with worker_processes(scripted("a", pinned=True), hosts=1) as here:
        await until(here.backend, lambda hosts: "a" in homes(hosts))
        here.kill("cpu:0")
        await here.restarted("cpu:0", 1)
        await until(here.backend, lambda hosts: "a" in homes(hosts))


async def test_a_crash_is_reported_as_events_with_continuing_numbers() -> None:
    async with worker_processes(scripted("a"), hosts=1) as here:
        stream = here.backend.events()
        await here.backend.preload("a")
        here.kill("cpu:0")
        await here.restarted("cpu:0", 1)
        await here.backend.preload("a")
        seen: list[Event] = []
        async with asyncio.timeout(10):
            while [event.target for event in seen].count("ready") < 2:
                seen.append(await anext(stream))

    lost = next(event for event in seen if "crashed (signal 9)" in event.cause)
    assert (lost.source, lost.target, lost.model_id) == ("ready", "cold", "a")
    numbers = [event.seq for event in seen]
    assert numbers == sorted(set(numbers))


@pytest.mark.parametrize("noted", [{}, {"noted": 1}])
async def test_a_request_that_kills_its_hosts_is_not_sent_a_third_time_and_its_model_is_kept_out(
    noted: dict[str, int],
) -> None:
    async with worker_processes(scripted("bad", **noted), scripted("good")) as here:
        with pytest.raises(HostLost):
            await here.backend.run(call("bad", "die"))
        deaths = sum(host.restarts for host in here.backend.snapshots())
        with pytest.raises(LoadFailed, match="was running in 3 crashes of a worker process") as caught:
            await here.backend.run(call("bad", "die"))
        hosts = here.backend.snapshots()
        shown = {status.state for host in hosts for status in host.models if status.model_id == "bad"}
        answer = await here.backend.run(call("good"))
        with pytest.raises(LoadFailed):
            await here.backend.preload("bad")
        await here.backend.reload({"bad": scripted("bad", embed_s=0.001), "good": scripted("good")})
        mended = await here.backend.run(call("bad"))

    assert deaths == 2
    assert (caught.value.kind, 0 < caught.value.retry_after_s <= 30) == ("kills_host", True)
    assert shown == {"failed"}
    assert len(answer.token_counts) == len(mended.token_counts) == 1


async def test_a_model_that_kills_its_host_while_it_loads_is_kept_out() -> None:
    async with worker_processes(scripted("bad", dies_loading=1)) as here:
        for _ in range(2):
            with pytest.raises((HostLost, LoadFailed)) as caught:
                await here.backend.run(call("bad"))

    assert isinstance(caught.value, LoadFailed)


async def test_a_model_on_the_same_host_is_not_charged_when_another_was_running() -> None:
    async with worker_processes(scripted("bad", noted=1), scripted("good", embed_s=0.3), hosts=1) as here:
        await here.backend.preload("good")
        asked = [asyncio.create_task(here.backend.run(call("good"))) for _ in range(3)]
        for _ in range(2):
            with pytest.raises((HostLost, LoadFailed)):
                await here.backend.run(call("bad", "die"))
        told = await asyncio.gather(*asked, return_exceptions=True)
        after = await here.backend.run(call("good"))

    assert all(not isinstance(error, LoadFailed) for error in told)
    assert len(after.token_counts) == 1


async def test_models_that_only_waited_when_a_host_died_are_not_quarantined() -> None:
    async with worker_processes(scripted("a"), scripted("b"), hosts=1) as here:
        for times in range(1, 4):
            asked = [asyncio.create_task(here.backend.run(call(model, "wait"))) for model in "ab"]
            await until(
                here.backend,
                lambda hosts: [status.leases for status in hosts[0].models] == [1, 1] and not hosts[0].is_draining,
            )
            here.kill("cpu:0")
            await here.restarted("cpu:0", times)
            for task in asked:
                task.cancel()
            await asyncio.gather(*asked, return_exceptions=True)
        answers = [await here.backend.run(call(model)) for model in "ab"]

    assert [len(answer.token_counts) for answer in answers] == [1, 1]


def test_a_note_that_is_too_long_loses_whole_names_from_its_beginning() -> None:
    assert fit_lines(b"org/one\norg/two", 15) == b"org/one\norg/two"
    assert fit_lines(b"org/one\norg/two", 14) == b"org/two"
    assert fit_lines(b"org/one\norg/two", 7) == b"org/two"
    assert fit_lines(b"org/one\norg/two", 6) == b""


async def test_a_host_that_cannot_be_made_ends_the_start_and_leaves_no_process() -> None:
    fleet = ProcessFleet([structs.replace(config, open=open_broken_host) for config in worker_configs()[:2]], 1, 5.0)
    with pytest.raises(InvalidValue, match="does not exist"):
        await RemoteBackend(fleet, {}).start()

    assert [pid for pid in (worker.pid for worker in fleet.workers.values()) if pid and is_running(pid)] == []


async def test_a_host_that_cannot_be_started_again_is_a_fault_and_the_other_serves_on() -> None:
    async with worker_processes(scripted("a")) as here:
        worker = here.fleet.workers["cpu:0"]
        worker.config = structs.replace(worker.config, open=open_broken_host)
        here.kill("cpu:0")
        async with asyncio.timeout(10):
            while not here.backend.check():  # noqa: ASYNC110 - a fault is looked for, as the server does
                await asyncio.sleep(0.02)
        fault = here.backend.check()["cpu:0"]
        answer = await here.backend.run(call("a"))

    assert "cannot be started: cpu:0 does not exist" in fault
    assert len(answer.token_counts) == 1


async def test_a_fork_server_that_dies_at_the_wrong_moment_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("router.backends.process.worker._BACKOFF_S", (0.0,))
    start, failures = ForkServerProcess.start, [EOFError("unexpected EOF"), ConnectionRefusedError()]

    def fail_first(process: ForkServerProcess) -> None:
        if failures:
            raise failures.pop(0)
        start(process)

    async with worker_processes(scripted("a"), hosts=1) as here:
        monkeypatch.setattr(ForkServerProcess, "start", fail_first)
        here.kill("cpu:0")
        await here.restarted("cpu:0", 1)
        answer = await here.backend.run(call("a"))

    assert (failures, len(answer.token_counts)) == ([], 1)


async def test_a_registry_that_is_read_while_a_worker_starts_reaches_it() -> None:
    async with worker_processes(scripted("old"), hosts=1) as here:
        worker, pid = here.fleet.workers["cpu:0"], here.pids()["cpu:0"]
        worker.config = structs.replace(worker.config, open=open_slow_host)
        here.kill("cpu:0")
        async with asyncio.timeout(10):
            while worker.pid in (pid, None):  # noqa: ASYNC110 - it is forked on a thread
                await asyncio.sleep(0.01)
        await here.backend.reload({"new": scripted("new")}, Budget(size_bytes=3000))
        answer = await here.backend.run(call("new"))
        (host,) = here.backend.snapshots()

        told = [event async for event in events_until(here.backend, lambda event: event.target == "ready")]

    assert len(answer.token_counts) == 1
    assert ([status.model_id for status in host.models], host.budget_bytes) == (["new"], 3000)
    numbers = [event.seq for event in told]
    assert numbers == sorted(set(numbers)), "reports of a start overlap, and events are told once"


async def events_until(backend: RemoteBackend, is_last: Callable[[Event], bool]) -> AsyncIterator[Event]:
    """Yields all remembered events, up to the last one that is wanted."""
    async with asyncio.timeout(10):
        async for event in backend.events({"cpu:0": 0}):
            yield event
            if is_last(event):
                break


async def test_a_host_that_is_recycled_between_two_lives_counts_its_next_death(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("router.backends.process.worker._BACKOFF_S", (0.3,))
    async with worker_processes(scripted("a"), hosts=1) as here:
        here.kill("cpu:0")
        async with asyncio.timeout(10):
            while not here.backend.snapshots()[0].restarts:  # noqa: ASYNC110 - a snapshot comes without an event
                await asyncio.sleep(0.01)
        await here.backend.recycle("cpu:0")
        here.kill("cpu:0")
        await here.restarted("cpu:0", 2)


async def test_a_host_is_not_recycled_when_the_server_has_ended() -> None:
    async with worker_processes(scripted("a"), hosts=1) as here:
        worker = here.fleet.workers["cpu:0"]
    with pytest.raises(HostLost, match="the server shut down"):
        await asyncio.wait_for(worker.restart(0.0), 5.0)


async def test_signals_to_the_whole_group_do_not_end_a_worker_before_its_parent_does() -> None:
    async with worker_processes(scripted("a"), hosts=1) as here:
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(here.pids()["cpu:0"], number)
        answer = await here.backend.run(call("a"))
        pid = here.pids()["cpu:0"]

    assert len(answer.token_counts) == 1
    assert not is_running(pid)


async def test_a_worker_that_hangs_is_killed_and_its_calls_go_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("router.backends.process.worker._MAX_SILENCE_S", 0.5)
    async with worker_processes(scripted("a"), hosts=2) as here:
        home = (await here.backend.preload("a")).host_id
        os.kill(here.pids()[home], signal.SIGSTOP)
        asked = asyncio.create_task(here.backend.run(call("a")))
        async with asyncio.timeout(10):
            while not asked.done():
                here.backend.check()
                await asyncio.sleep(0.05)

    assert len((await asked).token_counts) == 1


def _embeddings(result: Result) -> Embeddings:
    assert isinstance(result, Embeddings)
    return result


async def test_a_worker_whose_gpu_fails_is_started_anew_and_its_model_is_kept_out_if_that_happens_again() -> None:
    """A call whose device fails is sent to one more host, so each of these calls costs two hosts their process."""
    async with worker_processes(scripted("bad"), scripted("good")) as here:
        answers, pids = [_embeddings(await here.backend.run(call("good")))], set[int]()
        for times in (1, 2):
            pids |= set(here.pids().values())
            with pytest.raises((DeviceDown, HostLost)):
                await here.backend.run(call("bad", "lose"))
            for host_id in here.pids():
                await here.restarted(host_id, times)
            answers.append(_embeddings(await here.backend.run(call("good"))))
        with pytest.raises(LoadFailed, match="was running in 3 crashes"):
            await here.backend.run(call("bad", "lose"))
        pids |= set(here.pids().values())
        faults = here.backend.check()

    assert len(pids) == 6
    assert len({answer.vectors for answer in answers}) == 1
    assert faults == {}


async def test_a_call_that_another_made_fail_by_losing_the_gpu_is_answered_all_the_same() -> None:
    async with worker_processes(scripted("bad"), scripted("good"), hosts=1) as here:
        await here.backend.preload("good")
        lost = asyncio.create_task(here.backend.run(call("bad", "lose")))
        await until(here.backend, lambda hosts: hosts[0].is_draining)
        answer = await here.backend.run(call("good"))
        with pytest.raises((DeviceDown, HostLost, LoadFailed)):
            await lost

    assert len(answer.token_counts) == 1


async def test_a_worker_whose_load_hangs_is_started_anew_and_its_calls_go_elsewhere(tmp_path: Path) -> None:
    spec = scripted("a", hang_s=60, once=tmp_path / "hung")
    quick = [
        structs.replace(config, settings=structs.replace(config.settings, watchdog_seconds=0.1))
        for config in worker_configs()[:2]
    ]
    backend = RemoteBackend(ProcessFleet(quick, 1, grace_s=5.0), {})
    await backend.start()
    await backend.reload({"a": spec})

    answer = await asyncio.wait_for(backend.run(call("a")), 30)
    hosts = await until(backend, lambda hosts: sum(host.restarts for host in hosts) == 1)
    await backend.aclose(grace_s=0)

    assert len(answer.token_counts) == 1
    assert homes(hosts)["a"] != [host.host_id for host in hosts if host.restarts]


async def test_a_worker_is_not_killed_for_the_silence_of_a_server_that_stood_still(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As after Ctrl-Z and `fg`: the check runs before the data that arrived meanwhile is read."""
    monkeypatch.setattr("router.backends.process.worker._MAX_SILENCE_S", 0.2)
    monkeypatch.setattr("engines.pause_detector.MAX_GAP_S", 0.5)
    async with worker_processes(scripted("a"), hosts=1) as here:
        before = here.pids()
        here.backend.check()
        time.sleep(1.0)  # noqa: ASYNC251  # the server stands still
        here.backend.check()
        answer = await here.backend.run(call("a"))
        after = here.pids()

    assert len(answer.token_counts) == 1
    assert before == after


async def test_a_worker_that_hangs_does_not_outlive_a_server_that_ends_and_costs_one_grace_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("router.backends.process.worker._EXIT_TIMEOUT_S", 0.5)
    here = WorkerProcesses(1, scripted("a"))
    await here.backend.start()
    await here.backend.preload("a")
    pid = here.pids()["cpu:0"]
    os.kill(pid, signal.SIGSTOP)
    asked = asyncio.create_task(here.backend.run(call("a", "x" * 2**21)))
    await asyncio.sleep(0.05)
    began_s = time.monotonic()
    await here.backend.aclose(grace_s=3.0)
    took_s = time.monotonic() - began_s

    assert not is_running(pid)
    assert isinstance((await asyncio.gather(asked, return_exceptions=True))[0], ShuttingDown)
    assert took_s < 5.5, "the calls had the grace time, and the worker not another one"


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel does it")
@pytest.mark.parametrize("end", ["SIGKILL", "exit"])
def test_no_process_outlives_the_server_even_one_that_is_stopped(end: str) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.testkit.process_backend"], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdin is not None
    assert process.stdout is not None
    with process:
        worker = int(process.stdout.readline())
        family = psutil.Process(process.pid).children(recursive=True)
        os.kill(worker, signal.SIGSTOP)
        if end == "SIGKILL":
            process.kill()
        process.stdin.close()
        _, alive = psutil.wait_procs([psutil.Process(process.pid), *family], timeout=15)
        for left in alive:
            left.kill()

    assert worker in {child.pid for child in family}
    assert alive == []


async def test_what_is_abandoned_while_a_worker_is_stopped_fills_no_memory() -> None:
    text = "x" * 2**20
    async with worker_processes(scripted("a", embed_s=0.01), hosts=1) as here:
        await here.backend.preload("a")
        os.kill(here.pids()["cpu:0"], signal.SIGSTOP)
        before = psutil.Process().memory_info().rss
        for _ in range(20):
            asked = [asyncio.create_task(here.backend.run(call("a", text))) for _ in range(10)]
            await asyncio.sleep(0.02)
            for task in asked:
                task.cancel()
            await asyncio.gather(*asked, return_exceptions=True)
        grown = psutil.Process().memory_info().rss - before
        os.kill(here.pids()["cpu:0"], signal.SIGCONT)
        answer = await here.backend.run(call("a"))

    assert len(answer.token_counts) == 1
    assert grown < 30 * 2**20


async def test_workers_end_when_their_parent_hangs_up() -> None:
    here = WorkerProcesses(1)
    await here.backend.start()
    pid = here.pids()["cpu:0"]
    worker = here.fleet.workers["cpu:0"]
    await worker.aclose(grace_s=0)
    await here.backend.aclose(grace_s=0)

    assert not is_running(pid)


async def test_a_new_budget_is_shared_by_the_hosts_of_one_device() -> None:
    fleet = ProcessFleet(worker_configs()[:2], 2, grace_s=1.0)
    backend: Backend = RemoteBackend(fleet, {})
    await backend.start()
    async with serving(backend, scripted("a")):
        hosts = await until(backend, lambda hosts: {host.budget_bytes for host in hosts} == {2250})
    await backend.aclose(grace_s=0)

    assert len(hosts) == 2


async def test_a_new_host_budget_reaches_every_host() -> None:
    backend: Backend = RemoteBackend(ProcessFleet(worker_configs()[:2], 2, grace_s=1.0), {})
    await backend.start()
    await backend.reload({}, None, Budget(size_bytes=2**24))
    hosts = await until(backend, lambda hosts: {host.host_budget_bytes for host in hosts} == {2**24})
    await backend.aclose(grace_s=0)

    assert len(hosts) == 2


def report_two(answer: Connection, wanted: tuple[str, ...]) -> None:
    answer.send(("cuda:0", "cuda:1"))


def report_none(answer: Connection, wanted: tuple[str, ...]) -> None:
    answer.send(error_record_of(InvalidValue(f"DEVICE names {wanted[0]}, but this machine has 0 CUDA devices")))


def report_nothing(answer: Connection, wanted: tuple[str, ...]) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_devices_are_looked_for_in_another_process() -> None:
    assert find_devices_elsewhere(("auto",), report_two) == ("cuda:0", "cuda:1")
    with pytest.raises(InvalidValue, match="DEVICE names cuda:99, but this machine has 0"):
        find_devices_elsewhere(("cuda:99",), report_none)
    with pytest.raises(InvalidValue, match="the probing process crashed"):
        find_devices_elsewhere(("auto",), report_nothing)


def is_running(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
