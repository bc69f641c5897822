"""Reads a safetensors file with other readers, once for each question: `readers.py KIND FILE`.

Tensors are in main memory at the end: with a kind that ends in `-copied` each in memory of its own, as a model needs it
that outlives the reader; else where the reader puts them.
"""

import gc
import importlib
import sys
import time
import zlib
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

# This is a script, so its own folder is on the path.
lines: Any = importlib.import_module("lines")

Tensors = dict[str, Any]


def fastsafetensors(file: str, opened: ExitStack, *, copies: bool) -> Tensors:
    """Read with fastsafetensors, without GPU Direct Storage."""
    package: Any = importlib.import_module("fastsafetensors")
    reader = opened.enter_context(package.fastsafe_open([file], nogds=True, device="cpu"))
    found = {name: reader.get_tensor(name) for name in reader.keys()}  # noqa: SIM118  # no mapping
    return {name: tensor.clone() for name, tensor in found.items()} if copies else found


def runai(file: str, opened: ExitStack, *, copies: bool) -> Tensors:
    """Read with the Run:ai model streamer."""
    package: Any = importlib.import_module("runai_model_streamer")
    streamer = opened.enter_context(package.SafetensorsStreamer())
    streamer.stream_file(file)
    return {name: tensor.clone() if copies else tensor for name, tensor in streamer.get_tensors()}


READERS: dict[str, Callable[..., Tensors]] = {"fastsafetensors": fastsafetensors, "runai": runai}


def answer(kind: str, file: str, question: dict[str, Any]) -> dict[str, Any]:
    """Return the seconds of a read; `check`: and a checksum of all bytes, by the names of tensors."""
    name, _, copied = kind.partition("-")
    with ExitStack() as opened:
        started_s = time.perf_counter()
        found = READERS[name](file, opened, copies=copied == "copied")
        seconds = time.perf_counter() - started_s
        checksum = checksum_of(found) if question["check"] else 0
        del found
    gc.collect()
    return {"seconds": seconds, "checksum": checksum}


def checksum_of(tensors: Tensors) -> int:
    """Return the CRC of all tensors' bytes in the order of their names."""
    torch: Any = importlib.import_module("torch")
    total = 0
    for name in sorted(tensors):
        total = zlib.crc32(tensors[name].contiguous().view(-1).view(torch.uint8).numpy(), total)
    return total


def main() -> None:
    """Import the reader, then answer questions."""
    kind, file = sys.argv[1:]
    say = lines.open_answers()
    importlib.import_module({"fastsafetensors": "fastsafetensors", "runai": "runai_model_streamer"}[kind.split("-")[0]])
    lines.serve(say, {}, lambda question: answer(kind, file, question))


if __name__ == "__main__":
    main()
