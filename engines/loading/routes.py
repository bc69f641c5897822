"""Finds out from a SparseEncoder's JSON files of which modules each side of a search is made. Loads no weights.

A folder has one chain of modules: a masked language model and `SpladePooling`, or a `SparseStaticEmbedding`; or a
`Router` with such a chain for each side, of which that of queries may need no transformer.
"""

import ast
from typing import Any, NamedTuple

from msgspec import structs

from engines.errors import BrokenFiles, UnsupportedModel
from engines.hub.file_selection import AUTO_ENCODER, ROUTER_CONFIGS, TRANSFORMERS
from engines.loading.folder import Folder, module_ref, read_transformer, require_json
from engines.loading.module_settings import Json, check_options
from engines.spec import Side

ROUTER = "Router"
"""The module that chooses the modules of each side."""
STATIC = "SparseStaticEmbedding"
"""A table of weights, without a transformer."""

_FILL_MASK = {"method": "forward", "method_output_name": "logits"}


class Routes(NamedTuple):
    """The folder of each side of a search, and the side of texts that name none."""

    query: Folder
    document: Folder
    default: Side


def read_routes(folder: Folder) -> Routes:
    """Returns the folder of each side, as sentence-transformers' `Router` chooses one by the task; the same without.

    Raises:
        BrokenFiles, UnsupportedModel.
    """
    if folder.modules is None:
        raise UnsupportedModel(
            "the folder of a SparseEncoder has no modules.json: save it again with sentence-transformers 5 or newer"
        )
    routes = _read_router(folder) if kinds_of(folder) == [ROUTER] else Routes(folder, folder, "document")
    _check_chains(routes)
    return routes


def kinds_of(folder: Folder) -> list[str]:
    """Returns the kinds of a folder's modules."""
    return [ref.kind for ref in folder.modules or ()]


def _check_chains(routes: Routes) -> None:
    query, document = kinds_of(routes.query), kinds_of(routes.document)
    if routes.query != routes.document and query != [STATIC]:
        raise UnsupportedModel(
            f"the Router's queries pass through {', '.join(query)}; only a {STATIC} is supported for queries that are "
            "not read as documents are"
        )
    if document == query == [STATIC]:
        return
    if len(document) != 2 or document[0] not in TRANSFORMERS or document[1] != "SpladePooling":
        raise UnsupportedModel(
            f"the model is made of {', '.join(document)}; of a SparseEncoder, a Transformer with SpladePooling, one "
            f"that ends with a {AUTO_ENCODER}, and a {STATIC} are supported"
        )
    _check_transformer(routes.document.transformer, document[0])


def _read_router(folder: Folder) -> Routes:
    assert folder.modules is not None, "it has a Router"
    name = next((name for name in map(folder.modules[0].file, ROUTER_CONFIGS) if (folder.root / name).exists()), "")
    config = require_json(folder.root, name or folder.modules[0].file(ROUTER_CONFIGS[0]))
    try:
        names: dict[str | None, str] = {side: _route_name(config, side) for side in (None, "query", "document")}
        routes = {side: _route(folder, config, name) for side, name in names.items()}
    except (KeyError, TypeError, AttributeError, ValueError, SyntaxError) as error:
        raise BrokenFiles(
            f"{name} does not describe routes ({type(error).__name__}); fetch the model again", file=name
        ) from error
    if names[None] not in (names["query"], names["document"]):
        raise UnsupportedModel(
            f"{name} has the default route {names[None]!r}, which neither queries nor documents take: not supported"
        )
    default: Side = "document" if names[None] == names["document"] else "query"
    return Routes(routes["query"], routes["document"], default)


def _route_name(config: Json, task: str | None) -> str:
    """Returns the route of texts by sentence-transformers' rule (`Router._resolve_route`)."""
    parameters, routes = config.get("parameters") or {}, config["structure"]
    mappings: dict[Any, str] = {
        ast.literal_eval(key): route for key, route in (parameters.get("route_mappings") or {}).items()
    }
    wanted = ((task, "text"), (task, None), (None, "text"), (None, None))
    name = next((mappings[key] for key in wanted if key in mappings), None)
    if name is None:
        name = next((key for key in (task, "text") if key in routes), None)
    if name is None and task is None:
        name = parameters.get("default_route")
        if name is None and parameters.get("allow_empty_key", True):
            name = next(iter(routes))
    if name not in routes:
        raise UnsupportedModel(
            f"the Router has no route for {task or 'texts without a task'}; it has {', '.join(routes)}"
        )
    return str(name)


def _route(folder: Folder, config: Json, name: str) -> Folder:
    """Returns the folder of one route, as though it were a model of its own."""
    assert folder.modules is not None, "it has a Router"
    start = folder.modules[0].path
    refs = tuple(
        module_ref(config["types"][key], "/".join(part for part in (start, key) if part))
        for key in config["structure"][name]
    )
    transformer = read_transformer(folder.root, refs[0].path, is_checked=False)
    return structs.replace(folder, modules=refs, transformer=transformer)


def _check_transformer(config: Json, kind: str) -> None:
    """Rejects settings of the Transformer module that give something else than the logits of a masked language model.

    Raises:
        UnsupportedModel: naming the key.
    """
    name = "sentence_bert_config.json"
    check_options(config, name)
    task = config.get("transformer_task", "fill-mask" if kind == "MLMTransformer" else "feature-extraction")
    modalities = config.get("modality_config") or {"text": _FILL_MASK}
    output = config.get("module_output_name") or "token_embeddings"
    if task != "fill-mask" or modalities.get("text") != _FILL_MASK or output != "token_embeddings":
        raise UnsupportedModel(
            f"{name} reads {modalities.get('text')} of the task {task!r} as {output!r}; SpladePooling needs the logits "
            "of the task 'fill-mask'"
        )
