"""Environment variables that Ray reads when it is imported or started. An operator's own values win.

They must be the same on every node: `ray start` and the containers of deploy/ray set them there.
"""

import os

APP = "embedyard"
DEPLOYMENT = "host"

STATS_PERIOD_S = 0.5
"""How often Serve's controller collects routing stats from a host and sends them to the routers."""

HEALTH_PERIOD_S = 2.0
"""A replacement answers after 3 s; with Serve's default of 10 s it takes 9 s."""

VARIABLES = {
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",  # one loop in routers and replicas, and gRPC: 2-3 ms a call, not 6-7
    "RAY_SERVE_ENABLE_DIRECT_INGRESS": "0",  # replicas serve no HTTP: routers do
    "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": str(256 * 2**20),  # default 4; 2048 vectors of 4096 floats are 32 MiB
    "RAY_worker_niceness": "0",  # default 15: a host would yield to every other process
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "disabled",  # explicit, because it must be the same everywhere; see Ray's docs before changing it
}


JOB_VARIABLES = {
    "RAY_BACKEND_LOG_LEVEL": "fatal",  # its C++ half warns of what Ray Data itself does
    "RAY_ENABLE_AUTO_CONNECT": "0",  # else a thread of Ray Data's may start a cluster once we left ours
}
"""Of processes that run a bulk job on a cluster."""


def named_address() -> str | None:
    """Return the cluster address from `RAY_ADDRESS`, as Ray reads it."""
    return os.environ.get("RAY_ADDRESS") or None


def prepare_environment() -> None:
    """Set the variables. Must be called before the first `import ray` of a process."""
    for name, value in VARIABLES.items():
        os.environ.setdefault(name, value)


def prepare_job_environment() -> None:
    """Set the variables of a bulk job. Must be called before the first `import ray` of a process."""
    for name, value in JOB_VARIABLES.items():
        os.environ.setdefault(name, value)
