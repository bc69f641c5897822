"""Load on any OpenAI-compatible embeddings server: what `embedyard bench` and `benchmarks/` send, and how they time it.

The server itself never imports this, and this knows no server: `http_client` speaks the API, `phases` decides when each
request leaves, `outcome` sums up.
"""

from router.load.outcome import Outcome, Sample, percentile
from router.load.phases import Clients, Phase, Until, Watch, after, after_s, closed, opened, run, send

__all__ = [
    "Clients", "Outcome", "Phase", "Sample", "Until", "Watch", "after", "after_s", "closed", "opened", "percentile",
    "run", "send",
]  # fmt: skip
