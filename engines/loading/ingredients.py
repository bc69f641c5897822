"""Reads from a model folder what decides its vectors (`engines/space.py`), without building the model.

Only content counts: not names of folders and files, nor what configurations say about training, heads and versions.
What is not understood counts as it is written: a fingerprint that changes needlessly costs time, one that does not
change costs a wrong index.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from engines.errors import BadModel, BrokenFiles, FilesChanged
from engines.hub.content_digests import ContentDigests, GoOn, WeightFile
from engines.hub.file_selection import ADAPTER_WEIGHTS, COLBERT_LINEAR, SPARSE_LINEAR, WEIGHTS
from engines.loading.dtype import automatic_dtype
from engines.loading.folder import Folder, ModuleRef, read_json
from engines.loading.module_settings import Json, pooling_of
from engines.loading.routes import ROUTER, kinds_of, read_routes
from engines.space import MODULES, TRUNCATION_SIDE, Ingredients
from engines.spec import ModelSpec

_DIGITS = 32
"""Hex digits of a digest: 128 bits."""

_INERT_CONFIG = frozenset({
    "_attn_implementation", "_attn_implementation_autoset", "_name_or_path", "architectures",
    "attention_dropout", "attention_probs_dropout_prob", "attn_pdrop", "chunk_size_feed_forward", "classifier_bias",
    "classifier_config", "classifier_dropout", "classifier_dropout_prob", "dropout", "dropout_rate", "dtype",
    "embd_pdrop", "embedding_dropout", "finetuning_task", "gradient_checkpointing", "hidden_dropout",
    "hidden_dropout_prob", "id2label", "initializer_factor", "initializer_range", "label2id", "layerdrop",
    "matryoshka_dimensions", "matryoshka_dims", "mlp_dropout", "name_or_path", "num_labels", "output_attentions",
    "output_hidden_states", "problem_type", "resid_pdrop", "return_dict", "task_specific_params",
    "tie_word_embeddings", "torch_dtype", "transformers_version", "transformers.js_config", "use_cache",
})  # fmt: skip
"""Keys of transformers' configs that no vector depends on: training, heads, versions, and what has a name of its own
here. `architectures` names heads: the model is built without."""

_INERT_TOKENIZER = frozenset({
    "_commit_hash", "auto_map", "backend", "cache_dir", "chat_template", "clean_up_tokenization_spaces", "device_map",
    "is_local", "local_files_only", "max_length", "model_max_length", "name_or_path", "pad_to_multiple_of",
    "pad_token_type_id", "padding", "padding_side", "processor_class", "special_tokens_map_file", "stride",
    "tokenizer_file", "truncation", "truncation_side", "truncation_strategy", "trust_remote_code", "use_fast",
})  # fmt: skip
"""Keys of tokenizer_config.json that no vector depends on, or that have a name of their own here."""

_NAMED_TRANSFORMER = frozenset({
    "config_args", "config_kwargs", "do_lower_case", "max_seq_length", "modality_config", "model_args", "model_kwargs",
    "module_output_name", "processor_kwargs", "tokenizer_args", "transformer_task",
})  # fmt: skip
_NAMED_MODEL = frozenset({
    "__version__", "activation_fn", "default_prompt_name", "matryoshka_dimensions", "matryoshka_dims", "prompts",
    "similarity_fn_name", "truncate_dim",
})  # fmt: skip
"""Keys of sentence-transformers' configs that have a name of their own here, that `folder.py` checks, or that no
vector depends on. Others count, such as the query expansion of models with vectors of tokens."""

_VOCABULARIES = (
    "vocab.txt", "vocab.json", "merges.txt", "spiece.model", "sentencepiece.bpe.model", "tokenizer.model", "bpe.codes",
)  # fmt: skip
"""Files of tokenizers that are read where there is no tokenizer.json."""

_INERT_ADAPTER = frozenset({
    "auto_mapping", "base_model_name_or_path", "inference_mode", "lora_dropout", "peft_version", "revision",
    "task_type",
})  # fmt: skip
"""Keys of adapter_config.json that no vector depends on: names, training and versions."""

_QUERY_SIDE = "query side "
"""Begins the names of ingredients of a Router's queries, which pass through modules of their own."""

