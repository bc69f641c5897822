"""TODO router/schemas/admin.py."""

from typing import Annotated, Literal

from msgspec import Meta, Struct

from engines.types import ModelStatus
from router.schemas.inference import Name


class Slot(ModelStatus, frozen=True, kw_only=True):
    """One model on one device. Times are Unix seconds; bytes are charged against the device's budget."""

    id: str


class SlotList(Struct, frozen=True, kw_only=True):
    """Every slot of every device."""

    object: Literal["list"] = "list"
    data: list[Slot]


class ModelSlots(Slot, frozen=True, kw_only=True):
    """The slot nearest to serving, and under `slots` that model's slots on all devices."""

    slots: list[Slot]


class PreloadRequest(Struct, frozen=True, kw_only=True):
    """`wait`: answer when the model is ready. `pin`: only an operator may evict it. `host`: there and nowhere else."""

    wait: bool = True
    pin: bool = False
    host: Annotated[Name | None, Meta(description="A `host_id` of GET /admin/memory.")] = None


class EvictRequest(Struct, frozen=True, kw_only=True):
    """`force`: also a pinned model. `timeout`: seconds to wait for running requests."""

    force: bool = False
    timeout: Annotated[float, Meta(ge=0, le=3600)] = 30.0


class DeviceMemory(Struct, frozen=True, kw_only=True):
    """One device. `used_bytes` is weights, `workspace_bytes` is reserved for the largest forward pass.

    `residents` are model ids in eviction order, the next to leave first.
    """

    host_id: str
    device: str
    total_bytes: int
    budget_bytes: int
    used_bytes: int
    workspace_bytes: int
    free_bytes: int
    residents: tuple[str, ...]
    is_draining: bool


class ModelTraffic(Struct, frozen=True, kw_only=True):
    """One model's last minute. `texts_per_s_by_step`: the steps that are over, oldest first."""

    id: str
    texts_per_s: float
    tokens_per_s: float
    texts_per_s_by_step: tuple[float, ...]
    p50_s: float
    p95_s: float


class LastMinute(Struct, frozen=True, kw_only=True):
    """Models that answered within it; a step has `step_s` seconds."""

    object: Literal["list"] = "list"
    step_s: float
    data: list[ModelTraffic]


class Memory(Struct, frozen=True, kw_only=True):
    """All devices of this server."""

    devices: list[DeviceMemory]


class Status(Struct, frozen=True, kw_only=True):
    """That the server is alive, or ready."""

    status: Literal["ok", "ready"]
