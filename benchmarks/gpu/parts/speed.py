"""Measures tokens a second beside sentence-transformers, the share of the matrix-product peak, and small calls."""

import importlib.util
import random
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from sentence_transformers import SentenceTransformer

from benchmarks.gpu.folders import BASE, LARGE, MAX_TOKENS, SPEED_MODELS, folder_of
from benchmarks.gpu.rig import Rig, encoder_of, forget_graphs, has_graphs, timed
from benchmarks.gpu.runner import PartContext
from benchmarks.lib import workloads
from benchmarks.lib.engine_kit import cosines
from benchmarks.lib.measure import interleave, speedup
from benchmarks.lib.models import quiet
from benchmarks.lib.workloads import Count, Workload
from benchmarks.offline.ceiling import read_shape

OURS, ORDINARY, PEER = "Embedyard", "without graphs", "sentence-transformers"
EQUAL = "equal"
EQUAL_TOKENS = 128
NAMES = ("short", "passages", EQUAL, "mixed", "long")

NUM_TEXTS = {
    "full": {"short": 4096, "passages": 2048, EQUAL: 2048, "mixed": 2048, "long": 512},
    "small": {"short": 128, "passages": 64, EQUAL: 64, "mixed": 64, "long": 12},
}
PEER_BATCHES = {"full": 256, "small": 32}
"""Texts of a batch of sentence-transformers: far more than its default of 32 on a GPU, which it would not fill."""

ROUNDS = {"full": 3, "small": 3}
SETTLE_S = 0.05
_SAMPLE_S = 0.25
"""A sample lasts at least so long."""

CALLS = {"one short text": ("short", 1), "8 short texts": ("short", 8), "one passage": ("passages", 1)}
"""What one call brings: a workload, and how many of its texts."""

NUM_CALLS = 30
LEAST_COSINE = {True: 0.998, False: 0.999999}
"""On a GPU both round to bfloat16, each in its own order."""

GEMM = {"full": (8192, 8192, 8192), "small": (512, 512, 512)}
GEMM_ROWS = {"full": 16384, "small": 512}


def throughput(context: PartContext) -> None:
    """Record each model on each workload, interleaved with sentence-transformers in the same dtype."""
    rig = Rig(context.device, tunes=True)
    size = context.settings["size"]
    made: list[Workload] = []  # of the first model: all have the same tokenizer
    for name in SPEED_MODELS[size]:
        folder = folder_of(name, context.device)
        engine, peer = rig.load(folder), _peer(rig, folder)
        made = made or [_workload(each, NUM_TEXTS[size][each], workloads.counter(folder)) for each in NAMES]
        for workload in made:
            if context.left_s < 5.0:
                context.record(model=name, workload=workload.name, ok=None, raised="no time left in this part")
                continue
            runs: dict[str, Callable[[], Any]] = {
                OURS: partial(rig.embed, engine, workload.texts),
                PEER: partial(_encode, peer, workload.texts, PEER_BATCHES[size]),
            }
            worst = float(cosines(runs[OURS](), runs[PEER]()).min())
            seconds = interleave_calls(runs, ROUNDS[size])
            context.record(
                model=name, workload=workload.name, texts=len(workload.texts), tokens=workload.num_tokens,
                seconds=seconds, tokens_per_s={each: workload.num_tokens / median(s) for each, s in seconds.items()},
                ratio=str(speedup(seconds[OURS], seconds[PEER])), times=speedup(seconds[OURS], seconds[PEER]).value,
                path=engine.info.path, batch_tokens=engine._batch.max_tokens, peer_attention=_attention(peer),
                worst_cosine=worst, ok=worst >= LEAST_COSINE[context.is_cuda],
            )  # fmt: skip
        engine.close()
        del peer
    rig.close()


def roofline(context: PartContext) -> None:
    """Record the share of the measured matrix-product peak that passages reach with a large model, round by round."""
    rig = Rig(context.device, tunes=True)
    size = context.settings["size"]
    folder = folder_of(LARGE[size], context.device)
    engine = rig.load(folder)
    shape = read_shape(folder)
    workload = _workload("passages", NUM_TEXTS[size]["passages"], workloads.counter(folder))
    dtype = encoder_of(engine)._model.dtype
    runs: dict[str, Callable[[], object]] = {OURS: partial(rig.embed, engine, workload.texts)}
    products = {"square": [GEMM[size]], "its layers": [(GEMM_ROWS[size], *linear) for linear in shape.linears]}
    runs |= {name: partial(_multiply, rig, _factors(rig, shapes, dtype)) for name, shapes in products.items()}
    seconds = interleave_calls(runs, ROUNDS[size] + 2)
    flops = shape.flops(workload.tokens)
    own = [flops / each for each in seconds[OURS]]
    peaks = {
        name: [sum(2 * a * b * c for a, b, c in shapes) / each for each in seconds[name]]
        for name, shapes in products.items()
    }
    context.record(
        model=folder.name, workload="passages", dtype=str(dtype).removeprefix("torch."), tokens=workload.num_tokens,
        flops_per_s=median(own), peak_flops_per_s={name: median(rates) for name, rates in peaks.items()},
        share=median(a / b for a, b in zip(own, peaks["square"], strict=True)),
        share_of_its_layers=median(a / b for a, b in zip(own, peaks["its layers"], strict=True)), ok=True,
    )  # fmt: skip
    engine.close()
    rig.close()


