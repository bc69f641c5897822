"""Tests how samples become the table of a request's time."""

import sys
import time

import pytest

from benchmarks.http.request_profile import MemoryTransport, Sampler, layer_of, sampled, table


def test_each_part_of_a_request_counts_for_its_layer() -> None:
    assert layer_of("/venv/site-packages/uvicorn/protocols/http/httptools_impl.py") == "HTTP: parse and write"
    assert layer_of("/tree/router/observability/recorder.py") == "metrics"
    assert layer_of("/tree/router/observability/logs.py") == "log"
    assert layer_of("/tree/engines/inputs/tokenizer.py") == "tokenize"
    assert layer_of("/tree/somewhere.py") == "other"


def test_microseconds_are_shares_of_the_loop() -> None:
    counts = [("a/litestar/app.py", 2), ("a/litestar/routes/http.py", 1), ("router/auth/guards.py", 1)]

    assert table(counts, 400.0) == [
        ("Litestar: route, request, response", "75 %", "300"),
        ("key and limits", "25 %", "100"),
        ("all", "100 %", "400"),
    ]


async def test_a_response_is_complete_when_its_whole_body_is_written() -> None:
    transport = MemoryTransport()
    transport.write(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nda")
    transport.write(b"ta")

    assert (await transport.answer()).endswith(b"data")


@pytest.mark.skipif(sys.platform != "linux", reason="the timer is Linux's")
def test_samples_are_of_the_threads_own_time() -> None:
    sampler = Sampler()
    with sampled(sampler):
        began_s = time.thread_time()
        while time.thread_time() - began_s < 0.1:
            pass
        while_busy = sampler.counts.total()
        time.sleep(0.1)

    assert while_busy >= 5
    assert sampler.counts.total() - while_busy <= 1
    assert set(sampler.counts) == {__file__}
