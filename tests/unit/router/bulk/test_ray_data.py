"""Runs `ray_suite.py`, jobs of `embedyard embed --ray` on a real cluster, in a separate process."""

from pathlib import Path

import pytest

from tests.testkit.suite_process import num_passed

pytest.importorskip("ray", reason="pip install 'embedyard[ray]'")
pytest.importorskip("pandas", reason="pip install 'embedyard[ray]'")
pytestmark = pytest.mark.slow
SUITE = Path(__file__).with_name("ray_suite.py")


@pytest.mark.timeout(600)
def test_jobs_on_a_cluster_are_those_of_the_ordinary_form(tmp_path: Path) -> None:
    assert num_passed(SUITE, tmp_path / "log", timeout_s=400) >= 11
