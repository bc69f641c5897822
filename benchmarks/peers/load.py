"""Loads a folder with sentence-transformers and embeds one text, once for each question: `load.py FOLDER`.

It is ready once its libraries are imported. Any environment with sentence-transformers can run it.
"""

import gc
import importlib
import sys
import time
from typing import Any

# This is a script, so its own folder is on the path.
lines: Any = importlib.import_module("lines")


def answer(folder: str, question: dict[str, Any]) -> dict[str, Any]:
    """Return the seconds from the question to the vector of its text, and the vector; then the model is freed."""
    package: Any = importlib.import_module("sentence_transformers")
    started_s = time.perf_counter()
    model = package.SentenceTransformer(folder, device="cpu")
    (vector,) = model.encode([question["text"]], show_progress_bar=False)
    seconds = time.perf_counter() - started_s
    del model
    gc.collect()
    return {"seconds": seconds, "vector": vector.tolist()}


def main() -> None:
    """Import the library, then answer questions."""
    say = lines.open_answers()
    importlib.import_module("sentence_transformers")
    lines.serve(say, {}, lambda question: answer(sys.argv[1], question))


if __name__ == "__main__":
    main()
