"""One checked entry of `registry.yaml` → `ModelSpec`: defaults merged, quantities in their units."""

from typing import Any

from msgspec import UNSET, Struct, UnsetType, structs

from engines.spec import Calibration, Matryoshka, ModelSpec
from router.registry_file import Bounds, CalibrationRule, Defaults, Entry, MatryoshkaRule
from router.units import parse_cache_bytes, parse_keep_alive_s

_POOLING_MODES = {"mean_sqrt_len": "mean_sqrt_len_tokens", "last_token": "lasttoken"}
"""The registry's own spellings of sentence-transformers' modes."""


def to_spec(entry: Entry, defaults: Defaults | UnsetType) -> ModelSpec:
    """What the entry says, else what the defaults say, else what `ModelSpec` says."""
    given = (_given(defaults) if defaults else {}) | _given(entry)
    given.pop("aliases", None)
    given["model_id"] = given.pop("name")
    if "keep_alive" in given:
        given["keep_alive_s"] = parse_keep_alive_s(given.pop("keep_alive"))
    if "cache" in given:
        given["cache_bytes"] = parse_cache_bytes(given.pop("cache"))
    if "pooling" in given:
        modes = [given["pooling"]] if isinstance(given["pooling"], str) else given["pooling"]
        given["pooling"] = tuple(_POOLING_MODES.get(mode, mode) for mode in modes)
    if "matryoshka" in given:
        given["matryoshka"] = _to_matryoshka(given["matryoshka"])
    if "calibration" in given:
        given["calibration"] = _to_calibration(given["calibration"])
    return ModelSpec(**given)


def _to_matryoshka(rule: list[int] | MatryoshkaRule) -> Matryoshka:
    if isinstance(rule, list):
        return Matryoshka(widths=tuple(rule))
    return Matryoshka(widths=tuple(rule.widths or ()), minimum=rule.min or None, layer_norm=rule.layer_norm or False)


def _to_calibration(rule: CalibrationRule) -> Calibration:
    return Calibration(lowest=_numbers(rule.lowest), highest=_numbers(rule.highest))


def _numbers(bounds: Bounds) -> tuple[float, ...]:
    return tuple(map(float, bounds)) if isinstance(bounds, list) else (float(bounds),)


def _given(struct: Struct) -> dict[str, Any]:
    return {name: value for name, value in structs.asdict(struct).items() if value is not UNSET}
