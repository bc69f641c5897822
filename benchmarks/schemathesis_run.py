"""Thousands of requests made from the served OpenAPI document: no 5xx, nothing that the document does not announce.

    python -m benchmarks.schemathesis_run [requests a route at random, 300 unless told]

Ends with 1 when anything was found, or when fewer than 2,000 requests were sent. The engines are fakes, so it is the
edge that is tried: it takes minutes on two cores, and no memory.
"""

import logging
import sys

import structlog

from tests.contract.conftest import contract_app
from tests.contract.fuzz import fuzz
from tests.testkit.threaded_server import serving_in_thread

CASES = 2000


def main() -> int:
    """Print schemathesis' own report."""
    max_examples = int(sys.argv[1]) if len(sys.argv) > 1 else 300
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    with serving_in_thread(contract_app()) as url:
        found = fuzz(url, max_examples=max_examples)
    print(found.report)
    return 0 if found.is_clean and found.cases >= CASES else 1


if __name__ == "__main__":
    sys.exit(main())
