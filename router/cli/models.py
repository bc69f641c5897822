"""`embedyard models`: what is in the registry, what of it is here, and with `--url` what is in a server's memory."""

from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec

from engines.spec import Matryoshka, ModelSpec
from engines.types import format_bytes
from router.cli.client import RemoteError, get
from router.cli.output import print_rows
from router.config.settings import Settings, SettingsError, load_settings
from router.registry.registry import Registry, RegistryError, open_registry
from router.schemas.admin import Slot, SlotList

if TYPE_CHECKING:
    from engines.planner import Forecast

COLUMNS = ("name", "state", "on disk", "in memory", "dimensions", "license", "source", "description")
_GPU_DRIVER = Path("/dev/nvidiactl")
_NEAREST_FIRST = ("ready", "warming", "loading", "waiting_space", "fetching", "draining", "unloading", "failed", "cold")


@click.command(
    epilog="""
\b
Examples:
  embedyard models                   a table
  embedyard models | cut -f1         the names: in a pipe, one model a line, columns parted by tabs
  embedyard models --json            everything, for programs
  embedyard models --url http://127.0.0.1:6008    with the states of a running server
"""
)
@click.option("--url", help="Ask the server that runs there for states and memory.")
@click.option("--registry", type=click.Path(path_type=Path), help="Another file than the settings name.")
@click.option("--json", "as_json", is_flag=True, help="A JSON list with every field.")
def command(url: str | None, registry: Path | None, *, as_json: bool) -> None:
    """Show the models of the registry: state, size on disk, size in memory, dimensions, licence.

    Memory is what a model took when it was last loaded here; after a ~ it is an estimate from its files, weights alone.
    Exit code 0, or 2: the registry, the settings or the address must be put right.
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
    """Each model's slot nearest to serving."""
    key = settings.admin_api_key or settings.api_key
    slots = get(url, "/admin/models", SlotList, key).data
    nearest = sorted(slots, key=lambda slot: -_NEAREST_FIRST.index(slot.state) if slot.state in _NEAREST_FIRST else -99)
    return {slot.id: slot for slot in nearest}


def _forecasts(registry: Registry, settings: Settings) -> "list[tuple[ModelSpec, Forecast]]":
    from engines.planner import (
        Forecaster,  # these bring huggingface_hub, which a mistake need not wait for
        Measurements,
        ModelStore,
    )

    wish = settings.device[0]
    device = ("cuda" if _GPU_DRIVER.exists() else "cpu") if wish == "auto" else wish  # torch would take seconds to tell
    store = ModelStore()
    try:
        forecaster = Forecaster(store, Measurements(settings.state_dir / "measurements.json"), device)
        return [(spec, forecaster.forecast(spec)) for spec in registry.models.values()]
    finally:
        store.close()


class Row:
    """One model, as the table and the JSON tell it. `slots` None: no server was asked."""

    def __init__(self, spec: ModelSpec, forecast: "Forecast", slots: dict[str, Slot] | None) -> None:
        self.spec = spec
        self._forecast = forecast
        self._slot = None if slots is None else slots.get(spec.model_id)
        self._is_live = slots is not None

    @property
    def state(self) -> str:
        """The server's word, else what the disk says; a model that the server does not have is none of its."""
        if self._is_live:
            return self._slot.state if self._slot else "not served"
        return "cold" if self._forecast.files else "absent"

    @property
    def memory_bytes(self) -> int | None:
        """What it takes now, else what it took, else its weights."""
        if self._slot is not None and self._slot.weight_bytes:
            return self._slot.weight_bytes + self._slot.workspace_bytes
        need = self._forecast.need
        return None if need is None else need.total_bytes if need.workspace_known else need.weight_bytes

    @property
    def is_estimate(self) -> bool:
        """Whether the memory was never measured."""
        need = self._forecast.need
        is_resident = self._slot is not None and self._slot.weight_bytes > 0
        return not is_resident and need is not None and not need.workspace_known

    @property
    def dimensions(self) -> int | None:
        """The model's own width."""
        info = self._slot.info if self._slot else None
        return info.dimensions if info else self._forecast.width

    def cells(self) -> tuple[str, ...]:
        """In the order of `COLUMNS`."""
        files, memory = self._forecast.files, self.memory_bytes
        return (
            self.spec.model_id,
            self.state,
            format_bytes(files.size_bytes) if files else "",
            f"{'~' if self.is_estimate else ''}{format_bytes(memory)}" if memory else "",
            _widths(self.dimensions, self.spec.matryoshka),
            self.spec.license,
            self.spec.source,
            self.spec.description,
        )

    def record(self, registry: Registry) -> dict[str, object]:
        """Everything, for programs."""
        files = self._forecast.files
        return {
            **msgspec.structs.asdict(self.spec),
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
    """The model's own width, and those below it that may be asked for: `1024 (32+)`, `768 (256, 512)`."""
    shown = "" if native is None else str(native)
    if matryoshka is None:
        return shown
    below = f"{matryoshka.minimum}+" if matryoshka.minimum is not None else ", ".join(map(str, matryoshka.widths))
    return f"{shown} ({below})".strip()
