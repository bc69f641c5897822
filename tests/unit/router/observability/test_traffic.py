"""Statistics of the last minute per model, with a fake clock."""

from typing import Any, cast

import pytest

from engines.types import Embeddings
from router.observability.request_context import RequestContext
from router.observability.traffic import STEP_S, STEPS, Traffic
from tests.testkit.clocks import FakeClock
from tests.testkit.servers import Served


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def traffic(clock: FakeClock) -> Traffic:
    found = Traffic(clock)
    clock.advance(3600)
    return found


async def no_send(_: Any) -> None: ...


def ended_request(model: str = "mini", texts: int = 2, seconds: float = 0.1, status: int = 200) -> RequestContext:
    made = RequestContext(cast(Any, {"type": "http", "method": "POST", "headers": []}), no_send)
    made.model, made.status = model, status
    made.answer = Embeddings(vectors=b"", dimensions=1, token_counts=(5,) * texts)
    made.ended_s = made.began_s + seconds
    return made


def test_texts_and_tokens_are_averaged_over_the_minute(traffic: Traffic, clock: FakeClock) -> None:
    for _ in range(30):
        traffic.record(ended_request())
        clock.advance(2.0)
    found = traffic.last_minute()["mini"]

    assert found.texts_per_s == pytest.approx(1.0, rel=0.05)
    assert found.tokens_per_s == pytest.approx(5.0, rel=0.05)
    assert len(found.texts_per_s_by_step) == STEPS
    assert sum(found.texts_per_s_by_step) * STEP_S == 60


def test_a_young_server_is_not_measured_by_a_minute_it_has_not_lived() -> None:
    clock = FakeClock()
    traffic = Traffic(clock)
    clock.advance(10.0)
    traffic.record(ended_request(texts=50))

    assert traffic.last_minute()["mini"].texts_per_s == pytest.approx(5.0)


def test_what_is_older_is_forgotten_step_by_step(traffic: Traffic, clock: FakeClock) -> None:
    traffic.record(ended_request(texts=10))
    clock.advance(30.0)
    traffic.record(ended_request(texts=1))
    half, clock.now_s = traffic.last_minute()["mini"], clock.now_s + 36.0
    rest, clock.now_s = traffic.last_minute()["mini"], clock.now_s + 60.0

    assert [steps * STEP_S for steps in half.texts_per_s_by_step].index(10) == STEPS - 6
    assert sum(rest.texts_per_s_by_step) * STEP_S == 1
    assert traffic.last_minute() == {}


@pytest.mark.parametrize("scale", [0.0005, 0.02, 1.0, 300.0])
def test_percentiles_are_right_to_three_per_cent(traffic: Traffic, scale: float) -> None:
    for number in range(1, 101):
        traffic.record(ended_request(seconds=scale * number / 100))
    found = traffic.last_minute()["mini"]

    assert found.p50_s == pytest.approx(0.50 * scale, rel=0.03)
    assert found.p95_s == pytest.approx(0.95 * scale, rel=0.03)


def test_only_embeddings_that_were_answered_count(traffic: Traffic) -> None:
    refused, other = ended_request(status=499), ended_request()
    other.answer = None
    for each in (refused, other):
        traffic.record(each)

    assert traffic.last_minute() == {}


def test_models_are_told_apart(traffic: Traffic) -> None:
    traffic.record(ended_request("a", texts=1))
    traffic.record(ended_request("b", texts=3))

    assert [found.texts_per_s_by_step for found in traffic.last_minute().values()] == [(0.0,) * STEPS] * 2
    assert traffic.last_minute()["b"].texts_per_s == 3 * traffic.last_minute()["a"].texts_per_s


def test_the_route_tells_the_last_minute(served: Served) -> None:
    served.client.post("/v1/embeddings", json={"input": ["one", "two"], "model": "mini"}).raise_for_status()
    answer = served.client.get("/admin/traffic").json()
    (found,) = [model for model in answer["data"] if model["id"] == "mini"]

    assert answer["step_s"] == STEP_S
    assert found["texts_per_s"] > 0
    assert 0 < found["p50_s"] <= found["p95_s"]
