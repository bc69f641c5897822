"""Load on any OpenAI-compatible embeddings server: what `embedyard bench` and `benchmarks/` send, and how they time it.

The server itself never imports this, and this knows no server: `http_client` speaks the API, `phases` decides when each
request leaves, `outcome` sums up.
"""

from router.loadgen.phases import Clients, Phase, Until, Watch, after, after_s, closed, opened, run, send
from router.loadgen.results import Outcome, Sample, percentile

__all__ = [
    "Clients", "Outcome", "Phase", "Sample", "Until", "Watch", "after", "after_s", "closed", "opened", "percentile",
    "run", "send",
]  # fmt: skip
