"""The keys of `registry.yaml` as Structs, from which both the checks and the JSON Schema are derived.

A value with a syntax of its own names its parser (`parse`), which raises `ValueError` with what is allowed. The keys
are documented in `router/registry/json_schema.py`; rules between keys are in `router/registry/rules.py`.
"""

import re
from collections.abc import Callable
from datetime import datetime
from typing import Annotated, Literal

from cronsim import CronSim, CronSimError
from msgspec import UNSET, Meta, Struct, UnsetType

from engines.spec import Dtype, Eviction, Offload, RerankTemplate, Task, Truncate
from router.config.quantities import (
    BUDGET_PATTERN,
    DEVICE_PATTERN,
    KEEP_ALIVE_PATTERN,
    SIZE_PATTERN,
    parse_budget,
    parse_cache_bytes,
    parse_device,
    parse_host_budget,
    parse_keep_alive_s,
)

MAX_NAME_CHARS = 200
MAX_SCHEDULE_CHARS = 200
_CRON_FIELDS = 5
NAME_PATTERN = r"^[^\s/]+(/[^\s/]+)*$"

SOURCE_ALLOWED = (
    "a hub id such as BAAI/bge-m3, a local folder (starting with /, ./, ../ or ~) or package:NAME/SUB/FOLDER"
)

_NAME_ALLOWED = f"a name without spaces, of at most {MAX_NAME_CHARS} characters; slashes only between other characters"
_COMMIT = re.compile(r"[0-9a-f]{40}", re.ASCII)
_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9_][A-Za-z0-9._-]*)?", re.ASCII)
_PACKAGE = re.compile(r"package:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*(/[^/\s]+)*", re.ASCII)
_LOCAL = re.compile(r"(/|\./|\.\./|~).*|\.|\.\.")
_SHA256 = re.compile(r"[0-9a-f]{64}", re.ASCII)
_PLACEHOLDER = re.compile(r"\{(\w*)\}")


def is_commit(revision: object) -> bool:
    """Whether a revision is a full commit hash of 40 hexadecimal digits."""
    return isinstance(revision, str) and _COMMIT.fullmatch(revision) is not None


def is_hub_id(source: object) -> bool:
    """Whether a source is a repository on the hub."""
    return isinstance(source, str) and _HUB_ID.fullmatch(source) is not None


def read_name(value: object) -> str:
    """Validate a model's name or alias. It is used in URLs, so no part between slashes is empty, `.` or `..`."""
    if not isinstance(value, str) or not value.isprintable() or not re.fullmatch(NAME_PATTERN, value):
        raise ValueError(_NAME_ALLOWED)
    if len(value) > MAX_NAME_CHARS or {".", ".."} & set(value.split("/")):
        raise ValueError(_NAME_ALLOWED)
    return value


def read_source(value: object) -> str:
    """Validate the location of a model's files, as `ModelSpec.source` defines it."""
    if not isinstance(value, str) or not value.isprintable():
        raise ValueError(SOURCE_ALLOWED)
    if value.startswith("package:"):
        if not _PACKAGE.fullmatch(value) or ".." in value.split("/"):
            raise ValueError("package:NAME/SUB/FOLDER, the folder inside an installed Python package")
    elif not (_LOCAL.fullmatch(value) or is_hub_id(value)):
        raise ValueError(SOURCE_ALLOWED)
    return value


def read_revision(value: object) -> str:
    """Validate a branch, a tag or a commit. YAML reads an unquoted `1234567` as a number."""
    if not isinstance(value, str) or not re.fullmatch(r"\S+", value):
        raise ValueError("a branch, a tag or a commit; put it in quotes if it looks like a number")
    return value


def read_min_cosine(value: object) -> float:
    """Validate the least cosine of a reduced dtype."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ValueError("a number from 0 to 1; 0 compares nothing")
    return float(value)


def read_schedule(value: object) -> str:
    """Validate a time in cron's words."""
    try:
        if isinstance(value, str) and len(value) <= MAX_SCHEDULE_CHARS and len(value.split()) == _CRON_FIELDS:
            next(CronSim(value, datetime(2000, 1, 1)))  # any moment
            return value
    except (CronSimError, StopIteration):
        pass
    raise ValueError("minute, hour, day of the month, month and day of the week as in cron, such as '0 8 * * 1-5'")


def read_prompt_name(value: object) -> str:
    """Validate the name of a prompt, which requests send as `input_type`."""
    if not isinstance(value, str) or not value.strip() or not value.isprintable():
        raise ValueError("a name such as query or document")
    return value


def read_prompt(value: object) -> str:
    r"""Validate a prompt. A literal `\n` is a line break without the double quotes that it needs."""
    if not isinstance(value, str):
        raise ValueError("text in double quotes")
    if r"\n" in value:
        raise ValueError(r'a line break instead of the characters \n: put the text in "double quotes"')
    return value


def read_template(value: object) -> str:
    """Validate the query template of an instruct model.

    `{text}` occurs exactly once, for the input; `{task}` at least once, for the request's `instruction`, which would
    otherwise be silently ignored. Any other word in braces is a misspelling; other braces are plain characters.
    """
    text = read_prompt(value)
    found = _PLACEHOLDER.findall(text)
    unknown = sorted(set(found) - {"task", "text"})
    if unknown:
        raise ValueError(f"{{task}} and {{text}} as its only placeholders, not {{{unknown[0]}}}")
    if found.count("text") != 1 or "task" not in found:
        raise ValueError('{text} exactly once and {task} at least once, as in "Instruct: {task}\\nQuery:{text}"')
    return text


