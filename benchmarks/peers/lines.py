"""The workers' side of `benchmarks/lib/worker.py`: questions in, answers out. Standard library only: peers run it too.

Whatever a library prints goes to stderr, so that stdout holds nothing but answers.
"""

import json
import os
import sys
from collections.abc import Callable
from typing import Any

Answer = Callable[[dict[str, Any]], dict[str, Any]]


def open_answers() -> Callable[[dict[str, Any]], None]:
    """Take stdout for answers, and give everybody else stderr."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def say(answer: dict[str, Any]) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    return say


def serve(say: Callable[[dict[str, Any]], None], facts: dict[str, Any], answer: Answer) -> None:
    """Say that the model is warm, then answer line by line until the driver closes the pipe."""
    say({"ready": facts})
    for line in sys.stdin:
        say(answer(json.loads(line)))
