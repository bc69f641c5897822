"""The benchmark of one text over HTTP beside its forward pass."""

import pytest

from benchmarks.http.single import over_http, row
from router.loadgen.http_client import Target


def test_a_row_has_both_medians_their_ratio_and_their_difference() -> None:
    name, forward, http, ratio, difference = row("short", {"HTTP": [0.003, 0.005, 0.004], "forward": [0.002] * 3})

    assert (name, forward, http, difference) == ("short", "2.00", "4.00", "2.00")
    assert ratio.startswith("2.00")


def test_a_failed_request_fails_the_measurement() -> None:
    with pytest.raises(OSError, match="2 of 2 requests failed"):
        over_http(Target("http://127.0.0.1:9", "mini"), ["a text"], 2)
