"""Serves models that no device can hold, split over two simulated devices and main memory, with real weights."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from transformers import PretrainedConfig

from engines.errors import ModelTooLarge
from engines.host import Host
from engines.loading.loader import LoaderSettings
from engines.machine import Machine, MachineConfig
from engines.spec import ModelSpec, Offload
from engines.types import Budget, EmbedCall, Embeddings
from tests.testkit.split_models import TEXTS, bert_config, qwen3_config, write_model

KB = 1000
BUDGET = 3_400 * KB
BATCH_TOKENS = 48


def spec_of(folder: Path, offload: Offload = "allowed") -> ModelSpec:
    return ModelSpec(model_id="m", source=str(folder), pooling=("mean",), offload=offload)


@contextmanager
def machine(spec: ModelSpec, devices: tuple[str, ...], budget: int, host_budget: int = 0) -> Iterator[Machine]:
    config = MachineConfig(
        devices=devices,
        budget=Budget(size_bytes=budget),
        host_budget=Budget(size_bytes=host_budget),
        loader=LoaderSettings(max_batch_tokens=BATCH_TOKENS),
    )
    here = Machine(config, {spec.model_id: spec})
    try:
        yield here
    finally:
        here.close()


async def embed(host: Host) -> NDArray[np.float32]:
    result = await host.run(EmbedCall(model_id="m", texts=TEXTS))
    assert isinstance(result, Embeddings)
    return np.frombuffer(result.vectors, dtype=np.float32).reshape(len(TEXTS), -1)


async def sampled(hosts: tuple[Host, ...], until: asyncio.Task[object]) -> list[tuple[int, int, int, int]]:
    """Samples (used, budget, used of main memory, its budget) of all hosts while a task runs."""
    found = []
    while not until.done():
        for snapshot in (host.snapshot() for host in hosts):
            used = snapshot.used_bytes + snapshot.workspace_bytes
            found.append((used, snapshot.budget_bytes, snapshot.host_used_bytes, snapshot.host_budget_bytes))
        await asyncio.sleep(0.002)
    return found


@pytest.mark.parametrize("make_config", [bert_config, qwen3_config], ids=["bert", "qwen3"])
async def test_a_model_of_three_devices_serves_right_vectors_within_every_budget(
    tmp_path: Path, make_config: Callable[[], PretrainedConfig]
) -> None:
    folder = write_model(tmp_path / "m", make_config())
    with machine(spec_of(folder), ("cpu",), 10**9) as alone:
        await alone.hosts[0].start()
        expected = await embed(alone.hosts[0])
        one = alone.hosts[0].status("m")
        await alone.hosts[0].aclose()
    assert one.info is not None
    assert one.weight_bytes > 2.6 * BUDGET  # with the workspace three times the budget

    with machine(spec_of(folder), ("cpu:0", "cpu:1"), BUDGET, 16_000 * KB) as here:
        for host in here.hosts:
            await host.start()
        home, other = here.hosts
        task = asyncio.create_task(embed(home))
        samples = await sampled(here.hosts, task)
        got = task.result()
        status, there = home.status("m"), other.snapshot()
        await home.evict("m")
        after = [host.snapshot() for host in here.hosts]
        for host in here.hosts:
            await host.aclose()

    assert np.abs(got - expected).max() <= 1e-6
    assert status.info is not None
    assert status.info.path == "fused"
    assert status.info.notes == ()
    assert len(status.info.share_bytes) == 3
    assert all(status.info.share_bytes)
    assert there.used_bytes > 0
    assert samples
    assert all(used <= budget and in_host <= most for used, budget, in_host, most in samples)
    assert [(s.used_bytes, s.workspace_bytes, s.host_used_bytes) for s in after] == [(0, 0, 0), (0, 0, 0)]


async def test_a_model_larger_than_all_budgets_is_refused_with_both_numbers(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m", bert_config())

    with machine(spec_of(folder), ("cpu:0", "cpu:1"), BUDGET) as here:
        for host in here.hosts:
            await host.start()
        with pytest.raises(ModelTooLarge, match=r"needs \S+ MiB, the devices of this host have 6\.5 MiB") as caught:
            await embed(here.hosts[0])
        for host in here.hosts:
            await host.aclose()

    assert "the host budget 0 B" in str(caught.value)


async def test_a_model_is_not_split_unless_the_registry_allows_it(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m", bert_config())

    with machine(spec_of(folder, "never"), ("cpu:0", "cpu:1"), BUDGET, 16_000 * KB) as here:
        for host in here.hosts:
            await host.start()
        with pytest.raises(ModelTooLarge, match="but the memory budget is"):
            await embed(here.hosts[0])
        for host in here.hosts:
            await host.aclose()
