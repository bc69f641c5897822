"""Says which reduced dtypes would be faster on this machine's CPU, for `serve` and `doctor`. Loads no model."""

from collections.abc import Iterator

from router.config.settings import Settings
from router.registry.registry import Registry

MEASURE = "embedyard precision MODEL measures what they cost and gain"


def precision_offers(registry: Registry, settings: Settings) -> Iterator[str]:
    """Yield a line for each model in float32 for which a reduced dtype was measured, is faster and near enough."""
    from engines.planner import ModelStore, PrecisionStore  # late: brings huggingface_hub

    kept, store = PrecisionStore(settings.state_dir), ModelStore()
    try:
        for spec in registry.models.values():
            files = store.locate(spec) if spec.dtype in ("auto", "float32") else None
            offers = kept.offers(spec, files.revision, "cpu") if files else ()
            if offers:
                yield f"{spec.model_id}: {'; '.join(offers)}"
    finally:
        store.close()


def start_lines(registry: Registry, settings: Settings) -> list[str]:
    """Return the offers for a server whose models run on the CPU; where there are none, how to get them.

    Without instructions for a reduced dtype, and where the registry names one for each model, there is nothing to say.
    """
    from engines.planner import fast_dtypes  # late, as above

    fast = fast_dtypes()
    if not fast or all(spec.dtype not in ("auto", "float32") for spec in registry.models.values()):
        return []
    return list(precision_offers(registry, settings)) or [f"{' and '.join(fast)} may be faster here: {MEASURE}"]
