"""Measures `embedyard embed` on passages beside a loop over the HTTP API and `SentenceTransformer.encode`.

    python -m benchmarks.offline.corpus [--passages 100000] [--cpu-time]

All three read the same JSONL and write the same matrix (`.npy`), with the embedded all-MiniLM-L6-v2, each in a process
of its own. The loop sends 64 texts a request to `embedyard serve` by OpenAI's client, one request after the other, as
scripts do. A run of 8 passages is measured first and taken off: it is the start of Python and the load of the model.
With `--cpu-time` the processor time of all processes is compared, on a busy machine. Vectors that differ from those of
`SentenceTransformer` by more than rounding end the run; `--passages 500` checks that in a minute.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.lib import workloads
from benchmarks.lib.folders import minilm_package
from benchmarks.lib.machine import Watch, warn_if_busy
from benchmarks.lib.measure import speedup
from benchmarks.lib.report import Report, add_save_option, publish

MODEL = "all-MiniLM-L6-v2"
OURS, LOOP, BASE = "embedyard embed", "loop over HTTP", "SentenceTransformer.encode"
_FEW = 8
_ROUNDING = 1e-5
"""Of components of unit vectors in float32; lengths of batches differ between the programs."""

_ENCODE = """
import json, sys
import numpy as np
from sentence_transformers import SentenceTransformer
texts = [json.loads(line)["text"] for line in open(sys.argv[1])]
np.save(sys.argv[2], SentenceTransformer(sys.argv[3], device="cpu").encode(texts, batch_size=32))
"""
_LOOP = """
import json, re, subprocess, sys
import numpy as np
from openai import OpenAI
texts = [json.loads(line)["text"] for line in open(sys.argv[1])]
command = [sys.executable, "-m", "router", "serve", "--port", "0"]
server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
url = next(found[1] for line in server.stdout if (found := re.search(r"serves (http://\\S+)", line)))
rows = []
client = OpenAI(base_url=f"{url}/v1", api_key="none", timeout=600)
for start in range(0, len(texts), 64):
    answer = client.embeddings.create(model=sys.argv[3], input=texts[start : start + 64])
    rows += [item.embedding for item in answer.data]
np.save(sys.argv[2], np.array(rows, np.float32))
server.terminate()
server.communicate()
"""


def commands(source: Path, out: Path) -> dict[str, list[str]]:
    """Return the command of each program."""
    python = sys.executable
    return {
        OURS: [python, "-m", "router", "embed", MODEL, str(source), "-o", str(out), "--overwrite"],
        LOOP: [python, "-c", _LOOP, str(source), str(out), MODEL],
        BASE: [python, "-c", _ENCODE, str(source), str(out), str(minilm_package())],
    }


def seconds_of(command: Sequence[str], folder: Path, *, is_cpu_time: bool) -> float:
    """Run a command; return its seconds of wall clock, or of processor time with those of its children."""
    environ = os.environ | {"STATE_DIR": str(folder / "state"), "LOG_FORMAT": "console", "PYTHONPATH": str(Path.cwd())}
    before, begun_s = _cpu_s(), time.perf_counter()
    subprocess.run(command, cwd=folder, env=environ, check=True, capture_output=True)
    return _cpu_s() - before if is_cpu_time else time.perf_counter() - begun_s


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def distances(vectors: Mapping[str, Any]) -> dict[str, float]:
    """Return by how much the components of each program differ at most from those of `SentenceTransformer`.

    Raises:
        SystemExit: by more than rounding, or in the number of rows.
    """
    base = vectors[BASE]
    for program, found in vectors.items():
        if found.shape != base.shape or not np.allclose(found, base, rtol=0.0, atol=_ROUNDING):
            raise SystemExit(f"{program}: other vectors than {BASE}")
    return {program: float(np.abs(found - base).max()) for program, found in vectors.items()}


def run(passages: int, rounds: int, *, is_cpu_time: bool) -> Report:
    """Measure the three programs in interleaved rounds."""
    watch = Watch()
    warn_if_busy(watch.machine)
    texts = workloads.make("passages", passages, workloads.counter(minilm_package())).texts
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        measure = partial(seconds_of, folder=folder, is_cpu_time=is_cpu_time)
        few, many = folder / "few.jsonl", folder / "many.jsonl"
        few.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[:_FEW]))
        many.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        samples: dict[str, list[float]] = {program: [] for program in (OURS, LOOP, BASE)}
        vectors: dict[str, Any] = {}
        for _ in range(rounds):
            for program, times in samples.items():
                start_s = measure(commands(few, folder / "few.npy")[program])
                times.append(measure(commands(many, folder / "many.npy")[program]) - start_s)
                vectors[program] = np.load(folder / "many.npy")
                print(program, f"{passages / times[-1]:.0f} texts/s", flush=True)
        machine = watch.machine
    off_by = distances(vectors)
    if min(min(times) for times in samples.values()) <= 0:
        raise SystemExit(
            "vectors are equal; a start took longer than the passages: measure more, or on a quieter machine"
        )
    return Report(
        name=f"corpus{'-cpu-time' if is_cpu_time else ''}",
        title=f"{passages} passages of 60 to 120 tokens from JSONL to .npy, {MODEL}"
        f"{', by processor time' if is_cpu_time else ''}",
        machine=machine,
        settings={"passages": passages, "rounds": rounds},
        header=("program", "texts/s", f"{OURS} ×", "off by"),
        rows=[
            (name, f"{passages / median(times):.0f}", str(speedup(samples[OURS], times)), f"{off_by[name]:.0e}")
            for name, times in samples.items()
        ],
        samples={"seconds": samples, "off_by": off_by},
        notes=("the time of a run of 8 passages is taken off", "×: how many times as fast ours is"),
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table, and save it."""
    parser: Any = argparse.ArgumentParser(prog="python -m benchmarks.offline.corpus", description=__doc__)
    parser.add_argument("--passages", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--cpu-time", action="store_true", help="processor time instead of time, on a busy machine")
    add_save_option(parser)
    asked = parser.parse_args(argv)
    publish(run(asked.passages, asked.rounds, is_cpu_time=asked.cpu_time), asked.results)


if __name__ == "__main__":
    main()
