"""The sentence-transformers modules behind the transformer: pooling, dense, layer norm, normalise, on tensors.

A chain turns packed hidden states `[T, H]` into one float32 vector a text `[n, D]`. Each step reads and writes named
tensors, as sentence-transformers' `features` do: `token_embeddings` `[T, *]` and `sentence_embedding` `[n, *]`.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, linear, normalize

from engines.errors import BrokenFiles, UnsupportedModel
from engines.loading.folder import Folder, Json, ModuleRef, pooling_of, read_json, require_json
from engines.loading.module_weights import ModuleWeights, read_module_weights
from engines.models.head import SENTENCE, EmbeddingHead
from engines.spec import PoolingMode


def build_chain(
    folder: Folder, hidden_size: int, device: torch.device, pooling: tuple[PoolingMode, ...] | None
) -> EmbeddingHead:
    """The chain of a folder.

    Args:
        pooling: modes that replace the folder's own; without a `modules.json` they are the whole chain.

    Raises:
        BrokenFiles, UnsupportedModel.
    """
    chain = EmbeddingHead(hidden_size, pooling)
    behind = (folder.modules or ())[1:]
    if not any(ref.kind == "Pooling" for ref in behind):
        _add_unstated_pooling(chain, folder, pooling)
    for ref in behind:
        build = _BUILDERS.get(ref.kind)
        if build is None:
            raise UnsupportedModel(
                f"modules.json holds a {ref.kind!r} module; known are {', '.join(_BUILDERS)}. The model cannot be "
                "served exactly without it: use one that is made of known modules"
            )
        build(chain, folder.root, ref, device)
    return chain


def _add_unstated_pooling(chain: EmbeddingHead, folder: Folder, pooling: tuple[PoolingMode, ...] | None) -> None:
    """Mean for a folder without `modules.json` and for static embeddings, as sentence-transformers does.

    Raises:
        UnsupportedModel: a `modules.json` without pooling, and nothing in the registry.
    """
    if folder.modules is None or folder.modules[0].kind == "StaticEmbedding":
        chain.add_pooling(("mean",))
    elif pooling is not None:
        chain.add_pooling(pooling)
    else:
        raise UnsupportedModel(
            "modules.json has no Pooling module; say which in the registry: `pooling: mean`, `cls` or `last_token`"
        )


def _add_pooling(chain: EmbeddingHead, root: Path, ref: ModuleRef, device: torch.device) -> None:
    file = ref.file("config.json")
    config = require_json(root, file)
    modes = pooling_of(config, file, is_settled=chain.override is not None)
    chain.add_pooling(modes, include_prompt=config.get("include_prompt", True))


def _add_dense(chain: EmbeddingHead, root: Path, ref: ModuleRef, device: torch.device) -> None:
    config = require_json(root, ref.file("config.json"))
    source = config.get("module_input_name") or SENTENCE
    wide = _width_before(chain, ref, source)
    narrow = config.get("out_features")
    if type(narrow) is not int or narrow < 1:
        file = ref.file("config.json")
        raise BrokenFiles(f"{file} says out_features = {narrow!r}, which is no width; fetch the model again", file=file)
    if config.get("in_features") != wide:
        raise UnsupportedModel(
            f"{ref.file('config.json')} takes vectors {config.get('in_features')} wide, but gets {wide}; is `pooling` "
            "in the registry right?"
        )
    weights = read_module_weights(root, ref)
    weight = weights.take("linear.weight", device, (narrow, wide))
    bias = weights.take("linear.bias", device, (narrow,)) if config.get("bias", True) else None
    activation = _activation(config.get("activation_function", "torch.nn.modules.activation.Tanh"), ref)
    residual = _residual(config, weights, device, (narrow, wide))
    weights.finish()
    chain.weights += [tensor for tensor in (weight, bias) if tensor is not None]

    def dense(x: Tensor) -> Tensor:
        out = activation(linear(x, weight, bias))
        return out if residual is None else out + residual(x)

    chain.add(dense, source, config.get("module_output_name") or source, narrow)


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
    """A class of `torch.nn` by its dotted name; anything else is foreign code, and Tanh in its place would be wrong."""
    is_torch = isinstance(name, str) and name.startswith("torch.nn.")
    kind = getattr(nn, str(name).rsplit(".", 1)[-1], None) if is_torch else None
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise UnsupportedModel(
            f"{ref.file('config.json')} names the activation {name!r}; only classes of torch.nn are run"
        )
    module: nn.Module = kind()
    return module


def _add_layer_norm(chain: EmbeddingHead, root: Path, ref: ModuleRef, device: torch.device) -> None:
    width = _width_before(chain, ref, SENTENCE)
    weights = read_module_weights(root, ref)
    weight, bias = weights.take("norm.weight", device, (width,)), weights.take("norm.bias", device, (width,))
    weights.finish()
    chain.weights += [weight, bias]
    chain.add(lambda x: layer_norm(x, (width,), weight, bias), SENTENCE, SENTENCE, width)


def _add_normalize(chain: EmbeddingHead, root: Path, ref: ModuleRef, device: torch.device) -> None:
    config = read_json(root, ref.file("config.json")) or {}
    source = config.get("module_input_name") or SENTENCE
    width = _width_before(chain, ref, source)
    chain.add(lambda x: normalize(x, dim=-1), source, config.get("module_output_name") or source, width)


def _add_nothing(chain: EmbeddingHead, root: Path, ref: ModuleRef, device: torch.device) -> None:
    """Dropout: does nothing when a model is used and not trained."""


def _width_before(chain: EmbeddingHead, ref: ModuleRef, source: str) -> int:
    if source not in chain.widths:
        raise UnsupportedModel(
            f"{ref.path} ({ref.kind}) reads {source!r}, but the modules before it give {', '.join(chain.widths)}; the "
            "order in modules.json is wrong: fetch the model again"
        )
    return chain.widths[source]


_BUILDERS: dict[str, Callable[[EmbeddingHead, Path, ModuleRef, torch.device], None]] = {
    "Pooling": _add_pooling,
    "Dense": _add_dense,
    "LayerNorm": _add_layer_norm,
    "Normalize": _add_normalize,
    "Dropout": _add_nothing,
}
