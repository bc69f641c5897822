"""Events of the hosts → counts: loads, evictions, failures, downloads. One task follows them for the whole server."""

from collections.abc import AsyncIterator

from engines.records import Event
from router import metrics
from router.meters import Meters


class EventTally:
    """Counts every event once."""

    def __init__(self, meters: Meters) -> None:
        self._meters = meters
        self._fetched_bytes: dict[str, int] = {}
        self._fetching: dict[str, set[str]] = {}

    async def follow(self, events: AsyncIterator[Event]) -> None:
        """Until the stream ends."""
        async for event in events:
            self.count(event)

    def count(self, event: Event) -> None:
        """Five cases: 1. progress of a download  2. loaded  3. evicted  4. a failure  5. nothing to count."""
        if event.kind == "progress":
            self._count_download(event)  # (1)
            return
        self._note_fetch(event)
        model, step = event.model_id, (event.source, event.target)
        if step == ("warming", "ready"):
            self._count_load(event)  # (2)
        elif step == ("draining", "unloading"):
            self._meters.add(metrics.EVICTIONS, model, event.reason)  # (3)
            self._meters.observe(metrics.EVICTION_AGE_SECONDS, model, value=event.seconds)
        elif event.reason:
            self._meters.add(metrics.LOAD_FAILURES, model, event.reason)  # (4)
        if event.missing_bytes and event.claimant is not None:
            self._meters.add(metrics.TURNS, event.claimant)

    def _count_load(self, event: Event) -> None:
        self._meters.add(metrics.LOADS, event.model_id, event.host_id)
        self._meters.observe(metrics.LOAD_SECONDS, event.model_id, value=event.seconds)
        if event.estimated_bytes:
            ratio = event.measured_bytes / event.estimated_bytes
            self._meters.observe(metrics.ESTIMATE_RATIO, event.model_id, value=ratio)

    def _note_fetch(self, event: Event) -> None:
        """Hosts share a download, and each tells its progress: it is over when the last of them leaves it."""
        hosts = self._fetching.setdefault(event.model_id, set())
        if event.target == "fetching":
            hosts.add(event.host_id)
        elif event.source == "fetching":
            hosts.discard(event.host_id)
        if not hosts:
            self._fetched_bytes.pop(event.model_id, None)

    def _count_download(self, event: Event) -> None:
        seen = self._fetched_bytes.get(event.model_id, 0)
        if event.done_bytes > seen:
            self._meters.add(metrics.DOWNLOAD_BYTES, event.model_id, amount=event.done_bytes - seen)
            self._fetched_bytes[event.model_id] = event.done_bytes
