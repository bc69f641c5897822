"""Small models of late interaction with random weights, a folder for each kind; the reference says what they give.

`FAMILIES` is the table; `reference` loads a folder with `MultiVectorEncoder` of sentence-transformers.
"""

import asyncio
import json
import string
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from msgspec import Struct
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from sentence_transformers import MultiVectorEncoder
from sentence_transformers.base.modules import Dense, Normalize, Transformer
from sentence_transformers.multi_vector_encoder.modules import HierarchicalTokenPooling, MultiVectorMask
from tokenizers import Tokenizer
from torch import nn
from transformers import (
    BertConfig,
    DistilBertConfig,
    ModernBertConfig,
    MPNetConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    XLMRobertaConfig,
)

from benchmarks.lib import vocabularies
from benchmarks.lib.models import quiet, randomise, transformer
from engines.batching.engine import EmbeddingEngine
from engines.types import Outputs, OutputsCall, ScoreCall, Scores

WIDTH, PROJECTED = 48, 24
SHAPE: dict[str, Any] = {
    "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96,
}  # fmt: skip
PUNCTUATION = list(string.punctuation)

Vectors = list[NDArray[np.float32]]


class Family(Struct, frozen=True, kw_only=True):
    """A folder to build.

    `is_packed`: whether texts share a row. `pools`: whether documents' vectors are merged in the model.
    """

    build: Callable[[Path], None]
    is_packed: bool = True
    pools: bool = False


FAMILIES: dict[str, Family] = {}


def family(name: str, **options: Any) -> Callable[[Callable[[Path], None]], Callable[[Path], None]]:
    """Registers a builder in `FAMILIES`."""

    def register(build: Callable[[Path], None]) -> Callable[[Path], None]:
        FAMILIES[name] = Family(build=build, **options)
        return build

    return register


def projection(width: int = PROJECTED, source: int = WIDTH, *, bias: bool = False, seed: int = 5) -> Dense:
    """Returns a Dense module over tokens with random weights."""
    torch.manual_seed(seed)
    module = Dense(source, width, bias=bias, activation_function=nn.Identity(), module_input_name="token_embeddings")
    randomise(module)
    return module


def save(
    folder: Path, model: nn.Module, tokenizer: Any, behind: Sequence[nn.Module], options: dict[str, Any], **more: Any
) -> None:
    """Writes a folder as sentence-transformers does.

    Args:
        options: of the Transformer module.
        more: of MultiVectorEncoder.
    """
    with quiet(), TemporaryDirectory() as draft:
        model.save_pretrained(draft)  # type: ignore[operator]  # nn.Module types attributes as tensors or modules
        tokenizer.save_pretrained(draft)
        first = Transformer(draft, model_kwargs={"dtype": torch.float32}, **{"max_seq_length": 100, **options})
        MultiVectorEncoder(modules=[first, *behind], device="cpu", **more).save(str(folder), create_model_card=False)


def bert(tokenizer: Any, **changes: Any) -> nn.Module:
    """Returns a small BERT."""
    return transformer(BertConfig(vocab_size=len(tokenizer), max_position_embeddings=160, **{**SHAPE, **changes}))


def normalize() -> Normalize:
    """Returns the module that brings vectors of tokens to length one."""
    return Normalize(module_input_name="token_embeddings")


def expansion(length: int = 24, *, attend: bool = False, **more: Any) -> dict[str, Any]:
    """Returns the settings by which queries are filled up."""
    return {"strategy": "fixed", "attend": attend, "length": length, **more}


@family("bert-unseen-fillers")
def _unseen(folder: Path) -> None:
    tokenizer = vocabularies.bert()
    behind = [projection(), MultiVectorMask(skiplist_words=PUNCTUATION), normalize()]
    options = {"document_length": 50, "query_expansion": expansion()}
    save(folder, bert(tokenizer), tokenizer, behind, options, prompts={"query": "[Q] ", "document": "[D] "})


@family("bert-seen-fillers")
def _seen(folder: Path) -> None:
    tokenizer = vocabularies.bert()
    mask = MultiVectorMask(skiplist_words=[".", "the", "nowhere"], skiplist_tasks=["query", "document"])
    behind = [projection(32), mask, projection(20, 32, bias=True, seed=8), normalize()]
    options = {"document_length": 40, "query_expansion": expansion(20, attend=True)}
    save(folder, bert(tokenizer), tokenizer, behind, options, similarity_fn_name="meanmaxsim")