_MODULE_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_OTHER_HEADS = {"sparse:weights": SPARSE_LINEAR, "multi_vector:weights": COLBERT_LINEAR}
"""Heads of bge-m3 for its other outputs, by the ingredient's name."""


class FolderWeights(Struct, frozen=True):
    """The weight files of a folder as they are now, by the ingredient that they make."""

    by_name: dict[str, tuple[WeightFile, ...]]


def list_weights(folder: Folder) -> FolderWeights:
    """Lists the weight files; quick, so that it can be done before a load begins.

    Raises:
        OSError, BadModel: a file is missing, or a Router's routes are not understood.
    """
    if kinds_of(folder) == [ROUTER]:
        routes = read_routes(folder)
        sides = {"": list_weights(routes.document), _QUERY_SIDE: list_weights(routes.query)}
        return FolderWeights(
            {side + name: files for side, each in sides.items() for name, files in each.by_name.items()}
        )
    names = {"weights": _transformer_weights(folder.weights)}
    if folder.adapter is not None:
        found = (folder.adapter / name for name in ADAPTER_WEIGHTS)
        names["adapter weights"] = [
            next((path for path in found if path.exists()), folder.adapter / ADAPTER_WEIGHTS[0])
        ]
    for index, ref in _other_modules(folder):
        path = next(
            (folder.root / ref.file(name) for name in _MODULE_WEIGHTS if (folder.root / ref.file(name)).exists()), None
        )
        if path is not None and ref.path:
            names[f"module {index} ({ref.kind}) weights"] = [path]
    for name, file in _OTHER_HEADS.items():
        if (folder.weights / file).exists():
            names[name] = [folder.weights / file]
    return FolderWeights({name: tuple(map(WeightFile.at, paths)) for name, paths in names.items()})


def unchanged_ingredients(folder: Folder, spec: ModelSpec, digests: ContentDigests) -> Callable[[], Ingredients] | None:
    """Stamps a folder's files before a load, and returns what reads their ingredients after it; None: one is missing.

    What is returned also raises `FilesChanged` where any file was written or replaced since: another one may have been
    loaded than the one whose hash is known, and its weights must not be kept under that hash.
    """
    try:
        weights, stamps = list_weights(folder), _stamps(folder)
    except (OSError, BadModel):
        return None

    def read() -> Ingredients:
        found = read_ingredients(folder, spec, weights, digests)
        if (list_weights(folder), _stamps(folder)) != (weights, stamps):
            raise FilesChanged(f"files of {spec.model_id} were written since it began to load")
        return found

    return read


def _stamps(folder: Folder) -> set[WeightFile]:
    """Returns the files of a model and of its modules as they are now."""
    roots = {folder.root, folder.weights, *((folder.adapter,) if folder.adapter is not None else ())}
    found = (path for root in roots for depth in ("*", "*/*") for path in root.glob(depth))
    return {WeightFile.at(path) for path in found if path.is_file()}


def read_ingredients(
    folder: Folder, spec: ModelSpec, weights: FolderWeights, digests: ContentDigests, go_on: GoOn = lambda: True
) -> Ingredients:
    """Reads and hashes everything but the class of arithmetic (`with_numeric`); blocks on the disk.

    Raises:
        BrokenFiles, FilesChanged, OSError: as `ContentDigests.digest`.
    """
    values = _stated(folder, spec)
    if kinds_of(folder) == [ROUTER]:
        routes = read_routes(folder)
        values = _stated(routes.document, spec) | {"side without a name": routes.default}
        values |= {_QUERY_SIDE + name: value for name, value in _stated(routes.query, spec).items()}
    if spec.trust_remote_code:
        values["code"] = _code(folder)
    hashes = {name: digests.digest(files, go_on)[:_DIGITS] for name, files in weights.by_name.items()}
    return Ingredients(values | hashes)


