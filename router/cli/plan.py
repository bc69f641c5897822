"""`embedyard plan`: predicts what loading models would need and evict, without loading anything."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

import click
import msgspec

from engines.errors import InvalidValue
from engines.spec import ModelSpec
from engines.types import Plan, format_bytes
from router.cli.capacity import Capacities, KnownNeed, total_bytes
from router.cli.client import RemoteError, get
from router.cli.completion import model_names
from router.cli.output import print_rows
from router.config.settings import Settings, SettingsError, load_settings
from router.registry.opening import NAMES, choose_models, open_registry
from router.registry.registry import Registry, RegistryError

if TYPE_CHECKING:
    from engines.planner import Device, Forecast

EXIT_DOES_NOT_FIT = 1
EXIT_INVALID = 2
"""Exit codes: a model does not fit; invalid command, registry, settings or address."""

_UNKNOWN = (
    "size not known of {models}: the files are not on this machine, and the hub does not tell it. embedyard pull "
    "{arguments} downloads them; embedyard doctor says whether the hub is reachable"
)

COLUMNS = ("name", "device", "state", "needs", "free", "fits", "would leave", "load", "why")


@click.command(
    epilog="""
\b
Examples:
  embedyard plan bge-m3                        on this machine, with nothing else in memory
  embedyard plan bge-m3 m3e-base               also whether both fit at once
  embedyard plan Qwen/Qwen3-Embedding-8B       a model of the hub; it need not be in the registry
  embedyard plan bge-m3 --url http://127.0.0.1:6008    on a running server, as it is now
"""
)
@click.argument("models", nargs=-1, metavar="MODEL...", shell_complete=model_names)
@click.option("--url", help="Plan on the server at this address.")
@click.option("--registry", type=click.Path(path_type=Path), help="Registry file, instead of REGISTRY.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list of plans.")
def command(models: tuple[str, ...], *, url: str | None, registry: Path | None, as_json: bool) -> None:
    """Predict what loading MODELs would need, without loading them.

    Sizes come from earlier loads, else from the files, else from headers on the hub (a few kilobytes, no download).
    Exit code 0: every model fits, or its size is not known; 1: some do not fit; 2: invalid command, registry, settings
    or address.
    """
    if not models:
        raise click.UsageError(f"name models: {NAMES}")
    try:
        settings = load_settings(flags={"REGISTRY": str(registry)} if registry else {})
        plans, summary = (
            _plan_on_server(url, models, settings) if url else _plan_locally(models, settings, open_registry(settings))
        )
    except (SettingsError, RegistryError, InvalidValue, RemoteError) as error:
        click.echo(str(error), err=True)
        raise SystemExit(EXIT_INVALID) from None
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(plans), indent=2))
    else:
        print_rows(COLUMNS, [_cells(plan) for plan in plans])
        for line in summary:
            click.echo(line, err=True)
    if not all(plan.fits for plan in plans):
        raise SystemExit(EXIT_DOES_NOT_FIT)


def _plan_on_server(url: str, models: tuple[str, ...], settings: Settings) -> tuple[list[Plan], list[str]]:
    """Plan on a running server."""
    key = settings.admin_api_key or settings.api_key
    return [get(url, f"/admin/plan?model={quote(name, safe='')}", Plan, key) for name in models], []


def _plan_locally(models: tuple[str, ...], settings: Settings, registry: Registry) -> tuple[list[Plan], list[str]]:
    """Plan on this machine, with nothing in memory.

    Raises:
        RegistryError: no such model.
        InvalidValue: the device does not exist.
    """
    specs = choose_models(registry, models).models
    from engines.planner import (  # these bring huggingface_hub
        Forecaster,
        Measurements,
        ModelStore,
        plan_best,
        read_device,
    )

    budget = settings.memory_budget or registry.memory_budget
    devices = [read_device(name, budget) for name in _devices(settings)]
    store = ModelStore()
    try:
        forecaster = Forecaster(store, Measurements(settings.state_dir / "measurements.json"), devices[0].name)
        forecasts = {model_id: forecaster.forecast(spec, ask_hub=True) for model_id, spec in specs.items()}
    finally:
        store.close()
    plans = [plan_best(devices, spec, forecasts[model_id]) or _no_device(spec) for model_id, spec in specs.items()]
    return plans, _summary(_known_needs(specs, forecasts, devices), specs, devices)


def _devices(settings: Settings) -> tuple[str, ...]:
    """Return the devices; imports torch, which takes seconds, only when there may be GPUs."""
    if set(settings.device) == {"cpu"}:
        return ("cpu",)
    from engines.machine import find_devices

    return find_devices(settings.device)


def _no_device(spec: ModelSpec) -> Plan:
    return Plan(
        model_id=spec.model_id, host_id="", state="absent", fits=False, need_bytes=0, free_bytes=0,
        reason=f"requires device {spec.device}, which is not in DEVICE",
    )  # fmt: skip


def _known_needs(
    specs: Mapping[str, ModelSpec], forecasts: "Mapping[str, Forecast]", devices: "Sequence[Device]"
) -> dict[str, KnownNeed]:
    """Return what the models of known size need, and the devices that they may run on."""
    from engines.planner import device_matches  # late, as above

    return {
        model_id: KnownNeed(
            weight_bytes=forecast.need.weight_bytes,
            workspace_bytes=forecast.need.workspace_bytes,
            devices=tuple(each.name for each in devices if device_matches(each.name, specs[model_id].device)),
        )
        for model_id, forecast in forecasts.items()
        if forecast.need is not None
    }


def _summary(needs: Mapping[str, KnownNeed], specs: Mapping[str, ModelSpec], devices: "Sequence[Device]") -> list[str]:
    """Tell whether the models fit at once, by the placement that the banner of `serve` predicts with.

    Of unknown sizes it tells how to know them; one of these models may make the others take turns.
    """
    budgets = {device.name: device.budget_bytes for device in devices}
    unknown = [model_id for model_id in specs if model_id not in needs]
    needs = {model_id: need for model_id, need in needs.items() if need.devices}  # the others have a line of their own
    lines = []
    if len(needs) > 1:
        verdict = "they take turns" if Capacities(budgets).place(needs) else "they fit at once"
        need, budget = total_bytes(needs.values()), sum(budgets.values())
        without = f", without {', '.join(unknown)}" if unknown else ""
        lines.append(f"together {format_bytes(need)} of {format_bytes(budget)}: {verdict}{without}")
    if unknown:
        lines.append(_UNKNOWN.format(models=", ".join(unknown), arguments=shlex.join(unknown)))
    return lines


def _fits(plan: Plan) -> str:
    is_unknown = plan.fits and not plan.need_bytes and plan.state in ("absent", "fetching")
    return "?" if is_unknown else "yes" if plan.fits else "no"


def _cells(plan: Plan) -> tuple[str, ...]:
    return (
        plan.model_id,
        plan.host_id,
        plan.state,
        format_bytes(plan.need_bytes) if plan.need_bytes else "?",
        format_bytes(plan.free_bytes),
        _fits(plan),
        ", ".join(plan.evict),
        "" if plan.seconds is None else f"{plan.seconds:.1f} s",
        plan.reason,
    )
