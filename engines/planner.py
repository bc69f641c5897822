"""What models would take on a device of this machine, before any was loaded: for lists and plans without a server.

Knows files, earlier measurements and budgets; needs neither torch nor an event loop. It is also the door for commands
that run without a server: the names that are imported `as` themselves are for them.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from msgspec import Struct

from engines.device.memory import DeviceMemory
from engines.device.memory import device_memory as device_memory
from engines.errors import BadModel
from engines.hub.client import HubConfig as HubConfig
from engines.hub.store import ModelStore as ModelStore
from engines.hub.weight_files import read_header, read_range
from engines.loading.folder import Json, ModuleRef, pooling_of, read_folder, read_json, require_json
from engines.pool.estimates import Estimates
from engines.pool.estimates import Measurements as Measurements
from engines.pool.eviction import total_bytes
from engines.pool.runtime import HostConfig, device_matches
from engines.pool.slot import NO_MEMORY, MemoryNeed
from engines.pool.state_machine import PoolStateMachine
from engines.pool.status import StatusView
from engines.protocols import Files
from engines.spec import ModelSpec
from engines.types import Budget, ModelFiles, Plan

_HIDDEN = ("hidden_size", "d_model", "dim", "n_embd", "emb_dim")
"""What architectures call the width of their hidden states."""


_POOLED = ("embedding_dimension", "word_embedding_dimension")
"""What sentence-transformers calls the width of what it pools, now and before."""


_PROJECTING = ("embedding_gemma2_text",)
"""Architectures whose hidden states leave through a projection, `embedding_dim` wide."""


_STATIC_TABLES = ("embedding.weight", "embeddings")


def native_width(root: Path, spec: ModelSpec) -> int | None:
    """The width that the engine will have; None where the files do not say, or are no model."""
    try:
        return _width(root, spec)
    except (BadModel, OSError, KeyError, TypeError, ValueError, StopIteration):
        return None


def _width(root: Path, spec: ModelSpec) -> int:
    folder = read_folder(root)
    first, *behind = folder.modules or (ModuleRef("Transformer", ""),)
    if first.kind == "StaticEmbedding":
        return _table_width(root, first)
    config = require_json(folder.weights, "config.json")
    width = _pooled_width(root, behind) or _hidden_width(config)
    if not behind:
        return width * len(spec.pooling or ("mean",))
    for module in behind:
        width = _after(module, width, root, spec)
    return width


def _after(module: ModuleRef, width: int, root: Path, spec: ModelSpec) -> int:
    name = module.file("config.json")
    if module.kind == "Pooling":
        return width * len(spec.pooling or pooling_of(require_json(root, name), name))
    if module.kind == "Dense":
        return int((read_json(root, name) or {})["out_features"])
    return width


def _hidden_width(config: Json) -> int:
    """Models that also see or hear keep the figures of their text half apart."""
    text = config.get("text_config") or config
    projected = text.get("embedding_dim") if text.get("model_type") in _PROJECTING else None
    return int(projected or next(text[key] for key in _HIDDEN if key in text))


def _pooled_width(root: Path, behind: Sequence[ModuleRef]) -> int | None:
    """What the Pooling module says that it gets, where it comes first: models may project what they give."""
    if not behind or behind[0].kind != "Pooling":
        return None
    config = require_json(root, behind[0].file("config.json"))
    width = next((config[key] for key in _POOLED if key in config), None)
    return width if isinstance(width, int) and width > 0 else None


def _table_width(root: Path, module: ModuleRef) -> int:
    file = root / module.file("model.safetensors")
    tensors = read_header(
        file.name, file.stat().st_size, lambda name, start, end: read_range(file.parent, name, start, end)
    )
    return next(tensor.shape[1] for tensor in tensors if tensor.name in _STATIC_TABLES)


class Forecast(Struct, frozen=True, kw_only=True):
    """One model. `files` None: not whole on disk; `need` None: nobody knows what it takes; `width` as the files say."""

    model_id: str
    files: ModelFiles | None = None
    need: MemoryNeed | None = None
    width: int | None = None


class Device(Struct, frozen=True, kw_only=True):
    """A device that models could be loaded onto."""

    name: str
    budget_bytes: int


def read_config(device: str, budget: Budget, memory: DeviceMemory | None = None) -> Device:
    """A device of this machine, with the bytes that the budget leaves to models."""
    reading = (memory or device_memory(device)).read()
    return Device(name=device, budget_bytes=budget.of(reading.total_bytes))


class Forecaster:
    """Looks models up for one kind of device.

    Args:
        files: where they come from.
        measurements: what they took when they were loaded here.
        device: `cpu` or `cuda:N`.
    """

    def __init__(self, files: Files, measurements: Measurements, device: str) -> None:
        self._files = files
        guess = HostConfig(host_id=device, device=device).workspace_bytes
        self._estimates = Estimates(files, measurements, device, guess)

    def forecast(self, spec: ModelSpec, *, ask_hub: bool = False) -> Forecast:
        """From the disk; with `ask_hub` also a few kilobytes of the hub's, where the files are not here."""
        files = self._files.locate(spec)
        need = self._estimates.estimate(spec, files) if files or ask_hub else None
        width = native_width(Path(files.path), spec) if files else None
        return Forecast(model_id=spec.model_id, files=files, need=need, width=width)


def plan_on(device: Device, spec: ModelSpec, forecast: Forecast) -> Plan:
    """What the pool would plan for the model on that device, if nothing else were loaded."""
    core = PoolStateMachine({spec.model_id: spec}, budget_bytes=device.budget_bytes)
    slot = core.state.current[spec.model_id]
    slot.files, slot.need = forecast.files, forecast.need
    slot.state = "cold" if forecast.files else "absent"
    return StatusView(device.name, device.name, lambda at_s: at_s).plan(core.state, slot)


def plan_best(devices: Sequence[Device], spec: ModelSpec, forecast: Forecast) -> Plan | None:
    """The plan on the device that suits the model and leaves it most room; None when none suits."""
    plans = [plan_on(device, spec, forecast) for device in devices if device_matches(device.name, spec.device)]
    return max(plans, key=lambda plan: (plan.fits, plan.free_bytes), default=None)


def together_bytes(forecasts: Mapping[str, Forecast]) -> int:
    """What all of them take at once; those that nobody knows count nothing."""
    return total_bytes(forecast.need or NO_MEMORY for forecast in forecasts.values())
