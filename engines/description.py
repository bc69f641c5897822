"""Describes a model from its configurations and its model card, without weights and without torch.

Like `engines/planner.py`, it is for commands that run without a server.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from msgspec import Struct, structs

from engines.errors import HubUnreachable, OfflineMode, UnsupportedModel
from engines.hub.file_selection import ADAPTER_CONFIG
from engines.hub.local_folder import is_local
from engines.hub.store import ModelStore
from engines.loading.folder import Folder, outputs_of, read_folder, read_json
from engines.loading.module_settings import Json
from engines.loading.routes import read_routes
from engines.loading.score_forms import score_form
from engines.planner import native_width
from engines.spec import ModelSpec, Output, PoolingMode, Task, parts_of

__all__ = ["Description", "base_of", "describe"]

_DEFAULT_LABELS = 2
"""Labels of a transformers config that states none."""

_DEFAULT_POOLING: PoolingMode = "mean"
"""sentence-transformers' pooling for a folder without modules.json."""

_NO_LIMIT = 1_000_000
"""Tokenizers write 1e30 for "no limit"."""

_MAX_FRONT_MATTER_CHARS = 64 * 1024
_MAX_LICENSE_CHARS = 100
_LICENSES = {"apache-2.0": "Apache-2.0", "mit": "MIT", "gemma": "Gemma"}
"""Names of licences on the hub, and as people write them."""

_PARAMETER_BYTES = 4


class Description(Struct, frozen=True, kw_only=True):
    """The facts that a model's own files state; None and empty: they do not.

    `outputs`: of a model that embeds, as in `ModelInfo`. `prompts`: without empty ones. `matryoshka_widths`: below the
    full width. `assumed_pooling`: for a folder without modules.json, which states no pooling. `num_parameters`:
    floating-point weights in the files.
    """

    task: Task = "embed"
    outputs: tuple[Output, ...] = ()
    width: int | None = None
    max_tokens: int | None = None
    num_parameters: int | None = None
    prompts: dict[str, str] = {}
    default_prompt: str | None = None
    matryoshka_widths: tuple[int, ...] = ()
    assumed_pooling: PoolingMode | None = None
    license: str = ""


def describe(store: ModelStore, spec: ModelSpec) -> Description:
    """Describes a model of a folder, a package or a hub. Blocks: it may read kilobytes from the hub.

    Raises:
        SourceError, BrokenFiles: the files cannot be read.
        UnsupportedModel: the model cannot be served; the message names the reason.
    """
    weight_bytes = store.weight_bytes(spec, "cpu")
    num_parameters = weight_bytes // _PARAMETER_BYTES if weight_bytes else None
    with ExitStack() as stack:
        root, *adapters = [stack.enter_context(_configurations(store, part)) for part in parts_of(spec)]
        return _describe_folder(root, next(iter(adapters), None), spec, num_parameters)


def base_of(store: ModelStore, spec: ModelSpec) -> tuple[str, str | None] | None:
    """Returns the source and revision of the model that a source is a PEFT adapter of; None if it is none.

    Raises:
        As `describe`.
    """
    with _configurations(store, spec) as root:
        return adapter_base(root)


def adapter_base(folder: Path) -> tuple[str, str | None] | None:
    """Returns the model that the adapter in a folder belongs to, and its revision, if stated; None for no adapter.

    Raises:
        BrokenFiles, UnsupportedModel: as `read_folder`; or the adapter does not name its model.
    """
    stated = read_json(read_folder(folder).weights, ADAPTER_CONFIG)
    if stated is None:
        return None
    base, revision = stated.get("base_model_name_or_path"), stated.get("revision")
    if not isinstance(base, str) or not base:
        raise UnsupportedModel(
            f"{ADAPTER_CONFIG} does not name the base model of the adapter: add it to the registry by hand, with the "
            "base model as `source`"
        )
    return base, revision if isinstance(revision, str) else None


@contextmanager
def _configurations(store: ModelStore, spec: ModelSpec) -> Iterator[Path]:
    """Gives a folder with the configurations and the README of a source; those of a hub are read into a new one."""
    if is_local(spec.source):
        yield Path(store.fetch(spec, lambda *_: None).path)
        return
    with TemporaryDirectory() as folder:
        try:
            store.copy_description(spec, Path(folder))
        except (HubUnreachable, OfflineMode):
            files = store.locate(spec)
            if files is None:
                raise
            yield Path(files.path)
        else:
            yield Path(folder)


def _describe_folder(root: Path, adapter: Path | None, spec: ModelSpec, num_parameters: int | None) -> Description:
    folder = read_folder(root, adapter)
    if folder.is_sparse_encoder:
        read_routes(folder)
    width = native_width(root, spec, adapter)
    task = _task_of(folder, spec)
    facts = Description(
        task=task,
        width=width,
        max_tokens=_max_tokens(folder),
        num_parameters=num_parameters,
        license=(_read_license(adapter / "README.md") if adapter else "") or _read_license(root / "README.md"),
    )
    if task != "embed":
        return facts
    return structs.replace(
        facts,
        outputs=outputs_of(folder),
        prompts={name: text for name, text in folder.prompts.items() if text},
        default_prompt=folder.default_prompt,
        matryoshka_widths=tuple(sorted({each for each in folder.widths if width is None or each < width})),
        assumed_pooling=None if folder.modules or folder.late else _DEFAULT_POOLING,
    )


def _task_of(folder: Folder, spec: ModelSpec) -> Task:
    """Returns the task that the configurations state: a classifier with one label scores pairs."""
    form = score_form(folder, spec)
    if form is None:
        return "embed"
    config = read_json(folder.weights, "config.json") or {}
    return "classify" if form == "classifier" and _num_labels(config) > 1 else "rerank"


def _num_labels(config: Json) -> int:
    labels = config.get("id2label")
    number = config.get("num_labels")
    if isinstance(labels, dict) and labels:
        return len(labels)
    return number if isinstance(number, int) else _DEFAULT_LABELS


def _max_tokens(folder: Folder) -> int | None:
    """Returns the longest input that the files state: the folder's own limit, else the tokenizer's or the config's."""
    stated = folder.transformer.get("max_seq_length")
    if isinstance(stated, int):
        return stated
    config = read_json(folder.weights, "config.json") or {}
    tokenizer = read_json(folder.weights, "tokenizer_config.json") or {}
    limits: list[Any] = [tokenizer.get("model_max_length"), config.get("max_position_embeddings")]
    known = [int(limit) for limit in limits if isinstance(limit, int | float) and 0 < limit < _NO_LIMIT]
    return min(known, default=None)


def _read_license(card: Path) -> str:
    """Returns the licence in the front matter of a model card; an empty text without one."""
    try:
        text = card.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""
    start, _, rest = text.partition("---\n")
    front_matter, end, _ = rest.partition("\n---")
    if start.strip() or not end or len(front_matter) > _MAX_FRONT_MATTER_CHARS:
        return ""
    try:
        fields = yaml.safe_load(front_matter)
    except (yaml.YAMLError, RecursionError, ValueError):
        return ""
    if not isinstance(fields, dict):
        return ""
    name = fields.get("license")
    if name == "other":
        name = fields.get("license_name") or name
    if not isinstance(name, str) or len(name) > _MAX_LICENSE_CHARS or not name.isprintable():
        return ""
    return _LICENSES.get(name.lower(), name)