def _stated(folder: Folder, spec: ModelSpec) -> dict[str, str]:
    """Returns what configurations and the registry decide."""
    values = _config(folder) | _tokenizer(folder) | _modules(folder, spec)
    values["max_tokens"] = str(_stated_max_tokens(folder, spec))
    values[TRUNCATION_SIDE] = _truncation_side(folder, spec)
    if folder.adapter is not None:
        values["adapter"] = _digest(_without(read_json(folder.adapter, "adapter_config.json") or {}, _INERT_ADAPTER))
    return values


def expected_dtype(folder: Folder, spec: ModelSpec, device_kind: str) -> str:
    """Returns the dtype that a model's weights would have on a `cpu` or `cuda` device, before it is loaded."""
    if _is_static(folder):
        return "float32"
    if spec.dtype != "auto":
        return spec.dtype
    config = read_json(folder.weights, "config.json") or {}
    return automatic_dtype(str(config.get("model_type", "")), device_kind, None)


def _is_static(folder: Folder) -> bool:
    return bool(folder.modules) and folder.modules is not None and folder.modules[0].kind == "StaticEmbedding"


def _transformer_weights(root: Path) -> list[Path]:
    found = next((name for name in WEIGHTS if (root / name).exists()), WEIGHTS[0])
    if not found.endswith(".index.json"):
        return [root / found]
    shards = (read_json(root, found) or {}).get("weight_map")
    if not isinstance(shards, dict):
        raise BrokenFiles(f"{found} has no weight_map; fetch the model again", file=found)
    return [root / name for name in sorted(set(map(str, shards.values())))]


def _other_modules(folder: Folder) -> Iterator[tuple[int, ModuleRef]]:
    return ((index, ref) for index, ref in enumerate(folder.modules or ()) if index)


# ---- configurations ----


def _config(folder: Folder) -> dict[str, str]:
    values = {}
    if not _is_static(folder):
        values["config"] = _digest(_without(read_json(folder.weights, "config.json") or {}, _INERT_CONFIG))
    options = {
        "config": folder.transformer.get("config_kwargs") or folder.transformer.get("config_args") or {},
        "tokenizer": folder.transformer.get("processor_kwargs") or folder.transformer.get("tokenizer_args") or {},
    }
    given = {name: _without(each, {"trust_remote_code", "model_max_length"}) for name, each in options.items()}
    if any(given.values()):
        values["transformer options"] = _digest(given)
    others = {key: value for key, value in folder.transformer.items() if value and key not in _NAMED_TRANSFORMER}
    if others:
        values["transformer"] = _digest(others)
    stated = read_json(folder.root, "config_sentence_transformers.json") or {}
    kind = {key: value for key, value in stated.items() if value and key not in _NAMED_MODEL}
    if kind != {"model_type": "SentenceTransformer"} and kind:
        values["model options"] = _digest(kind)
    if folder.late is not None and folder.modules is None:  # its settings stand in `artifact.metadata`
        values["late interaction"] = _digest(msgspec.to_builtins(folder.late))
    return values


def _modules(folder: Folder, spec: ModelSpec) -> dict[str, str]:
    """Returns the chain of modules, the pooling, and the configuration of each other module."""
    kinds = [ref.kind for ref in folder.modules or () if ref.kind != "Dropout"] or ["Transformer", "Pooling"]
    values = {"pooling": "+".join(spec.pooling or ("mean",))}
    if "Pooling" not in kinds:
        kinds.insert(1, "Pooling")  # as the loader adds it
    values[MODULES] = " > ".join(kinds)
    for index, ref in _other_modules(folder):
        config = read_json(folder.root, ref.file("config.json")) if ref.path else {}
        if ref.kind == "Pooling":
            stated = pooling_of(config or {}, ref.file("config.json"), is_overridden=spec.pooling is not None)
            values["pooling"] = "+".join(spec.pooling or stated)
            if not (config or {}).get("include_prompt", True):
                values["pooling of the prompt"] = "excluded"
        elif ref.kind not in ("Dropout", "Normalize") or config:
            values[f"module {index} ({ref.kind})"] = _digest(config or {})
    return values


