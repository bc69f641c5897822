"""Measures the parts of a model before its weights are read, for models that are split over devices.

The model is built on the meta device and its modules are summed by accelerate, from config.json alone: exact for any
architecture and file format, where headers of weight files also count tensors that the model does not use.
"""

from accelerate.utils import compute_module_sizes

from engines.errors import BadModel
from engines.form_cache import QUANTIZED
from engines.loading.builders import choose_dtype, model_class_of, read_config
from engines.loading.folder import Folder
from engines.loading.ingredients import list_weights
from engines.loading.preflight import empty_model
from engines.loading.score_forms import score_form
from engines.models.adapters import drop_pooler, layers_of
from engines.models.base import EncoderConfig, layer_token_bytes
from engines.precision import is_compared_at_load
from engines.protocols import ModelParts
from engines.spec import ModelSpec


def measure_parts(folder: Folder, spec: ModelSpec, config: EncoderConfig, batch_tokens: int) -> ModelParts | None:
    """Measures a model's parts on a device; None where it cannot be split.

    Only models that give vectors or weights of tokens by one stack of layers, in a floating-point dtype, are split, and
    none that its load would build in float32 too, to compare with.

    Args:
        batch_tokens: of the largest batch.

    Raises:
        BadModel: config.json is broken.
    """
    is_transformer = folder.modules is None or folder.modules[0].kind == "Transformer"
    is_plain = (
        is_transformer and not folder.is_sparse_encoder and folder.adapter is None and spec.dtype not in QUANTIZED
    )
    if not is_plain or score_form(folder, spec) is not None or is_compared_at_load(spec):
        return None
    model_config = read_config(folder, spec)
    model = empty_model(model_class_of(model_config), model_config, trust_remote_code=spec.trust_remote_code)
    model = model.to(choose_dtype(spec, model_config, config.device))
    drop_pooler(model)
    layers = layers_of(model)
    names = {module: name for name, module in model.named_modules()}
    if len({names[layer].rpartition(".")[0] for layer in layers}) != 1:
        return None
    sizes = compute_module_sizes(model)
    own = [sizes[names[layer]] for layer in layers]
    try:
        others = [file for name, files in list_weights(folder).by_name.items() if name != "weights" for file in files]
        heads = sum(file.path.stat().st_size for file in others)
    except (OSError, BadModel):
        heads = 0  # the load reports what is missing
    cache_bytes = spec.cache_bytes if config.device.type == "cpu" else 0
    workspace = config.num_threads * batch_tokens * layer_token_bytes(model, 0)
    return ModelParts(parts=(sizes[""] - sum(own) + heads + cache_bytes, *own), workspace_bytes=workspace)
