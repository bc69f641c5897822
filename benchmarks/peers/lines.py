"""Reads questions and writes answers for workers (`benchmarks/lib/worker.py`). Standard library only: peers run it too.

Output of libraries goes to stderr, so that stdout has answers only.
"""

import json
import os
import sys
from collections.abc import Callable
from typing import Any

Answer = Callable[[dict[str, Any]], dict[str, Any]]


def open_answers() -> Callable[[dict[str, Any]], None]:
    """Return a function that writes answers to stdout; other output goes to stderr from now on."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def say(answer: dict[str, Any]) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    return say


def serve(say: Callable[[dict[str, Any]], None], facts: dict[str, Any], answer: Answer) -> None:
    """Write `ready` with the facts, then answer line by line until the driver closes the pipe."""
    say({"ready": facts})
    for line in sys.stdin:
        say(answer(json.loads(line)))
