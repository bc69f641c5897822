"""What may stand in `registry.yaml`: its keys as Structs, from which both checks and JSON Schema are derived.

A value with a form of its own names the function that reads it (`parse`), which raises `ValueError` saying what is
allowed. What the keys mean is told in `router/registry_schema.py`; rules between keys are in
`router/registry_rules.py`.
"""

from collections.abc import Callable
from typing import Annotated, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

from engines.spec import Dtype, Truncate
from router import registry_values as values
from router.units import (
    BUDGET_PATTERN,
    DEVICE_PATTERN,
    KEEP_ALIVE_PATTERN,
    SIZE_PATTERN,
    parse_budget,
    parse_cache_bytes,
    parse_device,
    parse_keep_alive_s,
)

PoolingName = Literal[
    "cls", "mean", "max", "mean_sqrt_len", "weightedmean", "last_token", "mean_sqrt_len_tokens", "lasttoken"
]

BackendName = Literal["local", "process", "ray"]


def _read_by(parse: Callable[[object], object], **schema: object) -> Meta:
    return Meta(extra={"parse": parse}, extra_json_schema=schema)


Name = Annotated[str, _read_by(values.name, pattern=values.NAME_PATTERN, maxLength=values.MAX_NAME_CHARS)]
Source = Annotated[str, _read_by(values.source, minLength=1)]
Revision = Annotated[str, _read_by(values.revision, pattern=r"^\S+$")]
Device = Annotated[str, _read_by(parse_device, pattern=DEVICE_PATTERN)]
Duration = Annotated[int | float | str, _read_by(parse_keep_alive_s, pattern=KEEP_ALIVE_PATTERN)]
CacheSize = Annotated[int | str, _read_by(parse_cache_bytes, pattern=SIZE_PATTERN)]
MemoryBudget = Annotated[int | str, _read_by(parse_budget, pattern=BUDGET_PATTERN)]
PromptName = Annotated[str, _read_by(values.prompt_name, minLength=1)]
Prompt = Annotated[str, _read_by(values.prompt)]
Template = Annotated[str, _read_by(values.template)]
Count = Annotated[int, Meta(ge=1)]
Widths = Annotated[list[Count], Meta(min_length=1)]
Bounds = int | float | Annotated[list[int | float], Meta(min_length=1)]
Poolings = Annotated[list[PoolingName], Meta(min_length=1)]


class MemorySection(Struct, forbid_unknown_fields=True, kw_only=True):
    """How much memory models may take."""

    budget: MemoryBudget


class MatryoshkaRule(Struct, forbid_unknown_fields=True, kw_only=True):
    """The widths a vector may be cut to: either `min` or `widths`."""

    min: Count | UnsetType = UNSET
    widths: Widths | UnsetType = UNSET
    layer_norm: bool | UnsetType = UNSET


class CalibrationRule(Struct, forbid_unknown_fields=True, kw_only=True):
    """The range of each component of the vectors."""

    lowest: Bounds
    highest: Bounds


class Defaults(Struct, forbid_unknown_fields=True, kw_only=True):
    """Values for every model that does not say otherwise."""

    dtype: Dtype | UnsetType = UNSET
    device: Device | UnsetType = UNSET
    max_tokens: Count | UnsetType = UNSET
    max_batch_tokens: Count | UnsetType = UNSET
    normalize: bool | UnsetType = UNSET
    truncate: Truncate | UnsetType = UNSET
    keep_alive: Duration | UnsetType = UNSET
    pinned: bool | UnsetType = UNSET
    preload: bool | UnsetType = UNSET
    cache: CacheSize | UnsetType = UNSET
    cache_shared: bool | UnsetType = UNSET
    replicas: Count | UnsetType = UNSET


class Entry(Defaults, forbid_unknown_fields=True, kw_only=True):
    """One model."""

    name: Name
    source: Source
    aliases: list[Name] | UnsetType = UNSET
    revision: Revision | UnsetType = UNSET
    trust_remote_code: bool | UnsetType = UNSET
    pooling: PoolingName | Poolings | UnsetType = UNSET
    prompts: dict[PromptName, Prompt] | UnsetType = UNSET
    default_prompt: PromptName | UnsetType = UNSET
    instruction_template: Template | UnsetType = UNSET
    matryoshka: Widths | MatryoshkaRule | UnsetType = UNSET
    description: str | UnsetType = UNSET
    license: str | UnsetType = UNSET
    token_encoding: Literal["cl100k_base"] | UnsetType = UNSET
    unframed_token_ids: bool | UnsetType = UNSET
    calibration: CalibrationRule | UnsetType = UNSET


class RegistryFile(Struct, forbid_unknown_fields=True, kw_only=True):
    """The models that an Embedyard server may serve."""

    version: Literal[1]
    models: list[Entry]
    default_model: Name | UnsetType = UNSET
    memory: MemorySection | UnsetType = UNSET
    backend: BackendName | UnsetType = UNSET
    defaults: Defaults | UnsetType = UNSET