def _stated_max_tokens(folder: Folder, spec: ModelSpec) -> int | None:
    """Returns the longest input as it is stated; a position table may cap it, which is among the weights.

    By the rule of `engines/loading/tokenizer.py`.
    """
    tokenizer = read_json(folder.tokenizer, "tokenizer_config.json") or {}
    if _is_static(folder):
        cut = (_tokenizer_json(folder) or {}).get("truncation")
        stated = json.loads(bytes(cut)) if cut else None
        return spec.max_tokens or (stated or {}).get("max_length")
    options = folder.transformer.get("processor_kwargs") or folder.transformer.get("tokenizer_args") or {}
    stated = spec.max_tokens or options.get("model_max_length") or folder.transformer.get("max_seq_length")
    if stated is not None:
        return int(stated)
    config = read_json(folder.weights, "config.json") or {}
    limits = (tokenizer.get("model_max_length"), config.get("max_position_embeddings"))
    return min((int(limit) for limit in limits if isinstance(limit, int | float) and limit > 0), default=None)


def _truncation_side(folder: Folder, spec: ModelSpec) -> str:
    if spec.truncate in ("start", "end"):
        return spec.truncate
    if _is_static(folder):
        cut = (_tokenizer_json(folder) or {}).get("truncation")
        side = (json.loads(bytes(cut)) or {}).get("direction") if cut else None
        return "start" if str(side).lower() == "left" else "end"
    side = (read_json(folder.tokenizer, "tokenizer_config.json") or {}).get("truncation_side")
    return "start" if side == "left" else "end"


# ---- the tokenizer ----


def _tokenizer(folder: Folder) -> dict[str, str]:
    """Returns what the tokenizer's files decide, part by part.

    The parts of tokenizer.json are compared as they are written: reading a vocabulary of 30 MB into objects would hold
    the GIL for most of a second.
    """
    values = {"lower-casing": str(bool(folder.transformer.get("do_lower_case"))).lower()}
    content = _tokenizer_json(folder)
    if content is None:
        paths = [folder.tokenizer / name for name in _VOCABULARIES]
        found = [(path.name, _file_digest(path)) for path in paths if path.exists()]
        values["vocabulary"] = _digest(found)
    else:
        for name, key in _TOKENIZER_PARTS.items():
            values[name] = hashlib.sha256(bytes(content.get(key, b"null"))).hexdigest()[:_DIGITS]
    if _is_static(folder):
        return values
    config = read_json(folder.tokenizer, "tokenizer_config.json") or {}
    values["tokenizer options"] = _digest(_without(config, _INERT_TOKENIZER))
    for name in ("added_tokens.json", "special_tokens_map.json"):
        given = read_json(folder.tokenizer, name)
        if given:
            values[name.removesuffix(".json").replace("_", " ")] = _digest(given)
    return values


_TOKENIZER_PARTS = {
    "vocabulary": "model", "added tokens": "added_tokens", "normalizer": "normalizer", "words": "pre_tokenizer",
    "special tokens around texts": "post_processor",
}  # fmt: skip
"""Parts of tokenizer.json by the ingredient's name."""


def _tokenizer_json(folder: Folder) -> dict[str, msgspec.Raw] | None:
    path = folder.tokenizer / "tokenizer.json"
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, msgspec.Raw])
    except FileNotFoundError:
        return None
    except msgspec.DecodeError as error:
        raise BrokenFiles(
            "tokenizer.json is not a JSON object; fetch the model again", file="tokenizer.json"
        ) from error


def _code(folder: Folder) -> str:
    """Returns the digest of the repository's own code; its name is part of it, as code imports code by name."""
    places = dict.fromkeys((folder.root, folder.weights))
    files = sorted({path for place in places for path in place.glob("*.py")})
    return _digest([(path.name, _file_digest(path)) for path in files])


# ---- digests ----


def _without(content: Any, keys: frozenset[str] | set[str]) -> Any:
    """Returns a JSON value without these keys, at any depth."""
    if isinstance(content, dict):
        return {key: _without(value, keys) for key, value in content.items() if key not in keys}
    return [_without(value, keys) for value in content] if isinstance(content, list) else content


def _digest(content: Json | Sequence[object]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:_DIGITS]


def _file_digest(path: Path) -> str:
    with path.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
