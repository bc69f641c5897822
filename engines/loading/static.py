"""TODO engines/loading/static.py."""

import torch
from tokenizers import Tokenizer as FastTokenizer
from torch import Tensor

from engines.errors import BrokenFiles
from engines.inputs.tokenizer import Tokenizer, TokenizerLimits
from engines.inputs.vocabulary import check_size, check_vocabulary
from engines.loading.folder import Folder
from engines.loading.module_weights import ModuleWeights, read_module_weights
from engines.loading.modules import build_chain
from engines.models.static import StaticEncoder, _check_mapping
from engines.spec import ModelSpec

_NO_LIMIT_TOKENS = 1_000_000


def build_static(folder: Folder, spec: ModelSpec, device: torch.device) -> tuple[StaticEncoder, Tokenizer, str]:
    """The encoder and tokenizer of a folder whose first module is a StaticEmbedding, and the dtype of its table.

    Raises:
        BrokenFiles, UnsupportedModel.
    """
    assert folder.modules is not None, "the caller has read modules.json"
    weights = read_module_weights(folder.root, folder.modules[0])
    backend = _read_backend(folder, folder.modules[0].file("tokenizer.json"))
    table = _fold(weights, 2 * backend.get_vocab_size()).to(device, torch.float32)
    check_vocabulary(backend, table.shape[0])
    cut = backend.truncation or {}
    backend.no_truncation()
    backend.no_padding()
    chain = build_chain(folder, table.shape[1], device, spec.pooling)
    rules = TokenizerLimits(
        max_tokens=spec.max_tokens or cut.get("max_length", _NO_LIMIT_TOKENS),
        vocab_size=table.shape[0],
        has_foreign_ids=backend.get_vocab_size() > table.shape[0],
        truncate="start" if cut.get("direction") == "left" else "end",
        takes_empty=True,
        max_word_chars=getattr(backend.model, "max_input_chars_per_word", 0),
    )
    return StaticEncoder(table, chain, device), Tokenizer(backend, rules), "float32"


def _fold(weights: ModuleWeights, most_rows: int) -> Tensor:
    """One row a token id: sentence-transformers' own `embedding.weight`, or model2vec's `embeddings`, which several
    ids may share by a `mapping` and which `weights` may scale.

    Raises:
        BrokenFiles: the mapping is not one of at most `most_rows` ids to rows of the table, and would unfold to more
            than the memory holds.
    """
    table = weights.take_any("embedding.weight")
    if table is None:
        table = weights.take_raw("embeddings")
        mapping, scale = weights.take_any("mapping"), weights.take_any("weights")
        if mapping is not None:
            _check_mapping(mapping, len(table), most_rows, weights.file)
            table = table[mapping.long()]
        if scale is not None:
            table = table.float() * scale[:, None]
    weights.finish()
    return table


def _read_backend(folder: Folder, name: str) -> FastTokenizer:
    path = folder.root / name
    if path.exists():
        check_size(path, name)
    try:
        return FastTokenizer.from_file(str(path))
    # tokenizers raises a bare Exception for a file that it cannot read.
    except Exception as error:
        raise BrokenFiles(f"{name} is missing or corrupt; fetch the model again", file=name) from error
