"""Sizes of models that were never loaded: estimated without a download and without a claim for memory."""

from engines.pool.messages import SizeEstimated
from engines.pool.slot import MemoryNeed
from engines.pool.state_machine import PoolStateMachine
from engines.testing.fakes import WEIGHT_BYTES, WORKSPACE_BYTES, FakeFiles, FakeLoader, fake_host, fake_specs
from engines.types import EmbedCall


async def test_a_size_is_learned_without_fetching_or_wanting_the_model() -> None:
    files = FakeFiles(on_disk=[], weight_bytes={"a": 4000})
    host = fake_host("a", files=files)
    await host.start()
    before = host.plan("a")
    await host.estimate_size("a")
    after = host.plan("a")

    assert (before.need_bytes, before.reason) == (0, "its size is unknown until its files are downloaded")
    assert (after.need_bytes, after.fits, after.state) == (4000 + WORKSPACE_BYTES, True, "absent")
    assert files.fetches == {}
    assert (host.snapshot().claimed_bytes, host.snapshot().used_bytes) == (0, 0)
    await host.aclose()


async def test_a_plan_names_the_models_that_a_load_would_evict() -> None:
    files = FakeFiles(on_disk=["a"])
    host = fake_host("a", "b", files=files, budget_bytes=WEIGHT_BYTES + WORKSPACE_BYTES)
    await host.start()
    await host.run(EmbedCall(model_id="a", texts=("x",)))
    await host.estimate_size("b")
    plan = host.plan("b")

    assert (plan.evict, plan.fits) == (("a",), True)
    assert plan.reason == "1000 B are missing; other models are evicted once idle"
    await host.aclose()


async def test_an_unknown_size_stays_unknown() -> None:
    host = fake_host("a", files=FakeFiles(on_disk=[], weight_bytes={"a": None}))
    await host.start()
    await host.estimate_size("a")

    assert host.plan("a").need_bytes == 0
    await host.aclose()


async def test_a_measured_size_is_not_requested_again() -> None:
    files = FakeFiles()
    host = fake_host("a", files=files, loader=FakeLoader(weight_bytes={"a": 777}))
    await host.start()
    await host.run(EmbedCall(model_id="a", texts=("x",)))
    await host.estimate_size("a")

    assert host.snapshot().used_bytes == 777
    await host.aclose()


def test_a_size_that_comes_late_changes_nothing() -> None:
    core = PoolStateMachine(fake_specs("a"), budget_bytes=10_000)
    slot = core.state.current["a"]
    slot.need = MemoryNeed(weight_bytes=5, weights_known=True)
    effects = core.handle(SizeEstimated(slot.slot_id, MemoryNeed(weight_bytes=9)), 1.0)
    of_a_slot_that_is_gone = core.handle(SizeEstimated(99, MemoryNeed(weight_bytes=9)), 1.0)

    assert (effects, of_a_slot_that_is_gone) == ([], [])
    assert slot.need.weight_bytes == 5
