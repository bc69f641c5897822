"""Runs the blocks of a Python page one after the other, and prints what each printed, as JSON.

Reads the blocks as a JSON list from standard input. Runs in the environment of the vector stores.
"""

import contextlib
import io
import json
import sys


def main() -> None:
    """Run the blocks in one namespace; also print what they would send to stores that are not here."""
    names: dict[str, object] = {}
    printed: list[str] = []
    for number, block in enumerate(json.load(sys.stdin)):
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            exec(compile(block, f"block {number}", "exec"), names)
        printed.append(output.getvalue())
    sent = {name: names[name] for name in ("records", "documents", "objects", "search")}
    sys.stdout.write("\n" + json.dumps({"printed": printed, **sent}))


if __name__ == "__main__":
    main()
