"""Builds the encoder and tokenizer of a SparseEncoder that makes its sparse outputs of dense vectors (CSR)."""

from pathlib import Path

import torch
from msgspec import structs

from engines.batching.outputs import OutputFacts
from engines.errors import BrokenFiles, UnsupportedModel
from engines.hub.file_selection import AUTO_ENCODER
from engines.loading.builders import Built, dtype_name, facts_of, read_config, read_model, stated_width, vocab_size_of
from engines.loading.folder import Folder, ModuleRef, read_transformer, require_json
from engines.loading.module_weights import read_module_weights
from engines.loading.modules import build_head
from engines.loading.tokenizer import ModelFacts, read_tokenizer
from engines.models.adapters import Positions
from engines.models.auto_encoder import AutoEncoderHead, AutoEncoderWeights
from engines.models.base import EncoderConfig
from engines.models.head import EmbeddingHead
from engines.models.multi_output import MultiOutputEncoder
from engines.models.observation import observe
from engines.models.output_heads import OutputHeads
from engines.models.weight_forms import weight_form
from engines.spec import ModelSpec

_MATRIX = ("encoder.weight", "decoder.linear.weight")
"""Names of one matrix: the decoder's is the encoder's own, and safetensors keeps one of them."""

_INERT = "stats_last_nonzero"
"""How long ago each latent was active; only training reads it."""


def has_auto_encoder(folder: Folder) -> bool:
    """Tells whether the last module is a `SparseAutoEncoder`."""
    return bool(folder.modules) and folder.modules is not None and folder.modules[-1].kind == AUTO_ENCODER


def build_auto_encoder(folder: Folder, spec: ModelSpec, encoder_config: EncoderConfig) -> Built:
    """Builds the encoder and tokenizer.

    Raises:
        BadModel: the folder is broken, or cannot be served exactly.
    """
    assert folder.modules is not None, "it has an autoencoder"
    *chain, ref = folder.modules
    if not chain or chain[0].kind != "Transformer":
        raise UnsupportedModel(
            f"modules.json starts with {chain[0].kind if chain else ref.kind}; a {AUTO_ENCODER} is supported behind a "
            "Transformer"
        )
    read_transformer(folder.root, chain[0].path, is_checked=True)
    device, config = encoder_config.device, read_config(folder, spec)
    model = read_model(folder, spec, config, device).to(device).eval()
    vocab_size = vocab_size_of(model)
    observed = observe(model, vocab_size, device)
    width = observed.width or stated_width(config)
    dense = build_head(structs.replace(folder, modules=tuple(chain)), width, device, None)
    if dense.excludes_prompt:
        raise UnsupportedModel(
            f"the pooling leaves out the prompt (include_prompt: false), which is not supported before a {AUTO_ENCODER}"
        )
    limits = (observed.position_limit, Positions(model).limit)
    facts = ModelFacts(
        config, vocab_size, min(filter(None, limits), default=None), pooling=dense.pooling, counts_prompt=False
    )
    tokenizer = read_tokenizer(folder, spec, facts)
    heads = OutputHeads(sparse=_read_head(folder.root, ref, dense, folder.max_active_dims, device))
    dtype = dtype_name(model)
    encoder_config = structs.replace(encoder_config, weight_form=weight_form(dtype, device))
    encoder = MultiOutputEncoder(model, heads, encoder_config, notes=observed.why_not_packed(tokenizer.max_tokens))
    sides = OutputFacts(outputs=(), has_term_names=False)
    return Built(encoder, tokenizer, dtype, facts=facts_of(heads, sides))


def _read_head(
    root: Path, ref: ModuleRef, dense: EmbeddingHead, max_active: int | None, device: torch.device
) -> AutoEncoderHead:
    """Reads the module `ref`.

    Raises:
        BrokenFiles: naming its file.
    """
    file = ref.file("config.json")
    config = require_json(root, file)
    most, size = config.get("k", 8), config.get("hidden_dim", 512)
    if not (type(most) is int and type(size) is int and 0 < (max_active or most) <= size):
        raise BrokenFiles(f"{file} keeps {max_active or most!r} of {size!r} latents; fetch the model again", file=file)
    tensors, width = read_module_weights(root, ref), dense.dimensions
    given = [matrix for name in _MATRIX if (matrix := tensors.take_optional(name)) is not None]
    if not given or any(tuple(each.shape) != (size, width) or not torch.equal(each, given[0]) for each in given):
        raise BrokenFiles(
            f"{tensors.file} has no matrix of {size} x {width} under {' or '.join(_MATRIX)}; fetch the model again",
            file=tensors.file,
        )
    weights = AutoEncoderWeights(
        tensors.take("pre_bias", device, (width,)),
        given[0].to(device, torch.float32),
        tensors.take("latent_bias", device, (size,)),
    )
    tensors.take_optional(_INERT)
    tensors.check_all_taken()
    return AutoEncoderHead(dense, weights, max_active or most, normalized=bool(config.get("normalize", False)))
