"""Ray clusters of several nodes on this machine, for tests in a process of their own."""

from collections.abc import Iterator
from contextlib import contextmanager

import ray
from ray.cluster_utils import Cluster

_STORE_BYTES = 100_000_000


@contextmanager
def two_nodes(head_cpus: int) -> Iterator[Cluster]:
    """Start a cluster: a head with some CPUs, and a node with one."""
    head = {"num_cpus": head_cpus, "object_store_memory": _STORE_BYTES, "include_dashboard": False}
    made = Cluster(initialize_head=True, head_node_args=head)
    add_node(made)
    yield made
    ray.shutdown()
    made.shutdown()


def add_node(cluster: Cluster, attempts: int = 3) -> None:
    """Add a node. Ray's start timeout of 30 s is too short when other processes use all cores."""
    for attempt in range(1, attempts + 1):
        try:
            cluster.add_node(num_cpus=1, object_store_memory=_STORE_BYTES)
        except Exception as error:
            if "timed out during startup" not in str(error) or attempt == attempts:
                raise
        else:
            return
