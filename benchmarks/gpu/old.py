"""Measures parity, memory accounting, throughput and latency on a GPU (`make gpu`).

    python -m benchmarks.gpu

Parity: every family's small model in bfloat16 on the GPU against float32 on the CPU. Memory: what is charged for a
model against what torch's allocator holds, in rest, at the largest batch, and after it has left. Throughput: beside
sentence-transformers on the same device and dtype, interleaved. Latency: calls of a few texts, with recorded passes,
without, and beside the same. `--device cpu` runs the same on a CPU, in float32, where nothing is recorded.
"""

import argparse
import asyncio
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from msgspec import Struct
from sentence_transformers import SentenceTransformer

from benchmarks.lib import workloads
from benchmarks.lib.engine_kit import cosines
from benchmarks.lib.folders import NAMES, resolve
from benchmarks.lib.machine import Watch, warn_if_busy
from benchmarks.lib.measure import SETTLE_S, Run, interleave, speedup
from benchmarks.lib.models import RECIPES, quiet
from benchmarks.lib.report import RESULTS, Report, publish
from benchmarks.lib.workloads import mixed
from engines.batching.autotune import TuningStore
from engines.batching.engine import EmbeddingEngine
from engines.inputs.tokenizer_threads import TokenizerThreads
from engines.loading.loader import LoaderSettings, TorchLoader
from engines.machine import open_scheduler
from engines.models.transformer import TransformerEncoder
from engines.spec import ModelSpec
from engines.types import EmbedCall, ModelFiles

CALLS = {"one short text": ("short", 1), "8 short texts": ("short", 8), "one passage": ("passages", 1)}
"""What one call brings: a workload, and how many of its texts."""

OURS, ORDINARY, PEER = "Embedyard", "Embedyard without graphs", "sentence-transformers"

_CALLS_A_SAMPLE = 20

Embed = Callable[[Sequence[str]], object]
"""One call: texts in, vectors out, on the host."""


def encoder_of(engine: EmbeddingEngine) -> TransformerEncoder:
    """What an engine runs."""
    assert engine._runner is not None, "the engine has not been closed"
    encoder = engine._runner._encoder
    assert isinstance(encoder, TransformerEncoder), "it has a transformer"
    return encoder


def has_graphs(engine: EmbeddingEngine) -> bool:
    """Whether some of its passes were recorded."""
    return bool(encoder_of(engine).sizes)


def forget_graphs(engine: EmbeddingEngine) -> None:
    """From now on it runs as it would without them. Nothing may run meanwhile."""
    encoder = encoder_of(engine)
    encoder.switch_to(next(path for path in encoder.candidate_paths() if path != "graphed"))


def latency(
    programs: Mapping[str, Embed], count: Callable[[str], int], rounds: int, *, settle_s: float = SETTLE_S
) -> dict[str, dict[str, Any]]:
    """Seconds of a call, by what it brings and by program."""
    found = {}
    for what, (name, num_texts) in CALLS.items():
        workload = workloads.make(name, num_texts, count)
        runs: dict[str, Run] = {
            program: partial(_seconds, embed, workload.texts) for program, embed in programs.items()
        }
        seconds = interleave(runs, rounds, settle_s=settle_s, is_warm=False)
        found[what] = {"tokens": workload.num_tokens, "seconds": seconds}
    return found


def _seconds(embed: Embed, texts: Sequence[str]) -> float:
    """Of one call, the median of several."""
    taken = []
    for _ in range(_CALLS_A_SAMPLE):
        started = time.perf_counter()
        embed(texts)
        taken.append(time.perf_counter() - started)
    return median(taken)


def latency_rows(model: str, found: Mapping[str, dict[str, Any]]) -> list[tuple[str, ...]]:
    """Two lines of the table for each call."""
    rows: list[tuple[str, ...]] = []
    for what, case in found.items():
        seconds = case["seconds"]
        for other in (ORDINARY, PEER):
            label = f"{model}, {what} ({case['tokens']} tokens), beside {other}"
            ours = f"{1000 * median(seconds[OURS]):.2f} ms"
            if other in seconds:
                theirs, ratio = f"{1000 * median(seconds[other]):.2f} ms", str(speedup(seconds[OURS], seconds[other]))
            else:
                theirs, ratio = "no graphs here", "–"
            rows.append(("latency", label, ours, theirs, ratio))
    return rows


SMALLEST_COSINE = {"cuda": 0.999, "cpu": 0.999999}
TEXTS_A_CALL = 512
LONG_TEXTS = {"cuda": 256, "cpu": 4}
"""Enough for the largest batch, and one more beside it."""


