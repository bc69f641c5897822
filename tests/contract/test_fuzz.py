"""Sends a few hundred requests made from the OpenAPI document; `python -m tests.contract.fuzz` sends thousands."""

import pytest

from tests.contract.fuzz import fuzz

pytest.importorskip("schemathesis")


def test_no_request_meets_a_crash_or_a_status_that_is_not_documented(url: str) -> None:
    found = fuzz(url, max_examples=4)

    assert found.is_clean, found.report
    assert found.cases >= 300
