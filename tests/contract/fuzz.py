"""Runs schemathesis on the served OpenAPI document: valid and invalid requests on every route.

Fails on a 5xx, and on a status, content type or body that the document does not have.

    python -m tests.contract.fuzz [random requests a route, 300 unless given]

sends thousands (minutes on two cores, no memory: the engines are fakes), and ends with 1 when anything was found, or
when fewer than 2,000 requests were sent.
"""

import logging
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import structlog
from msgspec import Struct

from tests.contract.conftest import KEY, contract_app
from tests.testkit.servers import serving_in_thread

CASES = 2000

_CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
_STREAMS = "/events|/stream"
"""They never end, so there is no answer to look at; `tests/unit/router` follows them."""


class Fuzzed(Struct, frozen=True):
    """Results of a run. `cases`: requests sent; `report`: schemathesis' output."""

    is_clean: bool
    cases: int
    report: str


def fuzz(url: str, *, max_examples: int, seed: int | None = None) -> Fuzzed:
    """Send at most `max_examples` random requests to each route, in addition to the boundary cases of each schema."""
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


def main() -> int:
    """Send thousands of requests, and write schemathesis' report."""
    max_examples = int(sys.argv[1]) if len(sys.argv) > 1 else 300
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    with tempfile.TemporaryDirectory() as folder, serving_in_thread(contract_app(Path(folder))) as url:
        found = fuzz(url, max_examples=max_examples)
    sys.stdout.write(found.report + "\n")
    return 0 if found.is_clean and found.cases >= CASES else 1


if __name__ == "__main__":
    sys.exit(main())
