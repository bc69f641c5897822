"""Measures the engine's scores beside `CrossEncoder.predict` of sentence-transformers, and beside Infinity.

    python -m benchmarks.offline.rerank --model minilm [--cpu-time]

One query and 100 documents a call, of mixed and of equal lengths, on rerankers of random weights in the sizes of
ms-marco-MiniLM-L6 and bge-reranker-base. Each program runs in a process of its own, in interleaved rounds; Infinity in
an environment of its own (`python -m benchmarks.lib.peers` makes it), and is left out where that is missing. First all
score the same pairs: `off by` is the largest difference from sentence-transformers. On a busy machine `--cpu-time`
compares the processor time that each takes, of all its threads.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from transformers import BertConfig, BertForSequenceClassification

from benchmarks.lib import workloads
from benchmarks.lib.folders import BENCH, MAX_TOKENS, minilm_package, prepare
from benchmarks.lib.machine import Watch, warn_if_busy
from benchmarks.lib.measure import SETTLE_S, Run, interleave, speedup
from benchmarks.lib.peers import OURS, interpreter, is_installed
from benchmarks.lib.report import Report, add_save_option, publish
from benchmarks.lib.worker import Worker, WorkerFailed

SIZES: dict[str, dict[str, int]] = {
    "minilm": {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536},
    "bge-base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
}
"""Shapes of the backbones."""

CASES = {"mixed": "documents", "equal": "equal"}
"""The workload of each case."""

BASE = "sentence-transformers"

Peers = Mapping[str, tuple[str, str | None]]

PEERS: Peers = {BASE: ("cross-encoder", None), "Infinity (torch)": ("infinity-rerank", "infinity")}
"""By name: the kind in `peers/peer.py`, and the environment."""

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")


def build(size: str, root: Path = BENCH / "models") -> Path:
    """The folder of a reranker of that size with MiniLM's tokenizer, built when it is not there yet."""
    folder = root / f"reranker-{size}"
    if (folder / "built").exists():
        return folder
    prepare(BENCH)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    torch.manual_seed(7)
    shape: dict[str, Any] = {"vocab_size": 30522, "num_labels": 1, **SIZES[size]}
    model: Any = BertForSequenceClassification(BertConfig(**shape))
    model.save_pretrained(folder)
    for file in TOKENIZER_FILES:
        shutil.copy(minilm_package() / file, folder / file)
    limits = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(limits | {"model_max_length": MAX_TOKENS}))
    (folder / "built").touch()
    return folder


@contextmanager
def open_programs(folder: Path, peers: Peers = PEERS) -> Iterator[tuple[list[Worker], list[str]]]:
    """Ours and the peers that start, all warm; and a note for each that does not."""
    with ExitStack() as stack:
        own = Worker(OURS, "own.py", [str(folder), "rerank"], python=interpreter(None))
        workers, notes = [stack.enter_context(own).wait_until_warm()], []
        for name, (kind, environment) in peers.items():
            if not is_installed(environment):
                notes.append(f"left out: {name} is not installed (python -m benchmarks.lib.peers)")
                continue
            worker = Worker(name, "peer.py", [kind, str(folder)], python=interpreter(environment))
            try:
                workers.append(stack.enter_context(worker).wait_until_warm())
            except WorkerFailed as error:
                notes.append(f"left out: {str(error).splitlines()[0]}")
                print(error, file=sys.stderr, flush=True)
        yield workers, notes


def run(  # the options of the command
    folder: Path,
    cases: Sequence[str],
    rounds: int,
    documents: int = 100,
    *,
    peers: Peers = PEERS,
    is_cpu_time: bool = False,
) -> Report:
    """Measure a reranker."""
    watch = Watch()
    warn_if_busy(watch.machine)
    count = workloads.counter(folder)
    query = workloads.make("short", 1, count).texts[0]
    calls = {case: [[query, *workloads.make(CASES[case], documents, count).texts]] for case in cases}
    with open_programs(folder, peers) as (workers, notes):
        first = calls[cases[0]][0]
        scores = {worker.name: worker.vectors(first[:21]) for worker in workers}
        off_by = {name: float(np.abs(found - scores[BASE]).max()) for name, found in scores.items()}
        samples: dict[str, dict[str, list[float]]] = {}
        for case in cases:
            runs: dict[str, Run] = {
                worker.name: _timed(worker, calls[case], is_cpu_time=is_cpu_time) for worker in workers
            }
            samples[case] = interleave(runs, rounds, settle_s=SETTLE_S, is_warm=False)
            print(case, {name: f"{documents / median(times):.0f}" for name, times in samples[case].items()}, flush=True)
        machine = watch.machine
    return Report(
        name=f"rerank-{folder.name.removeprefix('reranker-')}{'-cpu-time' if is_cpu_time else ''}",
        title=f"Scores of one query and {documents} documents, {folder.name}, float32"
        f"{', by processor time' if is_cpu_time else ''}",
        machine=machine,
        settings={"model": folder.name, "rounds": rounds, "documents": documents},
        header=("program", *(column for case in cases for column in (f"{case}, texts/s", f"{OURS} ×")), "off by"),
        rows=_rows(samples, off_by, documents),
        samples={"seconds": samples, "off_by": off_by},
        notes=(*notes, "×: how many times as fast ours is, ratio of medians, in brackets the worst and best round"),
    )


def _timed(worker: Worker, calls: list[list[str]], *, is_cpu_time: bool) -> Run:
    return lambda: worker.cpu_seconds(calls) if is_cpu_time else worker.seconds(calls)


def _rows(
    samples: dict[str, dict[str, list[float]]], off_by: dict[str, float], documents: int
) -> list[tuple[str, ...]]:
    return [
        (
            name,
            *(
                cell
                for times in samples.values()
                for cell in (f"{documents / median(times[name]):.0f}", str(speedup(times[OURS], times[name])))
            ),
            f"{off:.0e}",
        )
        for name, off in off_by.items()
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table, and save it."""
    parser: Any = argparse.ArgumentParser(prog="python -m benchmarks.offline.rerank", description=__doc__)
    parser.add_argument("--model", default="minilm", choices=list(SIZES))
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--documents", type=int, default=100)
    parser.add_argument("--cpu-time", action="store_true", help="processor time instead of time, on a busy machine")
    add_save_option(parser)
    asked = parser.parse_args(argv)
    found = run(build(asked.model), asked.cases, asked.rounds, asked.documents, is_cpu_time=asked.cpu_time)
    publish(found, asked.results)


if __name__ == "__main__":
    main()