def small_calls(context: PartContext) -> None:
    """Record the seconds of calls of a few texts in this process, with CUDA graphs, without, and of the peer."""
    rig = Rig(context.device)
    size = context.settings["size"]
    folder = folder_of(BASE[size], context.device)
    engines = {OURS: rig.load(folder)}
    if has_graphs(engines[OURS]):
        engines[ORDINARY] = rig.load(folder)
        forget_graphs(engines[ORDINARY])
    peer, count = _peer(rig, folder), workloads.counter(folder)
    for what, (name, num_texts) in CALLS.items():
        texts = _workload(name, num_texts, count)
        runs: dict[str, Callable[[], Any]] = {
            program: partial(rig.embed, engine, texts.texts) for program, engine in engines.items()
        }
        runs[PEER] = partial(_encode, peer, texts.texts, PEER_BATCHES[size])
        taken = {program: _p50(run) for program, run in runs.items()}
        context.record(
            what=what, model=folder.name, tokens=texts.num_tokens, ok=True,
            p50_ms={program: 1000 * seconds for program, seconds in taken.items()},
        )  # fmt: skip
    for engine in engines.values():
        engine.close()
    rig.close()


def peers(context: PartContext) -> str:
    """Say why the other servers are not measured here: neither can be installed beside this machine's packages."""
    reasons = {
        "vllm": "vLLM 0.33.0's wheel has 336 MB, of which 64 MiB may travel",
        "infinity_emb": "Infinity 0.0.78 wants numpy < 2 and sentence-transformers < 4",
    }
    return "; ".join(
        f"{reason}{' (it is installed all the same)' if importlib.util.find_spec(package) else ''}"
        for package, reason in reasons.items()
    )


def equal(num_texts: int, num_tokens: int, count: Count, seed: int = 7) -> Workload:
    """Return texts that all have the same number of tokens, so that padding costs nobody anything.

    Tokens of words that are parted by spaces add up, so that each word is counted once.
    """
    rng, words = random.Random(seed), workloads.english()
    around = count("")
    sizes = {word: count(word) - around for word in set(words)}
    texts: list[str] = []
    while len(texts) < num_texts:
        start = end = rng.randrange(len(words) - num_tokens)
        size = around
        while size < num_tokens:
            size += sizes[words[end]]
            end += 1
        text = " ".join(words[start:end])
        if size == num_tokens and count(text) == num_tokens:
            texts.append(text)
    return Workload(EQUAL, tuple(texts), (num_tokens,) * num_texts)


def _workload(name: str, num_texts: int, count: Count) -> Workload:
    return equal(num_texts, EQUAL_TOKENS, count) if name == EQUAL else workloads.make(name, num_texts, count)


def _peer(rig: Rig, folder: Path) -> SentenceTransformer:
    """Return sentence-transformers in our dtype, with flash attention where that is installed."""
    options: dict[str, Any] = {"dtype": torch.bfloat16 if rig.is_cuda else torch.float32}
    if rig.is_cuda and importlib.util.find_spec("flash_attn"):
        options["attn_implementation"] = "flash_attention_2"
    with quiet():
        peer = SentenceTransformer(str(folder), device=str(rig.device), model_kwargs=options)
    peer.max_seq_length = MAX_TOKENS
    return peer


def _attention(peer: SentenceTransformer) -> str:
    model: Any = peer[0].auto_model
    return str(model.config._attn_implementation)


def _encode(peer: SentenceTransformer, texts: Sequence[str], batch_size: int) -> Any:
    return peer.encode(list(texts), batch_size=batch_size, show_progress_bar=False)


def interleave_calls(runs: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Return seconds of one call by program; a sample is the mean of as many calls as fill `_SAMPLE_S`."""
    first_s = {name: timed(run) for name, run in runs.items()}
    first_s = {name: min(first_s[name], timed(run)) for name, run in runs.items()}  # warm, unless it is long
    numbers = {name: max(1, round(_SAMPLE_S / max(seconds, 1e-6))) for name, seconds in first_s.items()}

    def sample(name: str) -> float:
        return timed(lambda: [runs[name]() for _ in range(numbers[name])]) / numbers[name]

    return interleave({name: partial(sample, name) for name in runs}, rounds, settle_s=SETTLE_S)


def _p50(run: Callable[[], object]) -> float:
    for _ in range(5):
        run()
    return median(timed(run) for _ in range(NUM_CALLS))


def _factors(rig: Rig, shapes: Sequence[tuple[int, int, int]], dtype: torch.dtype) -> list[tuple[Any, Any, Any]]:
    """Return random factors and results: a product of zeros draws less power, and runs faster."""
    return [
        (
            torch.randn(rows, inner, device=rig.device, dtype=dtype),
            torch.randn(columns, inner, device=rig.device, dtype=dtype),
            torch.empty(rows, columns, device=rig.device, dtype=dtype),
        )
        for rows, inner, columns in shapes
    ]


def _multiply(rig: Rig, products: Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]) -> None:
    for tokens, weight, out in products:
        torch.mm(tokens, weight.t(), out=out)
    rig.synchronize()
