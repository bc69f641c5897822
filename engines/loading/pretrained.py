"""Makes transformers' models with the weights of a folder, read by `WeightReader` where that may be."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PretrainedConfig
from transformers.models.auto.auto_factory import _get_model_class

from engines.hub.local_folder import is_writable_in_place
from engines.loading.folder import Folder, read_json
from engines.loading.weight_reader import WeightReader
from engines.models.load_records import LoadRecords
from engines.spec import ModelSpec
from engines.types import fingerprint

_INDEX = "model.safetensors.index.json"


class ModelSource(NamedTuple):
    """What a model is made from; `shards` are the weight files that an index lists."""

    folder: Folder
    spec: ModelSpec
    config: PretrainedConfig
    device: torch.device
    shards: list[str]

    @property
    def files(self) -> list[str]:
        """The safetensors files, as transformers chooses them; none where the weights are pickled."""
        return ["model.safetensors"] if (self.folder.weights / "model.safetensors").exists() else self.shards


class Earlier(NamedTuple):
    """What is known from earlier loads, and what is to be done beside the reading of weights.

    `begun` is called when all calls that read ahead are under way, so that nothing holds these up.
    """

    loads: LoadRecords
    begun: Callable[[], None] = lambda: None


class KnownTensors:
    """Knows from an earlier load of the same files which stored tensors a model is made of.

    Args:
        source, model_class, dtype: of the model.
        earlier: loads.
    """

    def __init__(self, source: ModelSource, model_class: Any, dtype: torch.dtype, earlier: Earlier) -> None:
        self._records, self.begun = earlier
        self._key = "" if source.spec.trust_remote_code else _tensors_key(source, model_class, dtype)
        self.names = self._records.tensor_names(self._key) if self._key else ()

    def put(self, names: Iterable[str]) -> None:
        """Keeps the names of the tensors that were read."""
        if self._key and not self.names:
            self._records.put_tensor_names(self._key, names)


def _tensors_key(source: ModelSource, model_class: Any, dtype: torch.dtype) -> str:
    """Returns what decides which stored tensors are read; empty where a file is missing, which loading reports."""
    try:
        stats = [(file, (source.folder.weights / file).stat()) for file in source.files]
    except OSError:
        return ""
    stamps = [(file, stat.st_size, stat.st_mtime_ns) for file, stat in stats]
    return fingerprint([*stamps, model_class, dtype, source.config.to_json_string(use_diff=False)]) if stamps else ""


def load_weights(
    source: ModelSource, model_class: Any, dtype: torch.dtype, known: KnownTensors
) -> tuple[Any, dict[str, Any]]:
    """Makes a model with its weights; returns it with transformers' report of what was missing. Three cases:

    1. safetensors that may be written in place: read straight into their places;  2. other safetensors, those on the
    way to a GPU, where no GPU has run the reader yet, and what needs transformers' own way (its own code, quantised
    files): transformers maps them, or reads them where they may be written in place;  3. pickled weights: transformers
    maps them in any case.
    """
    folder, spec, config, device, _ = source
    options = {"dtype": dtype, "local_files_only": True, "output_loading_info": True}
    is_copied = device.type == "cpu" and is_writable_in_place(spec.source)
    library = _library_class(model_class, config, spec) if is_copied else None
    if library is not None and source.files:
        kind, own_config = library
        with WeightReader(folder.weights, source.files, device) as reader:
            if reader.can_read_all:
                reader.read_ahead(known.names, dtype)
                known.begun()
                model, report = kind.from_pretrained(None, config=own_config, state_dict=reader.tensors(), **options)
                known.put(reader.names_read)
                return model, report  # (1)
    known.begun()
    model, report = model_class.from_pretrained(
        folder.weights, config=config, trust_remote_code=spec.trust_remote_code, disable_mmap=is_copied or None,
        **options,
    )  # fmt: skip
    if is_copied and ".bin" in weight_file_name(folder.weights):
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data = tensor.data.clone()  # (3)
    return model, report  # (2)


def _library_class(model_class: Any, config: PretrainedConfig, spec: ModelSpec) -> tuple[Any, PretrainedConfig] | None:
    """Returns transformers' own class for a config, and the part of the config that it takes, as its auto classes do.

    None: the model needs the auto class itself, or more of its files than the weights.
    """
    is_plain = not spec.trust_remote_code and getattr(config, "quantization_config", None) is None
    if not is_plain or getattr(config, "transformers_weights", None) or type(config).extra_files:
        return None
    if type(config) not in model_class._model_mapping:
        return None
    kind: Any = _get_model_class(config, model_class._model_mapping)  # type: ignore[no-untyped-call]  # untyped upstream
    if not kind.__module__.startswith("transformers."):
        return None
    part = config.sub_configs.get("text_config")
    return kind, config.get_text_config() if part is not None and kind.config_class == part else config


def weight_file_name(weights: Path) -> str:
    """Returns the name of the folder's weight file or index, for messages."""
    names = ("model.safetensors", _INDEX, "pytorch_model.bin", "pytorch_model.bin.index.json")
    return next((name for name in names if (weights / name).exists()), names[0])


def listed_shards(weights: Path) -> list[str]:
    """Returns the safetensors files that the folder's index lists; none without an index."""
    listed = read_json(weights, _INDEX) or {}
    return sorted(set(listed.get("weight_map", {}).values()))
