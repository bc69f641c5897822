"""Makes measurements of a load for tests."""

from collections.abc import Sequence

from router.loadgen.report import Failure, Measured
from router.loadgen.results import Latency, Moment

LATENCY = Latency(0.01, 0.02, 0.03, 0.04, 0.05)


def measured(per_s: float, *, texts: Sequence[int], failed: Sequence[int]) -> Measured:
    timeline = [
        Moment(at_s=at_s, requests=ok + bad, failed=bad, texts=ok, tokens=ok, latency_s=LATENCY if ok else None)
        for at_s, (ok, bad) in enumerate(zip(texts, failed, strict=True))
    ]
    return Measured(
        load=f"{per_s:g} requests/s", clients=0, requests_per_s=per_s, seconds=float(len(texts)),
        requests=sum(texts) + sum(failed), failed=sum(failed), texts_per_s=sum(texts) / len(texts), tokens_per_s=None,
        latency_s=LATENCY, failures={"timed out": Failure(sum(failed), "")} if any(failed) else {}, client_cores=0.1,
        client_late_p99_s=0.001, timeline=timeline,
    )  # fmt: skip
