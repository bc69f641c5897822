"""schemathesis against the served OpenAPI document: requests made from it, good and bad, on every route.

What it checks: no 5xx, no status, content type or body that the document does not announce.
"""

import re
import subprocess
import sys

from msgspec import Struct

from tests.contract.conftest import KEY

_CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
_STREAMS = "/events|/stream"
"""They never end, so there is no answer to look at; `tests/unit/router` follows them."""


class Fuzzed(Struct, frozen=True):
    """`cases`: requests sent. `report`: what schemathesis printed."""

    is_clean: bool
    cases: int
    report: str


def fuzz(url: str, *, max_examples: int, seed: int | None = None) -> Fuzzed:
    """Send at most `max_examples` random requests to each route, besides those at the edges of every schema."""
    command = [
        sys.executable, "-m", "schemathesis.cli", "run", f"{url}/docs/openapi.json", "--no-color",
        "--header", f"Authorization: Bearer {KEY}", "--checks", _CHECKS, "--exclude-path-regex", _STREAMS,
        "--phases", "coverage,fuzzing", "--max-examples", str(max_examples), "--request-timeout", "20",
        *(["--seed", str(seed)] if seed is not None else []),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    report = done.stdout + done.stderr
    found = re.search(r"(\d+) generated, (\d+) passed", report)
    is_clean = done.returncode == 0 and found is not None and found[1] == found[2]
    return Fuzzed(is_clean, int(found[1]) if found else 0, report)
