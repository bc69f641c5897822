"""Models without a transformer: a table with a row for each token, and the mean of a text's rows (model2vec)."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from tokenizers import Tokenizer as FastTokenizer
from torch import Tensor

from engines.batch import PART_TOKENS
from engines.encoder import Attention, Path, Recheck, Size
from engines.errors import BrokenFiles
from engines.folder import Folder
from engines.layout import Layout
from engines.module_weights import ModuleWeights, read_module_weights
from engines.modules import Chain, build_chain
from engines.spec import ModelSpec
from engines.tokenize import Ids, Rules, Tokenizer
from engines.vocabulary import check_size, check_vocabulary

_NO_LIMIT_TOKENS = 1_000_000


class StaticEncoder:
    """The mean of the tokens' rows of a table (`engines.encoder.Encoder`). Nothing to pad, nothing to fall back to.

    Args:
        table: float32 `[vocabulary, H]` on the device.
        chain: starts with mean pooling.
    """

    attention: Attention = "packed"
    path: Path = "packed"
    fallback = ""
    is_reentrant = True
    part_tokens = PART_TOKENS
    largest_copy, num_threads = 0, 1
    num_layers = 1
    window: int | None = None
    notes: tuple[str, ...] = ()
    sizes: tuple[Size, ...] = ()

    def __init__(self, table: Tensor, chain: Chain, device: torch.device) -> None:
        self._table = table
        self._chain = chain
        self._device = device
        self.dimensions = chain.dimensions
        self.pause: Callable[[], None] = lambda: None  # a table is looked up at once
        self.recheck: Recheck = lambda encoder: None  # there is one path

    @torch.inference_mode()
    def __call__(self, texts: Sequence[Ids], prompt_tokens: Sequence[int] | None = None) -> Tensor:
        """See `Encoder`. A text without a single known token is all zeros, as in sentence-transformers."""
        layout = Layout([len(ids) for ids in texts], self._device)
        row = torch.from_numpy(np.concatenate(texts)).to(self._device)
        return self._chain(self._table[row], layout, prompt_tokens)

    def reference(self, texts: Sequence[Ids], prompt_tokens: Sequence[int] | None = None) -> Tensor:
        """See `Encoder`; each text alone."""
        rows = [self([ids], None if prompt_tokens is None else [prompt_tokens[i]]) for i, ids in enumerate(texts)]
        return torch.cat(rows)

    def paths(self) -> tuple[Path, ...]:
        """See `Candidate`; there is one."""
        return ("packed",)

    def together(self, texts: Sequence[Ids]) -> Tensor:
        """See `Candidate`."""
        return self(texts)[None]

    def alone(self, text: Ids) -> Tensor:
        """See `Candidate`."""
        return self([text])

    def sized(self, texts: Sequence[Ids], size: Size) -> Tensor:
        """See `Candidate`; there are no sizes."""
        return self(texts)

    def extra_bytes(self) -> int:
        """See `Candidate`; there are none."""
        return 0

    def use(self, path: Path) -> None:
        """See `Candidate`; there is one."""
        assert path == "packed"

    def tensors(self) -> list[Tensor]:
        """See `Encoder`."""
        return [self._table, *self._chain.weights]

    def token_bytes(self) -> int:
        """See `Encoder`: a token's row and its copy."""
        return 2 * self._table.shape[1] * self._table.dtype.itemsize


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
    rules = Rules(
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


def _check_mapping(mapping: Tensor, num_rows: int, most: int, file: str) -> None:
    is_fine = mapping.ndim == 1 and 0 < len(mapping) <= most and mapping.min() >= 0 and mapping.max() < num_rows
    if not is_fine:
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
    # tokenizers raises a bare Exception for a file that it cannot read.
    except Exception as error:
        raise BrokenFiles(f"{name} is missing or corrupt; fetch the model again", file=name) from error
