"""Requests and responses of `/admin` and of the probes."""

from typing import Annotated, Literal

from msgspec import Meta, Struct

from engines.spec import Task
from engines.types import ModelStatus, Tier
from router.schemas.inference import Name


class Slot(ModelStatus, frozen=True, kw_only=True):
    """One model on one device. Times are Unix seconds; bytes count against the device's memory budget.

    `task`: what the model computes; null while it is unknown. `description`, `license`: of the registry.
    `space`: of its vectors without a prompt, at the full width; null until it is known.
    """

    id: str
    task: Task | None = None
    description: str = ""
    license: str = ""
    space: str | None = None


class SlotList(Struct, frozen=True, kw_only=True):
    """All slots of all devices."""

    object: Literal["list"] = "list"
    data: list[Slot]


class ModelSlots(Slot, frozen=True, kw_only=True):
    """The slot of a model that is nearest to serving, and in `slots` its slots on all devices."""

    slots: list[Slot]


class PreloadRequest(Struct, frozen=True, kw_only=True):
    """`wait`: answer once the model is ready. `pin`: never evict it automatically. `host`: load it only there."""

    wait: bool = True
    pin: bool = False
    host: Annotated[Name | None, Meta(description="A `host_id` of GET /admin/memory.")] = None


class EvictRequest(Struct, frozen=True, kw_only=True):
    """`force`: evict a pinned model too. `to`: `disk`, or `host` to park it in main memory where that has room.
    `timeout`: seconds to wait for running requests."""

    force: bool = False
    to: Tier = "disk"
    timeout: Annotated[float, Meta(ge=0, le=3600)] = 30.0


class DeviceMemory(Struct, frozen=True, kw_only=True):
    """One device. `used_bytes`: weights. `workspace_bytes`: reserved for the forward passes that may run at once.

    `residents`: ids of the models in memory, the next to be evicted first. `host_budget_bytes`: of main memory, for
    models that left this device; 0 where none are parked. `host_used_bytes`: what they take. `parked`: their ids, the
    next to leave first.
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
    host_budget_bytes: int
    host_used_bytes: int
    parked: tuple[str, ...]


class ModelTraffic(Struct, frozen=True, kw_only=True):
    """The traffic of one model in the last minute. `texts_per_s_by_step`: the completed steps, oldest first."""

    id: str
    texts_per_s: float
    tokens_per_s: float
    texts_per_s_by_step: tuple[float, ...]
    p50_s: float
    p95_s: float


class LastMinute(Struct, frozen=True, kw_only=True):
    """The models that answered in the last minute; a step has `step_s` seconds."""

    object: Literal["list"] = "list"
    step_s: float
    data: list[ModelTraffic]


class Memory(Struct, frozen=True, kw_only=True):
    """The memory of all devices."""

    devices: list[DeviceMemory]


class Status(Struct, frozen=True, kw_only=True):
    """`ok`: the server is alive. `ready`: it takes new work."""

    status: Literal["ok", "ready"]
