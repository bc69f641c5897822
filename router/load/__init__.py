"""Load on any OpenAI-compatible embeddings server: what `embedyard bench` and `benchmarks/` send, and how they time it.

The server itself never imports this, and this knows no server: `http_client` speaks the API, `phases` decides when each
request leaves, `outcome` sums up.
"""

from router.load.outcome import Outcome, Sample
from router.load.phases import Clients, after, after_s, closed, opened, run

__all__ = ["Clients", "Outcome", "Sample", "after", "after_s", "closed", "opened", "run"]
