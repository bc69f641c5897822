"""Forecasts the memory that models need on a device of this machine, before any is loaded and without a server.

Uses files, earlier measurements and budgets; needs neither torch nor an event loop. It is also the public interface of
`engines` for commands that run without a server: they may use the names in `__all__` and import nothing of the packages
behind them. `find_devices` is not among these, because it needs torch: it is in `engines/machine.py`.
"""

from collections.abc import Sequence
from pathlib import Path

from msgspec import Struct

from engines.device.cpu_features import fast_dtypes
from engines.device.memory import DeviceMemory, device_memory
from engines.errors import BadModel
from engines.hub.client import HubConfig
from engines.hub.store import ModelStore
from engines.hub.weight_files import read_header, read_range
from engines.loading.folder import Folder, ModuleRef, read_folder, read_json, require_json
from engines.loading.module_settings import Json, pooling_of
from engines.loading.score_forms import score_form
from engines.pool.estimates import Estimates, Measurements
from engines.pool.runtime import device_matches, guessed_workspace_bytes
from engines.pool.slot import MemoryNeed
from engines.pool.state_machine import PoolStateMachine
from engines.pool.status import StatusView
from engines.precision import PrecisionStore
from engines.protocols import Files
from engines.spec import ModelSpec
from engines.types import Budget, ModelFiles, Plan

__all__ = [
    "Device",
    "Forecast",
    "Forecaster",
    "HubConfig",
    "Measurements",
    "ModelStore",
    "PrecisionStore",
    "device_matches",
    "device_memory",
    "fast_dtypes",
    "native_width",
    "plan_best",
    "plan_on",
    "read_device",
]

_HIDDEN_WIDTH_KEYS = ("hidden_size", "d_model", "dim", "n_embd", "emb_dim")
"""Config keys of the width of the hidden states, by architecture."""

_POOLED_WIDTH_KEYS = ("embedding_dimension", "word_embedding_dimension")
"""sentence-transformers' keys of the width that a Pooling module receives, current and legacy."""

_PROJECTED_TYPES = ("embedding_gemma2_text",)
"""Model types whose hidden states pass through a projection of width `embedding_dim`."""

_STATIC_TABLES = ("embedding.weight", "embeddings")


def native_width(root: Path, spec: ModelSpec, adapter: Path | None = None) -> int | None:
    """Returns the width of dense vectors; None if the files do not state it, give none of these or are not a model."""
    try:
        folder = read_folder(root, adapter)
        gives_none = score_form(folder, spec) is not None or folder.late is not None
        return None if gives_none else _width(folder, spec)
    except (BadModel, OSError, KeyError, TypeError, ValueError, StopIteration):
        return None


def _width(folder: Folder, spec: ModelSpec) -> int:
    if folder.is_sparse_encoder:
        raise ValueError("it gives no vectors of a fixed width")
    root = folder.root
    first, *rest = folder.modules or (ModuleRef("Transformer", ""),)
    if first.kind == "StaticEmbedding":
        return _table_width(root, first)
    config = require_json(folder.weights, "config.json")
    width = _pooled_width(root, rest) or hidden_width(config)
    if not rest:
        return width * len(spec.pooling or ("mean",))
    for module in rest:
        width = _width_after(module, width, root, spec)
    return width


def _width_after(module: ModuleRef, width: int, root: Path, spec: ModelSpec) -> int:
    name = module.file("config.json")
    if module.kind == "Pooling":
        return width * len(spec.pooling or pooling_of(require_json(root, name), name))
    if module.kind == "Dense":
        return int((read_json(root, name) or {})["out_features"])
    return width


def hidden_width(config: Json) -> int:
    """Reads the width of the hidden states; multimodal configs keep it in their `text_config`."""
    text = config.get("text_config") or config
    projected = text.get("embedding_dim") if text.get("model_type") in _PROJECTED_TYPES else None
    return int(projected or next(text[key] for key in _HIDDEN_WIDTH_KEYS if key in text))


def _pooled_width(root: Path, rest: Sequence[ModuleRef]) -> int | None:
    """Returns the input width of a Pooling module that comes first; models may project their hidden states."""
    if not rest or rest[0].kind != "Pooling":
        return None
    config = require_json(root, rest[0].file("config.json"))
    width = next((config[key] for key in _POOLED_WIDTH_KEYS if key in config), None)
    return width if isinstance(width, int) and width > 0 else None


def _table_width(root: Path, module: ModuleRef) -> int:
    file = root / module.file("model.safetensors")
    tensors = read_header(
        file.name, file.stat().st_size, lambda name, start, end: read_range(file.parent, name, start, end)
    )
    return next(tensor.shape[1] for tensor in tensors if tensor.name in _STATIC_TABLES)


class Forecast(Struct, frozen=True, kw_only=True):
    """The forecast of one model.

    `files`: None if not complete on disk. `need`: None if unknown. `width`: of its vectors; None if not stated.
    """

    model_id: str
    files: ModelFiles | None = None
    need: MemoryNeed | None = None
    width: int | None = None


class Device(Struct, frozen=True, kw_only=True):
    """A device that models can be loaded onto."""

    name: str
    budget_bytes: int


def read_device(device: str, budget: Budget, memory: DeviceMemory | None = None) -> Device:
    """Reads a device's memory and returns the device with its budget for models in bytes."""
    reading = (memory or device_memory(device)).read()
    return Device(name=device, budget_bytes=budget.of(reading.total_bytes))


class Forecaster:
    """Forecasts models for one kind of device.

    Args:
        files: locates the models' files.
        measurements: memory that earlier loads on this machine took.
        device: `cpu` or `cuda:N`.
    """

    def __init__(self, files: Files, measurements: Measurements, device: str) -> None:
        self._files = files
        self._estimates = Estimates(files, measurements, device, guessed_workspace_bytes(device))

    def forecast(self, spec: ModelSpec, *, ask_hub: bool = False) -> Forecast:
        """Forecasts a model from its files on disk; without them, if `ask_hub`, from a few kilobytes of the hub's."""
        files = self._files.locate(spec)
        need = self._estimates.estimate(spec, files) if files or ask_hub else None
        width = native_width(Path(files.path), spec, files.adapter_folder) if files else None
        return Forecast(model_id=spec.model_id, files=files, need=need, width=width)


def plan_on(device: Device, spec: ModelSpec, forecast: Forecast) -> Plan:
    """Returns the pool's plan for the model on that device with nothing else loaded."""
    core = PoolStateMachine({spec.model_id: spec}, budget_bytes=device.budget_bytes)
    slot = core.state.current[spec.model_id]
    slot.files, slot.need = forecast.files, forecast.need
    slot.state = "cold" if forecast.files else "absent"
    return StatusView(device.name, device.name, lambda at_s: at_s).plan(core.state, slot)


def plan_best(devices: Sequence[Device], spec: ModelSpec, forecast: Forecast) -> Plan | None:
    """Returns the plan on the matching device with the most free bytes; None if no device matches the model."""
    plans = [plan_on(device, spec, forecast) for device in devices if device_matches(device.name, spec.device)]
    return max(plans, key=lambda plan: (plan.fits, plan.free_bytes), default=None)
