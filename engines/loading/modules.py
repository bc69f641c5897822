"""Builds the embedding head from the modules after the transformer: pooling, dense, layer norm, normalise.

The head turns packed hidden states `[T, H]` into one float32 vector per text `[n, D]`. Each step reads and writes named
tensors, as sentence-transformers' `features` do: `token_embeddings` `[T, *]` and `sentence_embedding` `[n, *]`.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, linear

from engines.errors import BrokenFiles, UnsupportedModel
from engines.layers.pooling import normalize
from engines.loading.folder import Folder, ModuleRef, read_json, require_json
from engines.loading.module_settings import Json, pooling_of
from engines.loading.module_weights import ModuleWeights, read_module_weights
from engines.models.head import SENTENCE, TOKENS, EmbeddingHead
from engines.spec import PoolingMode


def build_head(
    folder: Folder, hidden_size: int, device: torch.device, pooling: tuple[PoolingMode, ...] | None
) -> EmbeddingHead:
    """Builds the embedding head of a folder.

    Args:
        pooling: modes that replace the folder's own; without a `modules.json` they are the whole head.

    Raises:
        BrokenFiles, UnsupportedModel.
    """
    head = EmbeddingHead(hidden_size, pooling)
    modules = (folder.modules or ())[1:]
    if not any(ref.kind == "Pooling" for ref in modules):
        _add_unstated_pooling(head, folder, pooling)
    for ref in modules:
        build = _BUILDERS.get(ref.kind)
        if build is None:
            raise UnsupportedModel(
                f"modules.json names the unsupported module {ref.kind!r}; supported: {', '.join(_BUILDERS)}; use a "
                "model that is made of these"
            )
        build(head, folder.root, ref, device)
    return head


def build_token_chain(
    folder: Folder, hidden_size: int, device: torch.device, refs: Sequence[ModuleRef]
) -> EmbeddingHead:
    """Builds the modules that turn hidden states into vectors of tokens, `[k, H]` to `[k, W]`, of any tokens.

    Raises:
        BrokenFiles, UnsupportedModel.
    """
    chain = EmbeddingHead(hidden_size)
    chain.source = chain.target = TOKENS
    for ref in refs:
        _TOKEN_BUILDERS[ref.kind](chain, folder.root, ref, device)
    if others := chain.widths.keys() - {TOKENS}:
        raise UnsupportedModel(
            f"a module in modules.json gives {min(others)!r}, but vectors of tokens are read from {TOKENS!r}; fetch "
            "the model again"
        )
    return chain


def _add_unstated_pooling(head: EmbeddingHead, folder: Folder, pooling: tuple[PoolingMode, ...] | None) -> None:
    """Adds mean pooling for a folder without `modules.json` and for static embeddings, as sentence-transformers does.

    Raises:
        UnsupportedModel: neither `modules.json` nor the registry states a pooling.
    """
    if folder.modules is None or folder.modules[0].kind == "StaticEmbedding":
        head.add_pooling(("mean",))
    elif pooling is not None:
        head.add_pooling(pooling)
    else:
        raise UnsupportedModel(
            "modules.json has no Pooling module; set `pooling` in the registry: `mean`, `cls` or `last_token`"
        )


def _add_pooling(head: EmbeddingHead, root: Path, ref: ModuleRef, device: torch.device) -> None:
    file = ref.file("config.json")
    config = require_json(root, file)
    modes = pooling_of(config, file, is_overridden=head.override is not None)
    head.add_pooling(modes, include_prompt=config.get("include_prompt", True))


def _add_dense(head: EmbeddingHead, root: Path, ref: ModuleRef, device: torch.device) -> None:
    config = require_json(root, ref.file("config.json"))
    source = config.get("module_input_name") or head.source
    in_width = _input_width(head, ref, source)
    out_width = config.get("out_features")
    if type(out_width) is not int or out_width < 1:
        file = ref.file("config.json")
        raise BrokenFiles(
            f"out_features in {file} is {out_width!r}, which is not a positive integer; fetch the model again",
            file=file,
        )
    if config.get("in_features") != in_width:
        raise UnsupportedModel(
            f"in_features in {ref.file('config.json')} is {config.get('in_features')}, but the vectors have width "
            f"{in_width}: check `pooling` in the registry"
        )
    weights = read_module_weights(root, ref)
    weight = weights.take("linear.weight", device, (out_width, in_width))
    bias = weights.take("linear.bias", device, (out_width,)) if config.get("bias", True) else None
    activation = _activation(config.get("activation_function", "torch.nn.modules.activation.Tanh"), ref)
    residual = _residual(config, weights, device, (out_width, in_width))
    weights.check_all_taken()
    head.weights += [tensor for tensor in (weight, bias) if tensor is not None]

    def dense(x: Tensor) -> Tensor:
        out = activation(linear(x, weight, bias))
        return out if residual is None else out + residual(x)

    head.add(dense, source, config.get("module_output_name") or source, out_width)


def _residual(
    config: Json, weights: ModuleWeights, device: torch.device, shape: tuple[int, int]
) -> Callable[[Tensor], Tensor] | None:
    if not config.get("use_residual"):
        return None
    if shape[0] == shape[1]:
        return lambda x: x
    bridge = weights.take("residual.weight", device, shape)
    return lambda x: linear(x, bridge)


def _activation(name: object, ref: ModuleRef) -> Callable[[Tensor], Tensor]:
    """Returns an activation of `torch.nn` by its dotted name.

    Raises:
        UnsupportedModel: anything else, which is foreign code; a default in its place would give wrong vectors.
    """
    is_torch = isinstance(name, str) and name.startswith("torch.nn.")
    kind = getattr(nn, str(name).rsplit(".", 1)[-1], None) if is_torch else None
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise UnsupportedModel(
            f"{ref.file('config.json')} names the activation {name!r}; only classes of torch.nn are supported"
        )
    module: nn.Module = kind()
    return module


def _add_layer_norm(head: EmbeddingHead, root: Path, ref: ModuleRef, device: torch.device) -> None:
    width = _input_width(head, ref, SENTENCE)
    weights = read_module_weights(root, ref)
    weight, bias = weights.take("norm.weight", device, (width,)), weights.take("norm.bias", device, (width,))
    weights.check_all_taken()
    head.weights += [weight, bias]
    head.add(lambda x: layer_norm(x, (width,), weight, bias), SENTENCE, SENTENCE, width)


def _add_normalize(head: EmbeddingHead, root: Path, ref: ModuleRef, device: torch.device) -> None:
    config = read_json(root, ref.file("config.json")) or {}
    source = config.get("module_input_name") or SENTENCE
    width = _input_width(head, ref, source)
    head.add(normalize, source, config.get("module_output_name") or source, width)


def _skip_dropout(head: EmbeddingHead, root: Path, ref: ModuleRef, device: torch.device) -> None:
    """Skips Dropout, which does nothing at inference."""


def _input_width(head: EmbeddingHead, ref: ModuleRef, source: str) -> int:
    if source not in head.widths:
        raise UnsupportedModel(
            f"{ref.path} ({ref.kind}) reads {source!r}, but the modules before it give {', '.join(head.widths)}; the "
            "order in modules.json is wrong: fetch the model again"
        )
    return head.widths[source]


_BUILDERS: dict[str, Callable[[EmbeddingHead, Path, ModuleRef, torch.device], None]] = {
    "Pooling": _add_pooling,
    "Dense": _add_dense,
    "LayerNorm": _add_layer_norm,
    "Normalize": _add_normalize,
    "Dropout": _skip_dropout,
}

_TOKEN_BUILDERS = {kind: _BUILDERS[kind] for kind in ("Dense", "Normalize", "Dropout")}

TOKEN_MODULES = tuple(_TOKEN_BUILDERS)
"""The modules that work on one token at a time."""