@family("bert-least-width")
def _least(folder: Path) -> None:
    """Queries are filled up to a least width, and longer ones kept."""
    tokenizer = vocabularies.bert()
    options = {"query_length": 30, "query_expansion": {"strategy": "min", "length": 12, "token": "[UNK]"}}
    behind = [projection(), normalize(), MultiVectorMask()]
    save(folder, bert(tokenizer), tokenizer, behind, options, prompts={"query": "search: ", "document": "passage: "})


@family("distilbert-kept-tokens")
def _kept(folder: Path) -> None:
    tokenizer = vocabularies.bert()
    config = DistilBertConfig(
        vocab_size=len(tokenizer), max_position_embeddings=160, dim=WIDTH, n_layers=2, n_heads=4, hidden_dim=96
    )
    kept = list(range(0, len(tokenizer), 2))
    behind = [projection(), MultiVectorMask(keep_only_token_ids=kept)]  # not normalized
    save(folder, transformer(config), tokenizer, behind, {"query_length": 16})


@family("modernbert")
def _modernbert(folder: Path) -> None:
    tokenizer = vocabularies.bert()
    config = ModernBertConfig(
        vocab_size=len(tokenizer), max_position_embeddings=256, local_attention=128, pad_token_id=0, bos_token_id=2,
        cls_token_id=2, sep_token_id=3, eos_token_id=3, **{**SHAPE, "num_hidden_layers": 4},
    )  # fmt: skip
    options = {"document_length": 150, "query_expansion": expansion(32)}
    behind = [projection(), MultiVectorMask(skiplist_words=PUNCTUATION), normalize()]
    save(folder, transformer(config), tokenizer, behind, options, prompts={"query": "[Q] ", "document": "[D] "})


@family("xlm-roberta")
def _xlm_roberta(folder: Path) -> None:
    tokenizer = vocabularies.xlm_roberta()
    config = XLMRobertaConfig(
        vocab_size=len(tokenizer), max_position_embeddings=202, pad_token_id=1, type_vocab_size=1, **SHAPE
    )
    behind = [projection(), MultiVectorMask(), normalize()]
    save(folder, transformer(config), tokenizer, behind, {"query_expansion": expansion(), "query_length": 40})


@family("mpnet")
def _mpnet(folder: Path) -> None:
    tokenizer = vocabularies.mpnet()
    config = MPNetConfig(vocab_size=len(tokenizer), max_position_embeddings=202, **SHAPE)
    behind = [projection(), MultiVectorMask(), normalize()]
    save(folder, transformer(config), tokenizer, behind, {"query_expansion": expansion()})


@family("qwen3")
def _qwen3(folder: Path) -> None:
    """Causal, filled up with the end token."""
    tokenizer = vocabularies.qwen()
    config = Qwen3Config(
        vocab_size=len(tokenizer), head_dim=16, tie_word_embeddings=True, num_key_value_heads=2,
        max_position_embeddings=512, **SHAPE,
    )  # fmt: skip
    behind = [projection(), MultiVectorMask(), normalize()]
    save(folder, transformer(config), tokenizer, behind, {"query_expansion": expansion(20)})


@family("pooled", pools=True)
def _pooled(folder: Path) -> None:
    tokenizer = vocabularies.bert()
    behind = [projection(), MultiVectorMask(), normalize(), HierarchicalTokenPooling(2, num_protected_tokens=1)]
    save(folder, bert(tokenizer), tokenizer, behind, {"document_length": 60})


def with_markers() -> PreTrainedTokenizerFast:
    """Returns BERT's tokenizer with `[unused0]` and `[unused1]` in its vocabulary, which are not special."""
    content = json.loads(vocabularies.bert().backend_tokenizer.to_str())
    vocabulary = content["model"]["vocab"]
    for marker in ("[unused0]", "[unused1]"):
        vocabulary[marker] = len(vocabulary)
    backend = Tokenizer.from_str(json.dumps(content))
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]  # upstream
        tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]", model_max_length=128,
    )  # fmt: skip


