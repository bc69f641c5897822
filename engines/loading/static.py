"""Builds the encoder and tokenizer of a StaticEmbedding folder: one table lookup a token, no transformer."""

import torch
from tokenizers import Tokenizer as FastTokenizer
from torch import Tensor

from engines.errors import BrokenFiles
from engines.inputs.tokenizer import Tokenizer, TokenizerLimits
from engines.inputs.vocabulary import check_size, check_vocabulary
from engines.loading.folder import Folder
from engines.loading.module_weights import ModuleWeights, read_module_weights
from engines.loading.modules import build_head
from engines.models.static import StaticEncoder
from engines.spec import ModelSpec

_NO_LIMIT_TOKENS = 1_000_000


def build_static(folder: Folder, spec: ModelSpec, device: torch.device) -> tuple[StaticEncoder, Tokenizer, str]:
    """Builds the encoder and tokenizer of a folder whose first module is a StaticEmbedding; also returns the dtype.

    Raises:
        BrokenFiles, UnsupportedModel.
    """
    assert folder.modules is not None, "the caller has read modules.json"
    weights = read_module_weights(folder.root, folder.modules[0])
    backend = _read_backend(folder, folder.modules[0].file("tokenizer.json"))
    table = _build_table(weights, 2 * backend.get_vocab_size()).to(device, torch.float32)
    check_vocabulary(backend, table.shape[0])
    cut = backend.truncation or {}
    backend.no_truncation()
    backend.no_padding()
    head = build_head(folder, table.shape[1], device, spec.pooling)
    limits = TokenizerLimits(
        max_tokens=spec.max_tokens or cut.get("max_length", _NO_LIMIT_TOKENS),
        vocab_size=table.shape[0],
        has_foreign_ids=backend.get_vocab_size() > table.shape[0],
        truncate="start" if cut.get("direction") == "left" else "end",
        takes_empty=True,
        max_word_chars=getattr(backend.model, "max_input_chars_per_word", 0),
    )
    return StaticEncoder(table, head, device), Tokenizer(backend, limits), "float32"


def _build_table(weights: ModuleWeights, max_ids: int) -> Tensor:
    """Returns a table with one row per token id.

    Reads sentence-transformers' `embedding.weight`, or model2vec's `embeddings`, whose rows several ids may share by a
    `mapping` and `weights` may scale.

    Raises:
        BrokenFiles: the mapping has more than `max_ids` ids, which may exceed the memory, or ids outside the table.
    """
    table = weights.take_optional("embedding.weight")
    if table is None:
        table = weights.take_raw("embeddings")
        mapping, scale = weights.take_optional("mapping"), weights.take_optional("weights")
        if mapping is not None:
            _check_mapping(mapping, len(table), max_ids, weights.file)
            table = table[mapping.long()]
        if scale is not None:
            table = table.float() * scale[:, None]
    weights.check_all_taken()
    return table


def _check_mapping(mapping: Tensor, num_rows: int, max_ids: int, file: str) -> None:
    is_valid = mapping.ndim == 1 and 0 < len(mapping) <= max_ids and mapping.min() >= 0 and mapping.max() < num_rows
    if not is_valid:
        raise BrokenFiles(
            f"'mapping' in {file} has {mapping.numel()} entries for a table of {num_rows} rows, which do not fit each "
            "other or the tokenizer; fetch the model again",
            file=file,
        )


def _read_backend(folder: Folder, name: str) -> FastTokenizer:
    path = folder.root / name
    if path.exists():
        check_size(path, name)
    try:
        return FastTokenizer.from_file(str(path))
    # tokenizers raises a bare Exception for an unreadable file.
    except Exception as error:
        raise BrokenFiles(f"{name} is missing or corrupt; fetch the model again", file=name) from error