def read_file_name(value: object) -> str:
    """Validate the name of a file inside a model's folder."""
    if not isinstance(value, str) or not value.isprintable() or not value or {"", ".", ".."} & set(value.split("/")):
        raise ValueError("a file in the model's folder, such as model.safetensors")
    return value


def read_sha256(value: object) -> str:
    """Validate a sha256 in hexadecimal digits."""
    if not isinstance(value, str) or not _SHA256.fullmatch(value):
        raise ValueError("64 hexadecimal digits in lower case, in quotes")
    return value


PoolingName = Literal[
    "cls", "mean", "max", "mean_sqrt_len", "weightedmean", "last_token", "mean_sqrt_len_tokens", "lasttoken"
]

BackendName = Literal["local", "process", "ray"]


def _read_by(parse: Callable[[object], object], **schema: object) -> Meta:
    return Meta(extra={"parse": parse}, extra_json_schema=schema)


Name = Annotated[str, _read_by(read_name, pattern=NAME_PATTERN, maxLength=MAX_NAME_CHARS)]
Source = Annotated[str, _read_by(read_source, minLength=1)]
Revision = Annotated[str, _read_by(read_revision, pattern=r"^\S+$")]
Device = Annotated[str, _read_by(parse_device, pattern=DEVICE_PATTERN)]
Duration = Annotated[int | float | str, _read_by(parse_keep_alive_s, pattern=KEEP_ALIVE_PATTERN)]
CacheSize = Annotated[int | str, _read_by(parse_cache_bytes, pattern=SIZE_PATTERN)]
MemoryBudget = Annotated[int | str, _read_by(parse_budget, pattern=BUDGET_PATTERN)]
HostBudget = Annotated[int | str, _read_by(parse_host_budget, pattern=BUDGET_PATTERN)]
PromptName = Annotated[str, _read_by(read_prompt_name, minLength=1)]
Prompt = Annotated[str, _read_by(read_prompt)]
FileName = Annotated[str, _read_by(read_file_name, minLength=1)]
Sha256 = Annotated[str, _read_by(read_sha256, pattern="^[0-9a-f]{64}$")]
Template = Annotated[str, _read_by(read_template)]
Schedule = Annotated[str, _read_by(read_schedule, minLength=9, maxLength=MAX_SCHEDULE_CHARS)]
MinCosine = Annotated[int | float, _read_by(read_min_cosine, minimum=0, maximum=1)]
Count = Annotated[int, Meta(ge=1)]
Widths = Annotated[list[Count], Meta(min_length=1)]
Bounds = int | float | Annotated[list[int | float], Meta(min_length=1)]
Dtypes = Annotated[list[Dtype], Meta(min_length=1)]
Poolings = Annotated[list[PoolingName], Meta(min_length=1)]


class MemorySection(Struct, forbid_unknown_fields=True, kw_only=True):
    """The memory that models may use, and which of them leaves it first."""

    budget: MemoryBudget
    host_budget: HostBudget | UnsetType = UNSET
    eviction: Eviction | UnsetType = UNSET


class MatryoshkaRule(Struct, forbid_unknown_fields=True, kw_only=True):
    """The widths to which vectors may be truncated: either `min` or `widths`."""

    min: Count | UnsetType = UNSET
    widths: Widths | UnsetType = UNSET
    layer_norm: bool | UnsetType = UNSET


class CalibrationRule(Struct, forbid_unknown_fields=True, kw_only=True):
    """The range of values of each component."""

    lowest: Bounds
    highest: Bounds


class Defaults(Struct, forbid_unknown_fields=True, kw_only=True):
    """Default values for all models."""

    dtype: Dtype | Dtypes | UnsetType = UNSET
    min_cosine: MinCosine | UnsetType = UNSET
    device: Device | UnsetType = UNSET
    max_tokens: Count | UnsetType = UNSET
    max_batch_tokens: Count | UnsetType = UNSET
    normalize: bool | UnsetType = UNSET
    truncate: Truncate | UnsetType = UNSET
    keep_alive: Duration | UnsetType = UNSET
    host_keep_alive: Duration | UnsetType = UNSET
    pinned: bool | UnsetType = UNSET
    preload: bool | UnsetType = UNSET
    warm: bool | UnsetType = UNSET
    preload_at: Schedule | UnsetType = UNSET
    cache: CacheSize | UnsetType = UNSET
    cache_shared: bool | UnsetType = UNSET
    replicas: Count | UnsetType = UNSET
    offload: Offload | UnsetType = UNSET


class ModelEntry(Defaults, forbid_unknown_fields=True, kw_only=True):
    """One model."""

    name: Name
    source: Source
    aliases: list[Name] | UnsetType = UNSET
    task: Task | UnsetType = UNSET
    template: RerankTemplate | UnsetType = UNSET
    revision: Revision | UnsetType = UNSET
    adapter: Source | UnsetType = UNSET
    adapter_revision: Revision | UnsetType = UNSET
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
    sha256: dict[FileName, Sha256] | UnsetType = UNSET


class RegistryFile(Struct, forbid_unknown_fields=True, kw_only=True):
    """The models of an Embedyard server."""

    version: Literal[1]
    models: list[ModelEntry]
    default_model: Name | UnsetType = UNSET
    memory: MemorySection | UnsetType = UNSET
    backend: BackendName | UnsetType = UNSET
    defaults: Defaults | UnsetType = UNSET
