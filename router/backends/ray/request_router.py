"""Chooses Ray Serve's replica by `router/backends/placement.py`: where the model is loaded, else where it fits.

Serve pickles this module's class by value, so the module holds nothing else, and imports Embedyard inside methods.
"""

from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica


class PlacementRequestRouter(RequestRouter):  # type: ignore[misc]  # Ray is not typed for mypy here
    """Offers one replica per request and no second choice: another host would load the model once more."""

    @property
    def max_num_routing_tasks(self) -> int:
        """Raise Serve's limit of two per replica: requests for a lost host would block those for all others."""
        return 4096

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Update the directory. Called by Serve when replicas start, stop, or send routing stats."""
        from router.backends.ray.replica_directory import REPLICAS

        super().update_replicas(replicas)
        REPLICAS.set_running({replica.replica_id.unique_id: replica.routing_stats for replica in replicas})

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """See `RequestRouter`."""
        from router.backends.ray.replica_directory import REPLICAS

        if pending_request is None:
            return []
        running = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        chosen = REPLICAS.choose(pending_request.metadata.session_id, running.keys())
        pending_request.routing_context.should_backoff = True  # nothing changes before the next poll of the hosts
        return [[running[chosen]]] if chosen is not None else []

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        """Do nothing: the placement was recorded when it was chosen."""
