"""Chooses Ray Serve's replica by `router/backends/placement.py`: where the model is, else where it fits.

Serve pickles this module's class by value, so the module holds nothing else, and imports Embedyard where it is used.
"""

from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica


class PlacementRequestRouter(RequestRouter):  # type: ignore[misc]  # Ray is not typed for mypy here
    """One replica for each request, and no second choice: another host would load the model once more."""

    @property
    def max_num_routing_tasks(self) -> int:
        """Serve allows two a replica: requests for a host that was lost would hold up those for all others."""
        return 4096

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Called by Serve whenever replicas come, go, or tell what they have in memory."""
        from router.backends.ray.replica_directory import REPLICAS

        super().update_replicas(replicas)
        REPLICAS.see({replica.replica_id.unique_id: replica.routing_stats for replica in replicas})

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """See `RequestRouter`."""
        from router.backends.ray.replica_directory import REPLICAS

        if pending_request is None:
            return []
        running = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        chosen = REPLICAS.choose(pending_request.metadata.session_id, running.keys())
        pending_request.routing_context.should_backoff = True  # nothing changes before the next look at the hosts
        return [[running[chosen]]] if chosen is not None else []

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        """Nothing: a placement was recorded when it was chosen."""
