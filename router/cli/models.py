"""`embedyard models`: lists the registry's models, their size on disk, and with `--url` their state on a server."""

from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec

from engines.spec import Matryoshka, ModelSpec, Task
from engines.types import format_bytes
from router.cli.client import RemoteError, get
from router.cli.output import print_rows
from router.config.settings import Settings, SettingsError, load_settings
from router.registry.opening import open_registry
from router.registry.registry import Registry, RegistryError
from router.schemas.admin import Slot, SlotList

if TYPE_CHECKING:
    from engines.planner import Forecast

COLUMNS = ("name", "state", "on disk", "in memory", "task", "dimensions", "license", "source", "description")
_GPU_DRIVER = Path("/dev/nvidiactl")
_NEAREST_FIRST = (
    "ready", "waking", "warming", "parked", "loading", "waiting_space", "fetching", "draining", "parking", "unloading",
    "failed", "cold",
)  # fmt: skip


@click.command(
    epilog="""
\b
Examples:
  embedyard models                   a table
  embedyard models | cut -f1         names only: in a pipe, one model per line, tab-separated
  embedyard models --json            all fields, for programs
  embedyard models --url http://127.0.0.1:6008    with states on a running server
"""
)
@click.option("--url", help="Server to query for states and memory.")
@click.option("--registry", type=click.Path(path_type=Path), help="Registry file, instead of REGISTRY.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list with all fields.")
def command(url: str | None, registry: Path | None, *, as_json: bool) -> None:
    """Show the models of the registry: state, size on disk, size in memory, task, dimensions, licence.

    Memory is the size of the last load on this machine; with a ~ it is an estimate from the files, weights only.
    Exit code 0: success; 2: invalid registry, settings or address.
    """
    try:
        settings = load_settings(flags={"REGISTRY": str(registry)} if registry else {})
        found = open_registry(settings)
        slots = _slots(url, settings) if url else None
    except (RegistryError, SettingsError, RemoteError) as error:
        click.echo(str(error), err=True)
        raise SystemExit(2) from None
    rows = [Row(spec, forecast, slots) for spec, forecast in _forecasts(found, settings)]
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode([row.record(found) for row in rows]), indent=2))
    else:
        bold = [index for index, row in enumerate(rows) if row.spec.model_id == found.default_model]
        print_rows(COLUMNS, [row.cells() for row in rows], bold=bold, crop=("license", "source", "description"))


def _slots(url: str, settings: Settings) -> dict[str, Slot]:
    """Return each model's slot whose state is nearest to `ready`."""
    key = settings.admin_api_key or settings.api_key
    slots = get(url, "/admin/models", SlotList, key).data
    nearest = sorted(slots, key=lambda slot: -_NEAREST_FIRST.index(slot.state) if slot.state in _NEAREST_FIRST else -99)
    return {slot.id: slot for slot in nearest}


def _forecasts(registry: Registry, settings: Settings) -> "list[tuple[ModelSpec, Forecast]]":
    from engines.planner import (
        Forecaster,  # late: these import huggingface_hub
        Measurements,
        ModelStore,
    )

    wanted = settings.device[0]
    device = (
        ("cuda" if _GPU_DRIVER.exists() else "cpu") if wanted == "auto" else wanted
    )  # importing torch would take seconds
    store = ModelStore()
    try:
        forecaster = Forecaster(store, Measurements(settings.state_dir / "measurements.json"), device)
        return [(spec, forecaster.forecast(spec)) for spec in registry.models.values()]
    finally:
        store.close()


class Row:
    """One row of the table or the JSON list. `slots` None: no server was queried."""

    def __init__(self, spec: ModelSpec, forecast: "Forecast", slots: dict[str, Slot] | None) -> None:
        self.spec = spec
        self._forecast = forecast
        self._slot = None if slots is None else slots.get(spec.model_id)
        self._is_live = slots is not None

    @property
    def state(self) -> str:
        """State on the server, if one was queried, else on disk."""
        if self._is_live:
            return self._slot.state if self._slot else "not served"
        return "cold" if self._forecast.files else "absent"

    @property
    def memory_bytes(self) -> int | None:
        """Memory used now, else at the last load, else the size of the weights."""
        if self._slot is not None and self._slot.weight_bytes:
            return self._slot.weight_bytes + self._slot.workspace_bytes
        need = self._forecast.need
        return None if need is None else need.total_bytes if need.workspace_known else need.weight_bytes

    @property
    def is_estimate(self) -> bool:
        """Whether `memory_bytes` is not measured."""
        need = self._forecast.need
        is_resident = self._slot is not None and self._slot.weight_bytes > 0
        return not is_resident and need is not None and not need.workspace_known

    @property
    def task(self) -> Task | None:
        """What the model computes; None while unknown."""
        return (self._slot.task if self._slot else None) or self.spec.task

    @property
    def dimensions(self) -> int | None:
        """Native dimensions of the model; None for one that returns no vectors."""
        if self.task not in (None, "embed"):
            return None
        info = self._slot.info if self._slot else None
        return info.dimensions if info else self._forecast.width

    def cells(self) -> tuple[str, ...]:
        """Format the row, in the order of `COLUMNS`."""
        files, memory = self._forecast.files, self.memory_bytes
        return (
            self.spec.model_id,
            self.state,
            format_bytes(files.size_bytes) if files else "",
            f"{'~' if self.is_estimate else ''}{format_bytes(memory)}" if memory else "",
            self.task or "",
            _widths(self.dimensions, self.spec.matryoshka),
            self.spec.license,
            self.spec.source,
            self.spec.description,
        )

    def record(self, registry: Registry) -> dict[str, object]:
        """Return all fields, for `--json`."""
        files = self._forecast.files
        return {
            **msgspec.structs.asdict(self.spec),
            "task": self.task,
            "aliases": registry.aliases_of(self.spec.model_id),
            "is_default": self.spec.model_id == registry.default_model,
            "state": self.state,
            "disk_bytes": files.size_bytes if files else None,
            "memory_bytes": self.memory_bytes,
            "is_estimate": self.is_estimate,
            "dimensions": self.dimensions,
            "commit": files.revision if files else None,
        }


def _widths(native: int | None, matryoshka: Matryoshka | None) -> str:
    """Format the native dimensions and the smaller ones on offer: `1024 (32+)`, `768 (256, 512)`."""
    shown = "" if native is None else str(native)
    if matryoshka is None:
        return shown
    below = f"{matryoshka.minimum}+" if matryoshka.minimum is not None else ", ".join(map(str, matryoshka.widths))
    return f"{shown} ({below})".strip()
