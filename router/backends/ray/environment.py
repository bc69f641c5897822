"""What Ray reads from the environment when it is imported or started. An operator's own values win.

The same must hold on every node: `ray start` and the containers of deploy/ray set it there.
"""

import os

APP = "embedyard"


DEPLOYMENT = "host"


STATS_PERIOD_S = 0.5
"""How often Serve's controller asks a host what is in memory, and tells the routers."""


HEALTH_PERIOD_S = 2.0
"""With Serve's 10 s a replacement answers after 9 s, with this after 3."""


VARIABLES = {
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",  # one loop in routers and replicas, and gRPC: 2-3 ms a call, not 6-7
    "RAY_SERVE_ENABLE_DIRECT_INGRESS": "0",  # replicas serve no HTTP: routers do
    "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": str(256 * 2**20),  # 2048 vectors of 4096 floats are 32 MiB; else 4
    "RAY_worker_niceness": "0",  # else 15: a host would give way to everything
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "disabled",  # explicit, because it must be alike everywhere; see Ray's docs before you change it
}


def named_address() -> str | None:
    """The cluster that `RAY_ADDRESS` names, as Ray reads it."""
    return os.environ.get("RAY_ADDRESS") or None


def prepare_environment() -> None:
    """To be called before the first `import ray` of a process."""
    for name, value in VARIABLES.items():
        os.environ.setdefault(name, value)
