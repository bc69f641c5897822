"""What models would take on a device of this machine, before any was loaded: for lists and plans without a server.

Knows files, earlier measurements and budgets; needs neither torch nor an event loop.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from msgspec import Struct

from engines.eviction import total_bytes
from engines.host_config import HostConfig, suits
from engines.measurements import Estimates, Measurements
from engines.memory import DeviceMemory, device_memory
from engines.pool import PoolCore
from engines.pool_status import Viewpoint
from engines.protocols import Files
from engines.records import ModelFiles, Plan
from engines.slots import NOTHING, Need
from engines.spec import ModelSpec
from engines.units import Budget
from engines.widths import native_width


class Forecast(Struct, frozen=True, kw_only=True):
    """One model. `files` None: not whole on disk; `need` None: nobody knows what it takes; `width` as the files say."""

    model_id: str
    files: ModelFiles | None = None
    need: Need | None = None
    width: int | None = None


class Device(Struct, frozen=True, kw_only=True):
    """A device that models could be loaded onto."""

    name: str
    budget_bytes: int


def look_at(device: str, budget: Budget, memory: DeviceMemory | None = None) -> Device:
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
    core = PoolCore({spec.model_id: spec}, budget_bytes=device.budget_bytes)
    slot = core.state.current[spec.model_id]
    slot.files, slot.need = forecast.files, forecast.need
    slot.state = "cold" if forecast.files else "absent"
    return Viewpoint(device.name, device.name, lambda at_s: at_s).plan(core.state, slot)


def plan_best(devices: Sequence[Device], spec: ModelSpec, forecast: Forecast) -> Plan | None:
    """The plan on the device that suits the model and leaves it most room; None when none suits."""
    plans = [plan_on(device, spec, forecast) for device in devices if suits(device.name, spec.device)]
    return max(plans, key=lambda plan: (plan.fits, plan.free_bytes), default=None)


def together_bytes(forecasts: Mapping[str, Forecast]) -> int:
    """What all of them take at once; those that nobody knows count nothing."""
    return total_bytes(forecast.need or NOTHING for forecast in forecasts.values())
