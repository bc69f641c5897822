"""Tests two servers on one PostgreSQL and one folder: one is killed or suspended, the other ends its batches.

`BATCH_REAL_LEASES=1 pytest tests/integration/test_batch_servers.py` waits until a lease has ended by itself.
"""

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from msgspec import Struct, structs
from sqlalchemy import Engine, create_engine, update

from benchmarks.lifecycle.batch_kills import Life, build_site, compare, fetch, make_lines, submit, with_ids_of
from router.batches.database import BATCHES
from router.batches.leases import LEASE_S
from tests.testkit.postgres_server import postgres_server

pytestmark = pytest.mark.slow
LINES = 1800
"""The other server looks every 0.4 s whether a batch is cancelled, and does 500 lines meanwhile."""
IS_REAL = bool(os.environ.get("BATCH_REAL_LEASES"))
ROWS = make_lines(LINES)
LIMIT_S = 240.0


class Pair(Struct):
    """Two servers, their database, and the output of a batch that nothing disturbed."""

    lives: list[Life]
    engine: Engine
    data: Path
    expected: bytes = b""

    def events(self, life: Life) -> list[dict[str, object]]:
        return [json.loads(row) for row in life.log.read_bytes().splitlines() if row.startswith(b"{")]

    def has_logged(self, life: Life, event: str, batch_id: str) -> bool:
        return any(row.get("event") == event and row.get("batch") == batch_id for row in self.events(life))

    def begin(self) -> tuple[str, Life, Life]:
        """Begin a batch, and let some of its lines be journaled; return its id, the server that runs it, the other."""
        batch_id = submit(self.lives[0].url, ROWS)
        with self.engine.connect() as connection:
            while not connection.execute(
                BATCHES.select().where(BATCHES.c.id == batch_id, BATCHES.c.completed > 0)
            ).first():
                connection.rollback()
                time.sleep(0.05)
        first, second = self.lives
        return (
            (batch_id, first, second) if self.has_logged(first, "batch.began", batch_id) else (batch_id, second, first)
        )

    def end_leases(self) -> None:
        """Let the leases end: of a server that does not renew them."""
        if IS_REAL:
            time.sleep(LEASE_S)
            return
        with self.engine.begin() as connection:
            connection.execute(update(BATCHES).values(lease_until=0.0))


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    with postgres_server() as url:
        settings = {"BATCH_DATABASE": url, "BACKEND": "local", "LOG_LEVEL": "info"}
        site = structs.replace(build_site(tmp_path_factory.mktemp("pair")), settings=settings)
        lives = [Life(site), Life(site)]
        engine = create_engine(url)
        pair = Pair(lives, engine, site.data)
        try:
            for life in lives:
                life.wait()
            batch_id = submit(lives[0].url, ROWS)
            batch, output = fetch(lives[1].url, batch_id, LIMIT_S)
            pair.expected = with_ids_of(output, "batch_" + "0" * 32)
            assert compare(batch, output, output, LINES) == []
            yield pair
        finally:
            for life in lives:
                life.process.send_signal(signal.SIGCONT)
                life.kill("server")
            engine.dispose()


@pytest.mark.parametrize("asked", ["its own server", "the other server"])
def test_a_cancelled_batch_stops_within_a_second_and_keeps_what_is_done(pair: Pair, asked: str) -> None:
    batch_id, own, other = pair.begin()
    url = own.url if asked == "its own server" else other.url

    began_s = time.monotonic()
    cancelled = httpx.post(f"{url}/v1/batches/{batch_id}/cancel", timeout=60).json()
    batch, output = fetch(url, batch_id, LIMIT_S, poll_s=0.02)
    took_s = time.monotonic() - began_s

    done = batch["request_counts"]["completed"]
    assert (cancelled["status"], batch["status"]) == ("cancelling", "cancelled")
    assert output == b"".join(with_ids_of(pair.expected, batch_id).splitlines(keepends=True)[:done])
    assert 0 < done < LINES
    assert took_s < 2.0  # a second, and another for a busy machine


def test_a_suspended_server_that_comes_back_writes_nothing_any_more(pair: Pair) -> None:
    batch_id, zombie, other = pair.begin()
    zombie.process.send_signal(signal.SIGSTOP)
    pair.end_leases()
    batch, output = fetch(other.url, batch_id, LIMIT_S)
    files = {path.name: path.stat().st_mtime_ns for path in (pair.data / "files").iterdir()}

    zombie.process.send_signal(signal.SIGCONT)
    # stalled: it was suspended within a transaction, which the database has ended
    while not any(pair.has_logged(zombie, event, batch_id) for event in ("batch.lease_lost", "batch.stalled")):
        time.sleep(0.1)

    assert compare(batch, output, with_ids_of(pair.expected, batch_id), LINES) == []
    assert fetch(zombie.url, batch_id) == (batch, output)
    assert {path.name: path.stat().st_mtime_ns for path in (pair.data / "files").iterdir()} == files
    again = submit(zombie.url, ROWS[:10])
    assert fetch(zombie.url, again, LIMIT_S)[0]["request_counts"]["completed"] == 10


def test_the_batch_of_a_killed_server_ends_on_the_other(pair: Pair) -> None:
    batch_id, victim, other = pair.begin()
    victim.kill("server")
    pair.end_leases()

    batch, output = fetch(other.url, batch_id, LIMIT_S)

    assert compare(batch, output, with_ids_of(pair.expected, batch_id), LINES) == []
    assert pair.has_logged(other, "batch.began", batch_id)
