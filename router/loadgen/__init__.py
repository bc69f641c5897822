"""Load generator for OpenAI-compatible embeddings servers, used by `embedyard bench` and `benchmarks/`.

The server never imports this package. `http_client` sends requests, `phases` schedules them, `results` summarizes.
"""

from router.loadgen.phases import Clients, Phase, Until, Watch, after, after_s, closed, opened, run, send
from router.loadgen.results import Outcome, Sample, percentile

__all__ = [
    "Clients", "Outcome", "Phase", "Sample", "Until", "Watch", "after", "after_s", "closed", "opened", "percentile",
    "run", "send",
]  # fmt: skip
