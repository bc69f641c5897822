"""`Backend`: the interface between the API and the hosts that run models, wherever those are."""

from collections.abc import AsyncIterator, Iterable, Mapping
from typing import NoReturn, Protocol

from engines.errors import HostNotFound, ModelNotFound
from engines.spec import ModelSpec
from engines.types import Budget, Call, Event, HostBudget, HostSnapshot, ModelStatus, Plan, Result, Tier

SIZE_TIMEOUT_S = 10.0
"""Timeout of the hub query for a model's size in `plan`; past it the plan reports the size as unknown."""


class Backend(Protocol):
    """Runs calls on a set of hosts. Every call names models by their `model_id`, never by an alias.

    Raises the errors of `engines/errors.py`, whatever transport lies between.
    """

    async def start(self) -> None:
        """Open the hosts; afterwards calls are served. Starts preloads without waiting for them."""

    async def run(self, call: Call) -> Result:
        """Answer one call on the best host; waits for a cold model as long as the call allows."""

    async def preload(
        self, model_id: str, *, pin: bool = False, wait: bool = True, host_id: str | None = None
    ) -> ModelStatus:
        """Load the model on the best host, or on `host_id`; returns when it is ready, at once when `wait` is false.

        Raises:
            HostNotFound: no host has this id.
        """

    async def evict(
        self, model_id: str, *, force: bool = False, timeout_s: float = 30.0, to: Tier = "disk"
    ) -> tuple[ModelStatus, ...]:
        """Wait for running requests, then free the model on every host; with `to` `host`, park it where it fits.

        Raises:
            ModelPinned: pinned, and not forced.
            ModelInUse: requests were still running at the timeout.
        """

    async def plan(self, model_id: str) -> Plan:
        """Predict what loading the model would do, without loading it. May query the hub for its size."""

    async def reload(
        self, specs: Mapping[str, ModelSpec], budget: Budget | None = None, host_budget: HostBudget | None = None
    ) -> None:
        """Replace the served models and the budgets of devices and of main memory; unchanged models are not touched."""

    async def recycle(self, host_id: str) -> None:
        """Drain the host, restart its process, and reload the models that were ready there.

        Returns when the host accepts calls again; its models may still be loading.

        Raises:
            HostNotFound: no host has this id.
            InvalidValue: hosts of this backend cannot be restarted.
        """

    def snapshots(self) -> tuple[HostSnapshot, ...]:
        """Return the state of every host; never blocks."""

    def check(self) -> Mapping[str, str]:
        """Return the faults of hosts whose device is down, by host id, and fail their pending calls. Never blocks."""

    def events(self, after: Mapping[str, int] | None = None) -> AsyncIterator[Event]:
        """Stream events of all hosts; with `after` (host id → seq), buffered events since then come first."""

    async def aclose(self, *, grace_s: float = 30.0) -> None:
        """Refuse new calls, finish the admitted ones within the grace time, free everything."""


def raise_model_not_found(model_id: str) -> NoReturn:
    """Raise ModelNotFound for a model that is not in the registry."""
    raise ModelNotFound(f"Model {model_id!r} not found: GET /v1/models lists the served models")


def raise_host_not_found(host_id: str, known: Iterable[str]) -> NoReturn:
    """Refuse a host that is not there."""
    raise HostNotFound(f"host {host_id!r} not found; this server has {', '.join(known) or 'none now'}")
