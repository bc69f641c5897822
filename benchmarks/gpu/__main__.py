"""Runs the parts of the GPU measurement, in ten minutes, into one file (`make gpu`).

    python -m benchmarks.gpu                            what is not in the result file yet
    python -m benchmarks.gpu --only throughput          one part, again
    python -m benchmarks.gpu --device cpu               what a CPU can run, on small sizes
    python -m benchmarks.gpu --list                     the parts, their questions and their times
    python -m benchmarks.gpu --tables                   write the tables of docs/benchmarks.md from the result files

Every part runs in its own process within its own time, and the file is written after each. Exits with 1 when a part
failed, when one ran out of time, or when one found what must not be.
"""

import argparse
import signal
import sys
from pathlib import Path
from types import FrameType

from benchmarks.gpu import tables
from benchmarks.gpu.device import PART_ENTRY, read_device
from benchmarks.gpu.plan import BUDGET_S, PARTS, PRELOAD
from benchmarks.gpu.results import Device, ResultFile, fingerprint
from benchmarks.gpu.runner import Launcher, Part, Runner, ask, launcher
from benchmarks.lib.machine import Watch
from benchmarks.lib.report import RESULTS

_DESCRIBE_S = 120.0


def main() -> None:
    """Run what is asked for."""
    asked = _arguments()
    if asked.list:
        print(listing())
        return
    if asked.tables:
        tables.rewrite(RESULTS)
        return
    signal.signal(signal.SIGTERM, _exit)  # so that the running part is ended, too
    starter = launcher(PRELOAD, spawns=asked.spawn)
    device = describe(starter, asked.device)
    settings = {"size": "full" if device.kind == "cuda" else "small"}
    file = ResultFile(asked.results, device)
    file.resume([asked.results, RESULTS], settings)
    runner = Runner(file, asked.device, starter, sources=fingerprint(), commit=Watch().machine.commit)
    print(f"{device.name}, Python {device.python}, {device.packages}", flush=True)
    is_done = runner.run(PARTS, asked.seconds, asked.only)
    print(f"\n{tables.findings(file.result)}\n\nsaved: {file.path}", flush=True)
    bad = tables.failures(file.result, asked.only)
    if bad:
        print("\n".join(["not as it must be:", *bad]), flush=True)
    raise SystemExit(0 if is_done and not bad else 1)


def describe(starter: Launcher, device: str) -> Device:
    """Ask a process of its own what the device is: a part could not be forked from one that has asked CUDA."""
    part = Part(name="device", question="", entry=PART_ENTRY, expected_s=0, limit_s=_DESCRIBE_S)
    result = ask(starter, part, device, _DESCRIBE_S)
    if result.state != "done":
        raise SystemExit(result.reason)
    return read_device(result.records[0])


def listing() -> str:
    """Return the parts as a table."""
    lines = [f"{'part':14} {'H200, s':>8} {'limit':>6} {'CPU':>6}  question"]
    for part in PARTS:
        cpu = f"{part.cpu_limit_s:.0f}" if part.cpu_limit_s else "–"
        lines.append(f"{part.name:14} {part.expected_s:8.0f} {part.limit_s:6.0f} {cpu:>6}  {part.question}")
    total_s = sum(part.expected_s for part in PARTS)
    return "\n".join([*lines, f"{'together':14} {total_s:8.0f} of {BUDGET_S:.0f}"])


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--only", nargs="+", default=[], choices=[part.name for part in PARTS], metavar="PART")
    parser.add_argument("--seconds", type=float, default=BUDGET_S, help="for all parts together")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result file")
    parser.add_argument("--spawn", action="store_true", help="start each part anew, where CUDA does not survive a fork")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--tables", action="store_true")
    return parser.parse_args()


def _exit(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


if __name__ == "__main__":
    main()
