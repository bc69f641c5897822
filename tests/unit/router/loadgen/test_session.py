"""A run: its warm-up request, its phases, and Ctrl+C."""

import os
import signal

import pytest

from router.loadgen import Phase, phases, session
from router.loadgen.http_client import Target, encode
from router.loadgen.progress import NoProgress
from router.loadgen.report import Measured
from router.loadgen.requests import CannotMeasure, warm_up
from router.loadgen.session import Job, measure
from tests.testkit.http_wire import respond_with, response, wire

WIDE = b'{"data":[{"embedding":"' + b"AAAA" * 128 + b'"}]}'  # 96 floats in base64


class Impatient(NoProgress):
    """Sends SIGINT as soon as a phase begins."""

    def begin(self, phase: Phase) -> None:
        os.kill(os.getpid(), signal.SIGINT)


def job(target: Target, *phases: Phase, seconds: float = 30.0) -> Job:
    return Job(target, [encode(target, ["text"])], phases, seconds)


class TickingTime:
    """Fakes the module `time`: each look at the clock takes two milliseconds, however busy the machine is."""

    def __init__(self) -> None:
        self._now_s = 1000.0

    def perf_counter(self) -> float:
        self._now_s += 0.002
        return self._now_s

    process_time = perf_counter


async def test_every_phase_is_measured_and_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    time = TickingTime()
    monkeypatch.setattr(phases, "time", time)
    monkeypatch.setattr(session, "time", time)
    shown: list[Measured] = []

    class Watched(NoProgress):
        def end(self, measured: Measured) -> None:
            shown.append(measured)

    async with wire(respond_with(response())) as (_, target):
        found, is_whole = await measure(job(target, Phase(per_s=100.0), Phase(clients=2), seconds=0.3), Watched())

    assert is_whole
    assert found == shown
    assert [phase.load for phase in found] == ["100 requests/s", "2 clients"]
    assert all(phase.requests > 3 and not phase.failed for phase in found)
    assert all(sum(moment.requests for moment in phase.timeline) == phase.requests for phase in found)


async def test_control_c_ends_the_phase_and_leaves_the_others_out() -> None:
    before = signal.getsignal(signal.SIGINT)
    async with wire(respond_with(response())) as (_, target):
        found, is_whole = await measure(job(target, Phase(per_s=200.0), Phase(clients=2)), Impatient())

    assert (len(found), is_whole) == (1, False)
    assert found[0].seconds < 5
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize(("body", "width"), [(WIDE, 96), (b'{"data":[{"embedding":[1,2,3]}]}', 3)])
async def test_the_first_answer_tells_the_width(body: bytes, width: int) -> None:
    async with wire(respond_with(response(body))) as (_, target):
        assert await warm_up(target, encode(target, ["text"])) == width


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (response(b'{"error":{"message":"who are you?"}}', "401 Unauthorized"), "answered 401: who are you?"),
        (response(b"<html>"), "no embeddings: is it an OpenAI-compatible server"),
        (response(b'{"data":[]}'), "no embeddings"),
        (b"", "the server closed the connection"),
    ],
)
async def test_a_server_that_cannot_be_measured_says_why(answer: bytes, message: str) -> None:
    async with wire(respond_with(answer, then_closes=True)) as (_, target):
        with pytest.raises(CannotMeasure, match=message):
            await warm_up(target, encode(target, ["text"]))
