"""Whether config.json and the weights of a folder are of one model, by their numbers, before anything is allocated.

transformers makes room for all that config.json asks for, fills what the files hold, and says at the end what was
missing: 250 layers over 90 MB of weights took 2.5 GB before they were refused. Here the model is made without memory
(torch's meta device) and counted. What the count does not show (a tensor of another name or shape) is found while
loading, and costs no more memory than the files have bytes.
"""

import copy
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import structlog
import torch
from msgspec import Struct
from transformers import PretrainedConfig
from transformers.initialization import meta_device_safe_creation_ops, no_init_weights

from engines.errors import BrokenFiles
from engines.hub.weight_files import read_header, read_range
from engines.loading.folder import Json
from engines.models.adapters import unused_weights

log = structlog.get_logger(__name__)

_REPEATED = re.compile(r"(^|_)(n_)?(layers?|blocks?|depths?|experts|groups|stages|labels)$")
"""Keys of a config that say how many of something are made, one by one."""

_MOST_REPEATED = 1024
"""The deepest models have 126 layers, and 512 experts; a model of so many layers is made in a second."""

_SPARE_SHARE, _SPARE = 1.1, 1_000_000
"""What a model may have beyond the files, for weights that are computed and not stored."""

_PACKED_SHARE = 8
"""Numbers of four bits, in files of quantised models, lie eight in an element."""

_MOST_BUFFER_BYTES = 256 * 2**20
"""Of tables that are computed: GPT-Neo's masks of 2048 tokens have 100 MB."""


class Held(Struct, frozen=True):
    """What the weight files hold: an upper bound."""

    elements: int
    size_bytes: int


def check_counts(config: Json, file: str = "config.json") -> None:
    """Refuse a config that has things made without end.

    Raises:
        BrokenFiles: naming the key.
    """
    for key, number in _counts(config):
        if number > _MOST_REPEATED:
            raise BrokenFiles(
                f"{file} says {key} = {number}, and {_MOST_REPEATED} is the most that a model may have; fetch the "
                "model again",
                file=file,
            )


def check_proportions(
    family: Any, config: PretrainedConfig, weights: Path, shards: list[str], *, trust_remote_code: bool
) -> None:
    """Refuse a config that asks for more than the weight files hold.

    Args:
        family: transformers' class that makes the model.
        shards: weight files that an index lists.

    Raises:
        BrokenFiles: it does, or a header of the weight files lies.
    """
    held = _held_by(weights, shards)
    if held is None:
        return
    try:
        needed, buffer_bytes = _needed(family, config, trust_remote_code=trust_remote_code)
    except Exception as error:  # noqa: BLE001  # loading makes the model in the same way, and says what is wrong with it
        log.info("model.not_counted", reason=type(error).__name__)
        return
    share = _PACKED_SHARE if getattr(config, "quantization_config", None) else _SPARE_SHARE
    if needed > share * held.elements + _SPARE:
        raise BrokenFiles(
            f"config.json describes a model of {needed} parameters, and the weight files hold {held.elements}: they "
            "are not of one model; fetch the model again",
            file="config.json",
        )
    if buffer_bytes > max(_MOST_BUFFER_BYTES, held.size_bytes):
        raise BrokenFiles(
            f"config.json describes a model with computed tables of {buffer_bytes} bytes, and its weight files have "
            f"{held.size_bytes}: they are not of one model; fetch the model again",
            file="config.json",
        )


def _counts(config: Json) -> Iterator[tuple[str, float]]:
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _counts(value)
        elif _REPEATED.search(key):
            numbers = value if isinstance(value, list) else [value]
            yield from ((key, number) for number in numbers if isinstance(number, int | float))


def _needed(family: Any, config: PretrainedConfig, *, trust_remote_code: bool) -> tuple[int, int]:
    """Parameters of the model that a config describes, and bytes of its buffers."""
    config = copy.deepcopy(config)  # making a model writes into its config
    with torch.device("meta"), no_init_weights(), meta_device_safe_creation_ops():
        model = family.from_config(config, trust_remote_code=trust_remote_code)
    model.tie_weights()
    own = dict(model.named_parameters())
    unused = unused_weights(set(own))
    elements = sum(parameter.numel() for name, parameter in own.items() if name not in unused)
    return elements, sum(buffer.numel() * buffer.itemsize for buffer in model.buffers())


def _held_by(weights: Path, shards: list[str]) -> Held | None:
    """None where the files are not there: loading says which."""
    names = ["model.safetensors"] if (weights / "model.safetensors").exists() else shards
    try:
        sizes = {name: (weights / name).stat().st_size for name in names}
        elements = sum(_elements(weights, name, size) for name, size in sizes.items())
    except OSError:
        return None
    if names:
        return Held(elements, sum(sizes.values()))
    size_bytes = sum(path.stat().st_size for path in weights.glob("pytorch_model*.bin"))
    return Held(size_bytes // 2, size_bytes) if size_bytes else None


def _elements(weights: Path, name: str, size_bytes: int) -> int:
    try:
        return sum(tensor.elements for tensor in read_header(name, size_bytes, partial(read_range, weights)))
    except BrokenFiles as error:
        raise BrokenFiles(f"{error}; fetch the model again", file=name) from error
