"""Tests that deaths of real servers and workers, at random moments of a batch, leave the output as it would have been.

`python -m benchmarks.lifecycle.endurance batches` does it 200 times with 20,000 lines.
"""

import pytest

from benchmarks.lifecycle.batch_kills import run_kills

pytestmark = pytest.mark.slow
KILLS = 2
LINES = 100
"""Of eight texts, each of which is a pass of its own: a few seconds, in which both deaths come."""


def test_kill_9_of_server_and_worker_changes_no_byte_of_the_output() -> None:
    report, faults = run_kills(KILLS, lines=LINES)

    assert faults == [], str(report)
    assert sum(int(count) for name, count in report.rows if name.startswith("kill -9")) == KILLS
