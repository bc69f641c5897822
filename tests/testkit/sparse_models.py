"""Writes small folders that sentence-transformers' SparseEncoder saves, and reads what it gives for them."""

from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from sentence_transformers import SparseEncoder
from sentence_transformers.base.modules import Router, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from sentence_transformers.sparse_encoder.modules import (
    MLMTransformer,
    SparseAutoEncoder,
    SparseStaticEmbedding,
    SpladePooling,
)
from torch import Tensor, nn
from transformers import (
    AlbertConfig,
    AlbertForMaskedLM,
    BertForMaskedLM,
    DistilBertConfig,
    DistilBertForMaskedLM,
    ElectraConfig,
    ElectraForMaskedLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    MPNetConfig,
    MPNetForMaskedLM,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
    XLMRobertaConfig,
    XLMRobertaForMaskedLM,
)

from benchmarks.lib import vocabularies
from benchmarks.lib.models import bert_config, quiet, transformer

SHAPE: dict[str, Any] = {
    "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96,
}  # fmt: skip
_MODERN: dict[str, Any] = {
    "max_position_embeddings": 512, "local_attention": 32, "pad_token_id": 0, "bos_token_id": 2, "cls_token_id": 2,
    "sep_token_id": 3, "eos_token_id": 3,
}  # fmt: skip

Made = tuple[nn.Module, PreTrainedTokenizerFast]


def _with(tokenizer: PreTrainedTokenizerFast, kind: Any, config: Any, **values: Any) -> Made:
    return _scaled(transformer(config(vocab_size=len(tokenizer), **values), kind=kind)), tokenizer


def _scaled(model: Any) -> nn.Module:
    """Scales the embeddings, which are also the decoder: logits are then around 1, as those of trained models are."""
    model.get_input_embeddings().weight.data *= 0.2
    made: nn.Module = model
    return made


def bert() -> Made:
    tokenizer = vocabularies.bert()
    return _scaled(transformer(bert_config(tokenizer), kind=BertForMaskedLM)), tokenizer


LANGUAGE_MODELS: dict[str, Callable[[], Made]] = {
    "bert": bert,
    "roberta": lambda: _with(
        vocabularies.roberta(), RobertaForMaskedLM, RobertaConfig, max_position_embeddings=202, pad_token_id=1,
        type_vocab_size=1, **SHAPE,
    ),
    "xlm-roberta": lambda: _with(
        vocabularies.xlm_roberta(), XLMRobertaForMaskedLM, XLMRobertaConfig, max_position_embeddings=302,
        pad_token_id=1, type_vocab_size=1, **SHAPE,
    ),
    "distilbert": lambda: _with(
        vocabularies.bert(), DistilBertForMaskedLM, DistilBertConfig, max_position_embeddings=256, dim=48, n_layers=2,
        n_heads=4, hidden_dim=96,
    ),
    "modernbert": lambda: _with(vocabularies.bert(), ModernBertForMaskedLM, ModernBertConfig, **_MODERN, **SHAPE),
    "electra": lambda: _with(
        vocabularies.bert(), ElectraForMaskedLM, ElectraConfig, max_position_embeddings=256, embedding_size=24, **SHAPE
    ),
    "albert": lambda: _with(
        vocabularies.bert(), AlbertForMaskedLM, AlbertConfig, max_position_embeddings=256, embedding_size=24, **SHAPE
    ),
    "mpnet": lambda: _with(
        vocabularies.bert(), MPNetForMaskedLM, MPNetConfig, max_position_embeddings=258, pad_token_id=0, **SHAPE
    ),
}  # fmt: skip
"""Masked language models with random weights and their tokenizers, by family."""


def save_splade(
    folder: Path, family: str = "bert", *, strategy: Any = "max", activation: Any = "relu", is_legacy: bool = False,
    **options: Any,
) -> None:  # fmt: skip
    """Writes a SPLADE model. `is_legacy`: with the module of sentence-transformers 5."""
    with quiet(), TemporaryDirectory() as draft:
        model, tokenizer = LANGUAGE_MODELS[family]()
        chain = [
            _language_model(Path(draft), model, tokenizer, is_legacy=is_legacy),
            SpladePooling(strategy, activation),
        ]
        _save(folder, chain, **options)


def save_auto_encoder(folder: Path, *, normalized: bool = False, pooling: Any = "mean", **options: Any) -> None:
    """Writes a model whose dense vectors are turned into latents, of which 12 of 160 are kept (CSR)."""
    torch.manual_seed(9)
    module = SparseAutoEncoder(48, 160, k=12, k_aux=16, normalize=normalized)
    for tensor in module.parameters():
        tensor.data.normal_(std=0.5)
    with quiet(), TemporaryDirectory() as draft:
        tokenizer = vocabularies.bert()
        transformer(bert_config(tokenizer)).save_pretrained(draft)  # type: ignore[operator]  # as below
        tokenizer.save_pretrained(draft)
        first = Transformer(draft, max_seq_length=160, model_kwargs={"dtype": torch.float32})
        _save(folder, [first, Pooling(48, pooling), module], **options)


def save_static(folder: Path, **options: Any) -> None:
    """Writes a model that is a table of weights, some of them zero or below."""
    with quiet():
        _save(folder, [_table(vocabularies.bert())], **options)


def save_router(folder: Path, *, default_route: str | None = "document", **options: Any) -> None:
    """Writes a model whose queries are looked up in a table and whose documents pass through SPLADE."""
    with quiet(), TemporaryDirectory() as draft:
        model, tokenizer = bert()
        documents = [_language_model(Path(draft), model, tokenizer), SpladePooling("max", "log1p_relu")]
        router = Router.for_query_document([_table(tokenizer)], documents, default_route=default_route)
        _save(folder, [router], **options)


def sparse_reference(folder: Path) -> SparseEncoder:
    """Loads the same folder with sentence-transformers, in float32 on the CPU."""
    with quiet():
        return SparseEncoder(str(folder), device="cpu", model_kwargs={"dtype": torch.float32})


def sparse_encode(model: SparseEncoder, texts: Sequence[str], **options: Any) -> Tensor:
    """Returns sentence-transformers' weights of all entries, `[n, vocabulary]`."""
    with quiet():
        found = model.encode(
            list(texts), convert_to_sparse_tensor=False, convert_to_tensor=True, show_progress_bar=False, **options
        )
        assert isinstance(found, Tensor)
        return found


def _language_model(
    draft: Path, model: nn.Module, tokenizer: PreTrainedTokenizerFast, *, is_legacy: bool = False
) -> Transformer:
    model.save_pretrained(draft)  # type: ignore[operator]  # nn.Module types attributes as tensors or modules
    tokenizer.save_pretrained(draft)
    options: dict[str, Any] = {"max_seq_length": 160, "model_kwargs": {"dtype": torch.float32}}
    return (
        MLMTransformer(str(draft), **options)
        if is_legacy
        else Transformer(str(draft), transformer_task="fill-mask", **options)
    )


def _table(tokenizer: PreTrainedTokenizerFast) -> SparseStaticEmbedding:
    torch.manual_seed(5)
    weights = torch.randn(len(tokenizer))
    weights[::7] = 0.0
    return SparseStaticEmbedding(tokenizer, weights, frozen=True)  # type: ignore[arg-type]  # it takes any tokenizer


def _save(folder: Path, modules: Sequence[nn.Module], **options: Any) -> None:
    SparseEncoder(modules=list(modules), device="cpu", **options).save(str(folder), create_model_card=False)
