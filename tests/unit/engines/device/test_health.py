"""A device that does not answer: the message about it, and what happens to requests that wait for it."""

import asyncio
import math

import pytest
from msgspec import structs

from engines.device.health import DeviceHealth, describe_fault
from engines.errors import DeviceDown
from engines.host import Host
from engines.pause_detector import PauseDetector
from engines.testing.fakes import FakeLoader, FakeTime, fake_host, fake_runtime, fake_vector
from engines.testing.runtime import let_run
from engines.types import EmbedCall

CALL = EmbedCall(model_id="a", texts=("x",))


@pytest.mark.parametrize(
    ("health", "words"),
    [
        (DeviceHealth(), ""),
        (DeviceHealth(task_s=120.0), ""),
        (DeviceHealth(task_s=120.1), "a forward pass has been running for 120 s, and 120 s is the limit"),
        (DeviceHealth(task_s=600.0, is_check=True), ""),
        (DeviceHealth(task_s=601.0, is_check=True), "a self-check has been running for 601 s, and 600 s is the limit"),
        (DeviceHealth(is_alive=False), "the thread of device cuda:1 has died"),
        (DeviceHealth(loss="device-side assert"), "device cuda:1 has failed (device-side assert), and this process"),
    ],
)
def test_a_fault_names_device_and_seconds(health: DeviceHealth, words: str) -> None:
    fault = describe_fault("cuda:1", health, 120.0)

    assert words in fault
    assert bool(fault) == bool(words)


class Device:
    """A host whose forward passes hang, and whose device has the health that a test sets."""

    def __init__(self) -> None:
        self.health = DeviceHealth()
        self.time = FakeTime()
        self.loader = FakeLoader(embed_s=1000.0, sleep=self.time.sleep)
        runtime = structs.replace(fake_runtime(time=self.time), health=lambda: self.health)
        self.host: Host = fake_host("a", "b", loader=self.loader, runtime=runtime)


async def test_requests_that_wait_on_a_hanging_device_fail_and_new_ones_are_refused() -> None:
    device = Device()
    await device.host.start()
    running, waiting = (asyncio.create_task(device.host.run(call)) for call in (CALL, CALL))
    await let_run()
    before = device.host.check()
    device.health = DeviceHealth(task_s=121.0)
    fault = device.host.check()
    outcomes = await asyncio.gather(running, waiting, return_exceptions=True)

    assert before == ""
    assert "121 s" in fault
    for outcome in outcomes:
        assert isinstance(outcome, DeviceDown)
        assert "121 s" in str(outcome)
    with pytest.raises(DeviceDown):
        await device.host.run(CALL)
    assert device.host.status("a").leases == 0
    assert device.loader.violations == []


async def test_a_load_on_a_dead_device_is_not_waited_for() -> None:
    device = Device()
    device.loader._pause = lambda model_id: None
    await device.host.start()
    device.host._pool._runtime.workers.hold("load")  # type: ignore[attr-defined]  # the fake runtime's can be held
    waiting = asyncio.create_task(device.host.run(CALL))
    await let_run()
    device.health = DeviceHealth(is_alive=False)
    device.host.check()

    with pytest.raises(DeviceDown, match="has died"):
        await waiting


async def test_a_device_that_answers_again_serves_again() -> None:
    device = Device()
    await device.host.start()
    device.health = DeviceHealth(task_s=121.0)
    device.host.check()
    device.health = DeviceHealth()
    device.host.check()
    task = asyncio.create_task(device.host.run(CALL))
    await device.time.advance(2000)

    assert ((await task).array()[0] == fake_vector("a", "x")).all()


async def test_a_caller_that_is_cancelled_as_well_is_cancelled() -> None:
    device = Device()
    await device.host.start()
    task = asyncio.create_task(device.host.run(CALL))
    await let_run()
    device.health = DeviceHealth(task_s=121.0)
    device.host.check()
    task.cancel()

    with pytest.raises(asyncio.CancelledError):
        await task
    assert device.host.status("a").leases == 0


def test_a_process_that_reports_every_second_was_never_paused() -> None:
    awake = PauseDetector()

    assert [awake.seconds_since_pause(now_s) for now_s in (1000.0, 1001.0, 1010.5)] == [math.inf] * 3


def test_after_a_pause_only_the_seconds_since_count() -> None:
    awake = PauseDetector()
    seen = [awake.seconds_since_pause(now_s) for now_s in (0.0, 1.0, 500.0, 501.0, 509.0)]

    assert seen == [math.inf, math.inf, 0.0, 1.0, 9.0]


async def test_a_pass_that_a_pause_of_the_process_made_long_is_no_fault_and_one_that_hangs_on_is() -> None:
    device = Device()
    await device.host.start()
    faults = []
    for seconds, task_s in ((1, 1.0), (300, 301.0), *((1, 301.0 + more) for more in range(1, 125))):
        await device.time.advance(seconds)
        device.health = DeviceHealth(task_s=task_s)
        faults.append(device.host.check())

    assert faults[:3] == ["", "", ""], "the process was stopped for 300 s"
    assert "has been running for 121 s" in faults[122]
    assert [bool(fault) for fault in faults].index(True) == 122
