"""Checks, before anything is allocated, that config.json and the weight files of a folder describe one model.

transformers allocates all that config.json describes, fills in what the files hold, and reports at the end what was
missing: 250 layers over 90 MB of weights took 2.5 GB before they were rejected. This module builds the model without
memory (torch's meta device) and counts its parameters. What the count does not show (a tensor of another name or
shape) is found while loading, and costs no more memory than the size of the files.
"""

import copy
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import structlog
from accelerate import init_empty_weights
from msgspec import Struct
from transformers import PretrainedConfig
from transformers.initialization import meta_device_safe_creation_ops, no_init_weights

from engines.errors import BrokenFiles
from engines.hub.weight_files import read_header, read_range
from engines.loading.module_settings import Json
from engines.models.adapters import unused_weights

log = structlog.get_logger(__name__)

_COUNT_KEYS = re.compile(r"(^|_)(n_)?(layers?|blocks?|depths?|experts|groups|stages|labels)$")
"""Keys of a config that count modules which are built one by one."""

_MAX_COUNT = 1024
"""The deepest models have 126 layers and 512 experts; a model with this many layers is built in a second."""

_SPARE_SHARE, _SPARE = 1.1, 1_000_000
"""A model may exceed its files by this much, for weights that are computed and not stored."""

_PACKED_SHARE = 8
"""Files of quantised models store eight 4-bit numbers in one element."""

_MAX_BUFFER_BYTES = 256 * 2**20
"""Limit of computed tables: GPT-Neo's masks of 2048 tokens have 100 MB."""


class StoredWeights(Struct, frozen=True):
    """Elements and bytes of the weight files, as an upper bound."""

    elements: int
    size_bytes: int


def check_counts(config: Json, file: str = "config.json") -> None:
    """Rejects a config with absurd layer or module counts.

    Raises:
        BrokenFiles: naming the key.
    """
    for key, number in _repeat_counts(config):
        if number > _MAX_COUNT:
            raise BrokenFiles(
                f"{key} in {file} is {number}, but the limit is {_MAX_COUNT}; fetch the model again",
                file=file,
            )


def check_proportions(
    model_class: Any, config: PretrainedConfig, weights: Path, shards: list[str], *, trust_remote_code: bool
) -> None:
    """Rejects a config that describes more parameters than the weight files hold.

    Args:
        model_class: transformers' class that builds the model.
        shards: weight files that an index lists.

    Raises:
        BrokenFiles: it does, or a header of the weight files is broken.
    """
    stored = _count_stored(weights, shards)
    if stored is None:
        return
    try:
        needed, buffer_bytes = _count_model(model_class, config, trust_remote_code=trust_remote_code)
    except Exception as error:  # noqa: BLE001  # loading builds the model in the same way and reports the error
        log.info("model.not_counted", reason=type(error).__name__)
        return
    share = _PACKED_SHARE if getattr(config, "quantization_config", None) else _SPARE_SHARE
    if needed > share * stored.elements + _SPARE:
        raise BrokenFiles(
            f"config.json describes {needed} parameters, but the weight files hold {stored.elements}; fetch the model "
            "again",
            file="config.json",
        )
    max_buffer_bytes = max(_MAX_BUFFER_BYTES, stored.size_bytes)
    if buffer_bytes > max_buffer_bytes:
        raise BrokenFiles(
            f"config.json describes computed tables of {buffer_bytes} bytes, but the limit for its weight files of "
            f"{stored.size_bytes} bytes is {max_buffer_bytes}; fetch the model again",
            file="config.json",
        )


def _repeat_counts(config: Json) -> Iterator[tuple[str, float]]:
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _repeat_counts(value)
        elif _COUNT_KEYS.search(key):
            numbers = value if isinstance(value, list) else [value]
            yield from ((key, number) for number in numbers if isinstance(number, int | float))


def empty_model(model_class: Any, config: PretrainedConfig, *, trust_remote_code: bool) -> Any:
    """Builds the model that a config describes, without memory for its weights.

    With its buffers, accelerate builds by torch's device context of this thread; without, it would replace a method of
    `nn.Module` for all threads meanwhile.
    """
    config = copy.deepcopy(config)  # building a model writes into its config
    with init_empty_weights(include_buffers=True), no_init_weights(), meta_device_safe_creation_ops():
        model = model_class.from_config(config, trust_remote_code=trust_remote_code)
    model.tie_weights()
    return model


def _count_model(model_class: Any, config: PretrainedConfig, *, trust_remote_code: bool) -> tuple[int, int]:
    """Counts the parameters of the model that a config describes, and the bytes of its buffers."""
    model = empty_model(model_class, config, trust_remote_code=trust_remote_code)
    own = dict(model.named_parameters())
    unused = unused_weights(set(own))
    elements = sum(parameter.numel() for name, parameter in own.items() if name not in unused)
    return elements, sum(buffer.numel() * buffer.itemsize for buffer in model.buffers())


def _count_stored(weights: Path, shards: list[str]) -> StoredWeights | None:
    """Counts the elements and bytes of the weight files; returns None if any is missing, which loading reports."""
    names = ["model.safetensors"] if (weights / "model.safetensors").exists() else shards
    try:
        sizes = {name: (weights / name).stat().st_size for name in names}
        elements = sum(_elements(weights, name, size) for name, size in sizes.items())
    except OSError:
        return None
    if names:
        return StoredWeights(elements, sum(sizes.values()))
    size_bytes = sum(path.stat().st_size for path in weights.glob("pytorch_model*.bin"))
    return StoredWeights(size_bytes // 2, size_bytes) if size_bytes else None


def _elements(weights: Path, name: str, size_bytes: int) -> int:
    try:
        return sum(tensor.elements for tensor in read_header(name, size_bytes, partial(read_range, weights)))
    except BrokenFiles as error:
        raise BrokenFiles(f"{error}; fetch the model again", file=name) from error
