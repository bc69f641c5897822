"""`GET /models` as Infinity's client reads it: OpenAI's list, with what waits and runs for each model."""

from collections.abc import Sequence
from typing import Any

from litestar import Request
from msgspec import structs

from router.api.models import list_visible_models, visible_slots
from router.config.settings import Settings
from router.schemas.admin import Slot
from router.schemas.compat import InfinityModel, InfinityModelList, InfinityStats
from router.schemas.inference import Model
from router.server.state import state_of

_OWNER = "infinity"
"""The only owner that Infinity's client knows."""


def list_for_infinity(request: Request[Any, Any, Any]) -> InfinityModelList:
    """Return the models that the key of the request may use."""
    slots, settings = visible_slots(request), state_of(request).settings
    return InfinityModelList(
        data=[_model(model, slots.get(model.id, ()), settings) for model in list_visible_models(request).data]
    )


def _model(model: Model, slots: Sequence[Slot], settings: Settings) -> InfinityModel:
    queued = sum(slot.queue_items for slot in slots)
    stats = InfinityStats(
        queue_fraction=queued / settings.max_queue_size,
        queue_absolute=queued,
        results_pending=sum(slot.leases for slot in slots),
        batch_size=settings.max_batch_size,
    )
    fields = structs.asdict(model) | {"owned_by": _OWNER}
    return InfinityModel(stats=stats, capabilities=(model.task,) if model.task else (), **fields)
