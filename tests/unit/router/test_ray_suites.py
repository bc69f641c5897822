"""Runs both files `ray_suite.py` on one real cluster, in a separate process: bulk jobs, then `BACKEND=ray`."""

from pathlib import Path

import pytest

from tests.testkit.suite_process import num_passed

pytest.importorskip("ray", reason="pip install 'embedyard[ray]'")
pytest.importorskip("pandas", reason="pip install 'embedyard[ray]'")
pytestmark = pytest.mark.slow
BULK, BACKENDS = (Path(__file__).parent / part / "ray_suite.py" for part in ("bulk", "backends"))


@pytest.mark.timeout(600)
def test_jobs_and_the_conformance_suite_are_green_on_a_cluster(tmp_path: Path) -> None:
    """Jobs first: the hosts of the conformance suite take all CPUs of the cluster."""
    passed = num_passed(BULK, BACKENDS, log=tmp_path / "log", timeout_s=400)

    assert passed["bulk"] >= 11
    assert passed["backends"] > 30