class Rig:
    """One device with a lane and a loader, as the server has them."""

    def __init__(self, device: str) -> None:
        cores = os.cpu_count() or 1
        self.device = torch.device(device)
        self.lane = open_scheduler(device, cores)
        self.threads = TokenizerThreads(cores)
        self._loader = TorchLoader(device, self.lane, self.threads, LoaderSettings(tuning_store=TuningStore(None)))
        self._loop = asyncio.new_event_loop()

    def load(self, folder: Path, **spec: Any) -> EmbeddingEngine:
        """A warm engine, its batch size found."""
        files = ModelFiles(path=str(folder), revision=folder.name, size_bytes=0)
        engine = self._loader.load(ModelSpec(model_id="m", source=str(folder), **spec), files)
        self._loop.run_until_complete(engine.warm_up())
        while engine.is_tuning:
            time.sleep(0.01)  # trials of batch sizes run by themselves
        return engine

    def embed(self, engine: EmbeddingEngine, texts: Sequence[str], **call: Any) -> Any:
        """Vectors of one call."""
        return self._loop.run_until_complete(engine.run(EmbedCall(model_id="m", texts=tuple(texts), **call))).array()

    def close(self) -> None:
        """End the threads."""
        self.lane.close()
        self.threads.close()
        self._loop.close()

    def allocated_bytes(self) -> int:
        """What torch's allocator has given out on a GPU; 0 on a CPU, which has none."""
        return torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else 0

    def peak_bytes(self) -> int:
        """The most since this was asked last."""
        if self.device.type != "cuda":
            return 0
        peak = torch.cuda.max_memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        return peak


class Parity(Struct, frozen=True):
    """One recipe on the device against float32 on the CPU."""

    name: str
    attention: str
    cosine: float
    notes: tuple[str, ...]


def parity(rig: Rig, reference: Rig, names: Sequence[str], folder: Path) -> Iterator[Parity]:
    """Each recipe, with texts of many lengths and languages, all together and some by themselves."""
    texts = mixed(40, seed=11)
    for name in names:
        with quiet():
            RECIPES[name].build(folder / name)
        spec = RECIPES[name].spec
        plain = reference.load(folder / name, **{**spec, "dtype": "float32"})
        engine = rig.load(folder / name, **spec)
        wanted = reference.embed(plain, texts)
        alone = [cosines(rig.embed(engine, [text]), row[None]) for text, row in zip(texts[:8], wanted, strict=False)]
        cosine = float(np.concatenate([cosines(rig.embed(engine, texts), wanted), *alone]).min())
        yield Parity(name, engine.info.attention, cosine, engine.info.notes)
        for one in (engine, plain):
            one.close()


def memory(rig: Rig, folder: Path) -> dict[str, int]:
    """Bytes that one model is charged with, and bytes that it took."""
    before = rig.allocated_bytes()
    engine = rig.load(folder)
    rest = rig.allocated_bytes() - before
    texts = workloads.make("long", LONG_TEXTS[rig.device.type], workloads.counter(folder)).texts
    rig.peak_bytes()
    rig.embed(engine, texts)
    peak = rig.peak_bytes() - before - rest
    charged, reserved = engine.weight_bytes, engine.workspace_bytes
    engine.close()
    return {
        "charged": charged, "allocated": rest, "reserved": reserved, "peak": peak,
        "left": rig.allocated_bytes() - before,
    }  # fmt: skip


def throughput(rig: Rig, folder: Path, names: Sequence[str], rounds: int, texts_a_call: int) -> dict[str, Any]:
    """Seconds of both programs by workload, in calls of so many texts."""
    engine, peer = rig.load(folder), _peer(rig, folder)
    count, found = workloads.counter(folder), {}

    def ours(texts: Sequence[str]) -> float:
        started = time.perf_counter()
        rig.embed(engine, texts)
        return time.perf_counter() - started

    def theirs(texts: Sequence[str]) -> float:
        started = time.perf_counter()
        peer.encode(list(texts), batch_size=128, show_progress_bar=False)
        return time.perf_counter() - started

    for name in names:
        workload = workloads.make(name, texts_a_call, count)
        runs: dict[str, Run] = {
            "Embedyard": partial(ours, workload.texts),
            "sentence-transformers": partial(theirs, workload.texts),
        }
        found[name] = {"tokens": workload.num_tokens, "seconds": interleave(runs, rounds, is_warm=False)}
        print(" | ".join(throughput_row(folder.name, name, found[name])), flush=True)
    engine.close()
    return found


def _peer(rig: Rig, folder: Path) -> SentenceTransformer:
    dtype = torch.float32 if rig.device.type == "cpu" else torch.bfloat16
    with quiet():
        return SentenceTransformer(str(folder), device=str(rig.device), model_kwargs={"dtype": dtype})


