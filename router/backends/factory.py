"""Chooses the backend: from settings or registry, else by the machine's devices."""

import re
from pathlib import Path

import structlog

from engines.errors import InvalidValue
from router.backends.base import Backend
from router.config.settings import Settings
from router.registry.registry import Registry

log = structlog.get_logger()

_DEV = Path("/dev")


def open_backend(settings: Settings, registry: Registry) -> Backend:
    """Create the backend, not started. Three cases: 1. named;  2. more than one GPU: `process`;  3. `local`.

    Raises:
        InvalidValue: a requested device does not exist, or a library is missing.
    """
    named = settings.backend or registry.backend
    if named == "ray":
        return _open_ray(settings, registry)  # (1)
    if named == "process" or (named is None and may_have_gpus(settings.device)):
        from router.backends.process.fleet import find_devices_elsewhere, open_process_backend

        devices = find_devices_elsewhere(settings.device)
        if named == "process" or len(devices) > 1:
            return open_process_backend(settings, registry, devices)  # (1), (2)
    from router.backends.local import open_local_backend

    return open_local_backend(settings, registry)  # (1), (3)


def may_have_gpus(wanted: tuple[str, ...], dev: Path = _DEV) -> bool:
    """Whether `DEVICE` may mean several GPUs. Called before torch is imported, so it counts device files in /dev."""
    if wanted == ("auto",):
        return sum(re.fullmatch(r"nvidia\d+", path.name) is not None for path in dev.glob("nvidia*")) > 1
    return len(wanted) > 1


def _open_ray(settings: Settings, registry: Registry) -> Backend:
    try:
        from router.backends.ray.fleet import open_ray_backend
    except ImportError as error:
        raise InvalidValue(
            "BACKEND=ray needs Ray, which is not installed: pip install 'embedyard[ray]', in the version that "
            "the cluster's nodes have"
        ) from error
    return open_ray_backend(settings, registry)
