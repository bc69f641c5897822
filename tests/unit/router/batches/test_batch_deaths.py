"""Tests that no death of a server loses, repeats or tears a line."""

import asyncio
import os
import random
import time
from contextlib import suppress
from pathlib import Path

import pytest

from router.batches.batch_runner import clean
from router.batches.leases import LEASE_S
from router.batches.parts import LineAnswer, LineWork
from tests.testkit.batches import HOUR_S, BatchWorld, Fuse, Killed, echo, line, run_here

DEATHS = 250


def test_after_hundreds_of_deaths_the_output_is_that_of_an_undisturbed_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each life ends at a random step: within a write, before or after a transaction, at a line."""
    monkeypatch.setattr(os, "fsync", lambda _: None)  # see BatchWorld
    rows = [line(f"id-{number}", "x" * (number % 50)) if number % 7 else "{" for number in range(300)]
    deaths, seed = 0, 0
    while deaths < DEATHS:
        still, world = BatchWorld(tmp_path / f"still-{seed}"), BatchWorld(tmp_path / f"disturbed-{seed}")
        for each in (still, world):
            each.add("\n".join(rows).encode())
        asyncio.run(run_here(still))
        deaths += live_until_done(world, random.Random(seed))

        assert world.output() == still.output()
        assert world.errors() == still.errors()
        assert (world.batch().completed, world.batch().failed) == (257, 43)
        world.now_s += 2 * 86400 + time.time()
        clean(world.store, world.folder, world.now_s, HOUR_S)
        assert not list((tmp_path / f"disturbed-{seed}" / "batches").iterdir())
        still.engine.dispose()
        world.engine.dispose()
        seed += 1


def live_until_done(world: BatchWorld, rng: random.Random) -> int:
    """Start a server again and again until the batch has ended; return how many have died."""
    deaths = 0
    while world.batch().status != "completed":
        fuse = Fuse(rng.randrange(40), rng)

        async def answer(work: LineWork, fuse: Fuse = fuse) -> LineAnswer:
            fuse.step()
            return await echo(work)

        with suppress(Killed):
            asyncio.run(run_here(world, answer, holder=f"life-{deaths}", fuse=fuse))
        deaths += fuse.left < 0
        world.now_s += LEASE_S + 1
    return deaths