def small_calls(rig: Rig, folder: Path, rounds: int) -> dict[str, dict[str, Any]]:
    """Seconds of calls with a few texts, by program."""
    engines = {OURS: rig.load(folder)}
    if has_graphs(engines[OURS]):
        engines[ORDINARY] = rig.load(folder)
        forget_graphs(engines[ORDINARY])
    peer = _peer(rig, folder)
    programs: dict[str, Embed] = {name: partial(rig.embed, engine) for name, engine in engines.items()}
    programs[PEER] = lambda texts: peer.encode(list(texts), show_progress_bar=False)
    found = latency(programs, workloads.counter(folder), rounds)
    for row in latency_rows(folder.name, found):
        print(" | ".join(row), flush=True)
    for engine in engines.values():
        engine.close()
    return found


def throughput_row(model: str, name: str, found: dict[str, Any]) -> tuple[str, ...]:
    """One line of the table."""
    seconds, tokens = found["seconds"], found["tokens"]
    rates = [f"{tokens / median(seconds[program]):,.0f}" for program in ("Embedyard", "sentence-transformers")]
    return (
        "throughput",
        f"{model}, {name}",
        *rates,
        str(speedup(seconds["Embedyard"], seconds["sentence-transformers"])),
    )


def run(
    device: str,
    recipes: Sequence[str],
    models: Sequence[str],
    names: Sequence[str],
    rounds: int,
    *,
    texts_a_call: int = TEXTS_A_CALL,
) -> Report:
    """Everything, on one device."""
    watch = Watch()
    warn_if_busy(watch.machine)
    rig, reference = Rig(device), Rig("cpu")
    with tempfile.TemporaryDirectory() as draft:
        same = list(parity(rig, reference, recipes, Path(draft)))
    held = {model: memory(rig, resolve(model)) for model in models}
    speed = {model: throughput(rig, resolve(model), names, rounds, texts_a_call) for model in models}
    quick = {model: small_calls(rig, resolve(model), rounds) for model in models}
    for one in (rig, reference):
        one.close()
    kind = rig.device.type
    return Report(
        name=f"gpu-{torch.cuda.get_device_name(rig.device).lower().replace(' ', '-')}"
        if kind == "cuda"
        else "gpu-on-cpu",
        title=f"On {torch.cuda.get_device_name(rig.device) if kind == 'cuda' else 'the CPU'}",
        machine=watch.machine,
        settings={"device": device, "rounds": rounds, "texts a call": texts_a_call},
        header=("what", "of", "Embedyard", "other", "ratio"),
        rows=[
            *(_parity_row(row, kind) for row in same),
            *(row for model, found in held.items() for row in _memory_rows(model, found)),
            *(throughput_row(model, name, found) for model, cases in speed.items() for name, found in cases.items()),
            *(row for model, found in quick.items() for row in latency_rows(model, found)),
        ],
        samples={"parity": same, "memory": held, "throughput": speed, "latency": quick},
        notes=(
            f"parity: worst cosine with float32 on the CPU, {SMALLEST_COSINE[kind]} at least",
            "memory: bytes charged and bytes in torch's allocator; the workspace is an upper bound",
            "throughput: real tokens a second; sentence-transformers in batches of 128, sorted by length",
            "latency: medians of one call after the other, tokenising and the way back to the host included",
        ),
    )


def _parity_row(row: Parity, kind: str) -> tuple[str, ...]:
    verdict = "ok" if row.cosine >= SMALLEST_COSINE[kind] else "TOO FAR"
    return ("parity", row.name, row.attention, f"{row.cosine:.7f}", verdict)


def _memory_rows(model: str, found: dict[str, int]) -> list[tuple[str, ...]]:
    def row(what: str, charged: str, took: str) -> tuple[str, ...]:
        share = f"{found[charged] / found[took]:.2f}" if found[took] else "–"
        return ("memory", f"{model}, {what}", f"{found[charged]:,}", f"{found[took]:,}", share)

    return [
        row("weights", "charged", "allocated"),
        row("workspace", "reserved", "peak"),
        ("memory", f"{model}, after it left", "0", f"{found['left']:,}", "–"),
    ]


def main() -> None:
    """Print the table; exit with 1 when a family is too far from its reference."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--recipes", nargs="*", default=list(RECIPES), choices=list(RECIPES), metavar="RECIPE")
    parser.add_argument("--models", nargs="*", default=["bert-base", "xlmr-large", "qwen3-0.6b"], choices=NAMES)
    parser.add_argument("--workloads", nargs="+", default=["short", "passages", "mixed", "long"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--texts", type=int, default=TEXTS_A_CALL, help="texts a call of the throughput")
    parser.add_argument("--no-save", dest="results", action="store_const", const=None, default=RESULTS)
    asked = parser.parse_args()
    if asked.device.startswith("cuda") and not torch.cuda.is_available():
        raise SystemExit("there is no GPU here that torch can use; --device cpu runs the same on the CPU")
    report = run(asked.device, asked.recipes, asked.models, asked.workloads, asked.rounds, texts_a_call=asked.texts)
    publish(report, asked.results)
    if any(row[-1] == "TOO FAR" for row in report.rows):
        raise SystemExit("a family is too far from float32 on the CPU")


if __name__ == "__main__":
    main()