@family("pylate")
def _pylate(folder: Path) -> None:
    """As PyLate 1 to 3 writes it: no mask, no normalization, and its settings at the top."""
    tokenizer = with_markers()
    save(folder, bert(tokenizer), tokenizer, [projection()], {})
    modules = json.loads((folder / "modules.json").read_text())
    modules[1]["type"] = "pylate.models.Dense.Dense"
    (folder / "modules.json").write_text(json.dumps(modules))
    dense = json.loads((folder / modules[1]["path"] / "config.json").read_text())
    dense = {key: value for key, value in dense.items() if not key.startswith("module_")}
    (folder / modules[1]["path"] / "config.json").write_text(json.dumps({**dense, "use_residual": False}))
    write_config(
        folder, model_type="ColBERT", similarity_fn_name="MaxSim", query_prefix="[unused0]",
        document_prefix="[unused1]", query_length=28, document_length=44, attend_to_expansion_tokens=False,
        skiplist_words=PUNCTUATION, do_query_expansion=True, prompts={},
    )  # fmt: skip


@family("stanford")
def _stanford(folder: Path) -> None:
    """As Stanford's ColBERT writes it: the projection among the weights, the settings in `artifact.metadata`."""
    tokenizer = with_markers()
    with quiet():
        bert(tokenizer).save_pretrained(folder)  # type: ignore[operator]  # nn.Module types attributes as tensors
        tokenizer.save_pretrained(folder)
    weights = {f"bert.{name}": weight for name, weight in load_file(folder / "model.safetensors").items()}
    weights["linear.weight"] = projection().linear.weight.detach().clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["HF_ColBERT"]}))
    artifact = {"query_maxlen": 26, "doc_maxlen": 48, "attend_to_mask_tokens": False, "mask_punctuation": True}
    (folder / "artifact.metadata").write_text(json.dumps(artifact))


def write_config(folder: Path, **content: Any) -> None:
    """Replaces `config_sentence_transformers.json`."""
    (folder / "config_sentence_transformers.json").write_text(json.dumps(content))


def reference(folder: Path) -> MultiVectorEncoder:
    """Loads a folder with sentence-transformers, in float32 on the CPU."""
    with quiet():
        return MultiVectorEncoder(str(folder), device="cpu", model_kwargs={"dtype": torch.float32})


def wanted(model: MultiVectorEncoder, texts: Sequence[str], side: str | None, **options: Any) -> Vectors:
    """Returns the reference's vectors of each text, each text alone."""
    encode: Any = {"query": model.encode_query, "document": model.encode_document, None: model.encode}[side]
    with quiet():
        return [np.asarray(encode([text], convert_to_numpy=True, **options)[0]) for text in texts]


def outputs(engine: EmbeddingEngine, texts: Sequence[str], side: str | None = None, **options: Any) -> Outputs:
    """Returns the answer of an engine that is asked for vectors of tokens."""
    call = OutputsCall(model_id="m", texts=tuple(texts), input_type=side, **{"outputs": ("multi_vector",), **options})
    result = asyncio.run(engine.run(call))
    assert isinstance(result, Outputs)
    return result


def vectors(engine: EmbeddingEngine, texts: Sequence[str], side: str | None = None, **options: Any) -> Vectors:
    """Returns the vectors of each text."""
    return split(outputs(engine, texts, side, **options))


def split(result: Outputs) -> Vectors:
    """Returns the vectors of an answer, by text."""
    return list(np.split(result.vectors(), np.cumsum(result.num_vectors)[:-1]))


def scored(engine: EmbeddingEngine, queries: Sequence[str], texts: Sequence[str], **options: Any) -> Scores:
    """Returns the answer of an engine that is asked for scores."""
    result = asyncio.run(engine.run(ScoreCall(model_id="m", queries=tuple(queries), texts=tuple(texts), **options)))
    assert isinstance(result, Scores)
    return result


def assert_same(got: Vectors, expected: Vectors) -> None:
    """Asserts that texts have as many vectors, and that no component differs by more than 1e-5."""
    assert [len(rows) for rows in got] == [len(rows) for rows in expected]
    for mine, theirs in zip(got, expected, strict=True):
        assert mine.shape == theirs.shape
        assert float(np.abs(mine - theirs).max(initial=0.0)) <= 1e-5 * max(1.0, float(np.abs(theirs).max(initial=0.0)))
