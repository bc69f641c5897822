"""Tells what will not work as the settings and the registry say, before anything is loaded: for `serve` and `check`."""

from pathlib import Path

from router.config.settings import Settings, unknown_settings
from router.registry.opening import missing_sources
from router.registry.registry import Registry

_SHOWN = 3


def start_warnings(settings: Settings, registry: Registry) -> tuple[str, ...]:
    """Return one sentence for each model that cannot be loaded here, and for a setting that is misspelt or in vain."""
    missing = missing_sources(registry.models.values())
    lost = tuple(f"{model_id} cannot be loaded: {reason}" for model_id, reason in missing.items())
    return (*unknown_settings(), *lost, *target_dim_warnings(settings, registry))


def target_dim_warnings(settings: Settings, registry: Registry) -> tuple[str, ...]:
    """Return a warning when `TARGET_DIM` is beyond the width of every model whose files are on this machine."""
    if settings.target_dim is None:
        return ()
    widths = _known_widths(registry)
    if not widths or max(widths.values()) >= settings.target_dim:
        return ()
    shown = ", ".join(f"{model_id}: {width}" for model_id, width in list(widths.items())[:_SHOWN])
    more = f" and {len(widths) - _SHOWN} more" if len(widths) > _SHOWN else ""
    return (f"TARGET_DIM={settings.target_dim} has no effect: it is beyond the full width of {shown}{more}",)


def _known_widths(registry: Registry) -> dict[str, int]:
    from engines.planner import ModelStore, native_width  # late: imports huggingface_hub

    store = ModelStore()
    try:
        located = [(spec, store.locate(spec)) for spec in registry.models.values()]
    finally:
        store.close()
    widths = {
        spec.model_id: native_width(Path(files.path), spec, files.adapter_folder) for spec, files in located if files
    }
    return {model_id: width for model_id, width in widths.items() if width}
