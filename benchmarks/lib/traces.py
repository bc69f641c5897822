"""Makes four traces: days of requests on which orders of eviction differ. They depend on a seed only.

    python -m benchmarks.lib.traces    writes them to benchmarks/traces

`zipf`: ten models, asked for in the proportion 1, 1/2, 1/3 … at random. `diurnal`: two teams of models by day and a
third by night, with bursts. `scan`: four models that are always in use, and now and then each of eight others once.
`pairs`: an embedding model and a reranker for each of four applications, asked one after the other.
"""

import gzip
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

from engines.trace import Trace, TraceModel, TraceRequest, encode_line

FOLDER = Path(__file__).parents[1] / "traces"
GIB = 2**30
HOUR_S = 3600.0
SEED = 24

# Sizes of embedding models and rerankers in bfloat16 or float16, as their repositories have them; loading them from the
# page cache takes about a second and a half second a GiB (`benchmarks.lifecycle.cold_start`).
_SIZES_GIB = (0.1, 0.2, 0.4, 0.6, 1.1, 1.1, 1.2, 2.1, 7.5, 14.1)
_LOAD_S, _LOAD_S_A_GIB = 1.0, 0.5


def _model(name: str, size_gib: float) -> TraceModel:
    return TraceModel(
        model_id=name,
        weight_bytes=int(size_gib * GIB),
        workspace_bytes=int(min(1.0, 0.2 + size_gib / 10) * GIB),
        load_s=round(_LOAD_S + size_gib * _LOAD_S_A_GIB, 2),
    )


def _request(at_s: float, model: TraceModel, random: Random) -> TraceRequest:
    tokens = int(random.lognormvariate(4.0, 1.0)) + 1
    seconds = 0.004 + tokens * model.weight_bytes / GIB * 2e-6
    return TraceRequest(at_s=round(at_s, 3), model_id=model.model_id, tokens=tokens, seconds=round(seconds, 4))


def _arrivals(random: Random, until_s: float, rate: Callable[[float], float], highest: float) -> Iterator[float]:
    """Yield the times of a Poisson process whose rate varies, by thinning."""
    at_s = 0.0
    while (at_s := at_s + random.expovariate(highest)) < until_s:
        if random.random() * highest < rate(at_s):
            yield at_s


def zipf(random: Random) -> Trace:
    """Ten models for four hours, a request every two seconds; large models are not the rarest."""
    models = [_model(f"model-{index}", size) for index, size in enumerate(random.sample(_SIZES_GIB, 10))]
    weights = [1 / rank for rank in range(1, 11)]
    times = _arrivals(random, 4 * HOUR_S, lambda at_s: 0.5, 0.5)
    return _trace(models, [_request(at_s, random.choices(models, weights)[0], random) for at_s in times])


def diurnal(random: Random) -> Trace:
    """A day of three teams of three models; two work by day, one by night, and every tenth request brings a burst."""
    models = [_model(f"team-{index // 3}-{index % 3}", size) for index, size in enumerate((*_SIZES_GIB[1:8], 0.6, 1.1))]
    requests = []
    for team, busy in enumerate(((8, 18), (9, 17), (0, 6))):
        own = models[3 * team : 3 * team + 3]

        def rate(at_s: float, busy: tuple[int, int] = busy) -> float:
            return 0.1 if busy[0] <= at_s / HOUR_S < busy[1] else 0.002

        for at_s in _arrivals(random, 24 * HOUR_S, rate, 0.1):
            model = random.choices(own, (6, 3, 1))[0]
            burst = 20 if random.random() < 0.1 else 1
            requests += [_request(at_s + 0.05 * number, model, random) for number in range(burst)]
    return _trace(models, requests)


def scan(random: Random) -> Trace:
    """Four hours in which four models are in steady use, and every ten minutes each of eight others is asked once."""
    steady = [_model(f"steady-{index}", size) for index, size in enumerate((1.1, 2.1, 1.2, 0.6))]
    others = [_model(f"once-{index}", size) for index, size in enumerate((0.4, 1.1, 0.2, 0.6, 1.2, 0.1, 2.1, 1.1))]
    times = _arrivals(random, 4 * HOUR_S, lambda at_s: 0.2, 0.2)
    requests = [_request(at_s, random.choice(steady), random) for at_s in times]
    for start_s in range(300, int(4 * HOUR_S), 600):
        requests += [_request(start_s + 12.0 * place, model, random) for place, model in enumerate(others)]
    return _trace([*steady, *others], requests)


def pairs(random: Random) -> Trace:
    """Four applications for four hours: a query is embedded, and its results are reranked a moment later."""
    embedders = [_model(f"embed-{index}", size) for index, size in enumerate((1.1, 0.6, 2.1, 0.4))]
    rerankers = [_model(f"rerank-{index}", size) for index, size in enumerate((1.1, 2.1, 1.1, 0.6))]
    requests = []
    for at_s in _arrivals(random, 4 * HOUR_S, lambda at_s: 0.1, 0.1):
        (app,) = random.choices(range(4), (8, 4, 2, 1))
        requests += [_request(at_s, embedders[app], random), _request(at_s + 0.3, rerankers[app], random)]
    return _trace([*embedders, *rerankers], requests)


def _trace(models: list[TraceModel], requests: list[TraceRequest]) -> Trace:
    return Trace({model.model_id: model for model in models}, sorted(requests, key=lambda request: request.at_s))


TRACES: dict[str, Callable[[Random], Trace]] = {"zipf": zipf, "diurnal": diurnal, "scan": scan, "pairs": pairs}


def make(name: str) -> Trace:
    """Make the trace of this name."""
    return TRACES[name](Random(SEED))


def encode(trace: Trace) -> bytes:
    """Encode a trace as the lines of a file."""
    models, requests = map(encode_line, trace.models.values()), map(encode_line, trace.requests)
    return b"".join([*models, *requests])


def main() -> None:
    """Write all traces."""
    FOLDER.mkdir(exist_ok=True)
    for name in TRACES:
        (FOLDER / f"{name}.jsonl.gz").write_bytes(gzip.compress(encode(make(name)), mtime=0))


if __name__ == "__main__":
    main()
