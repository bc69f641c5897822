"""Small rerankers and classifiers with random weights, a folder for each family, head and template; and references.

`FAMILIES` is the table. What a folder's scores must be, `CrossEncoder.predict` of sentence-transformers says, or for
the original folders of causal rerankers the code of their model cards (`card_logits`).
"""

import asyncio
import json
import shutil
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from msgspec import Struct
from numpy.typing import NDArray
from sentence_transformers import CrossEncoder
from sentence_transformers.base.modules import Dense, Transformer
from sentence_transformers.cross_encoder.modules import LogitScore
from sentence_transformers.sentence_transformer.modules import Pooling
from torch import nn
from transformers import (
    AlbertConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    DebertaV2Config,
    DistilBertConfig,
    ElectraConfig,
    Gemma2Config,
    GemmaConfig,
    GteConfig,
    JinaEmbeddingsV3Config,
    LlamaConfig,
    MistralConfig,
    ModernBertConfig,
    MPNetConfig,
    NomicBertConfig,
    Qwen2Config,
    Qwen3Config,
    RobertaConfig,
    XLMRobertaConfig,
)

from benchmarks.lib import vocabularies
from benchmarks.lib.models import configure, quiet, randomise
from engines.batching.engine import EmbeddingEngine
from engines.types import ScoreCall, Scores

WIDTH = 48
SHAPE: dict[str, Any] = {
    "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96,
}  # fmt: skip
GROUPED: dict[str, Any] = {**SHAPE, "num_key_value_heads": 2, "max_position_embeddings": 512}

QWEN3_CHAT = (
    '{%- set task = "Given a web search query, retrieve relevant passages that answer the query" -%}'
    '{%- for m in messages if m.role == "system" %}{% set task = m.content %}{% endfor -%}'
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
    '<Instruct>: {{ messages | selectattr("role", "eq", "system") | map(attribute="content") | first | default(task) }}'
    '\n<Query>: {{ messages | selectattr("role", "eq", "query") | map(attribute="content") | first }}\n'
    '<Document>: {{ messages | selectattr("role", "eq", "document") | map(attribute="content") | first }}'
    "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
)
"""Qwen3-Reranker's template as a chat template."""


class Family(Struct, frozen=True, kw_only=True):
    """A folder to build.

    Args:
        kind: how it reads pairs: as its tokenizer pairs them, by a chat template, or by a published one.
        spec: the registry's fields for it.
        num_labels: its scores.
        is_packed: whether pairs share a row without padding.
    """

    name: str
    build: Callable[[Path], None]
    kind: Literal["pair", "chat", "original"] = "pair"
    spec: dict[str, Any] = {}
    num_labels: int = 1
    is_packed: bool = True


FAMILIES: dict[str, Family] = {}


def family(name: str, **facts: Any) -> Callable[[Callable[[Path], None]], Callable[[Path], None]]:
    """Registers a builder in `FAMILIES`."""

    def register(build: Callable[[Path], None]) -> Callable[[Path], None]:
        FAMILIES[name] = Family(name=name, build=build, **facts)
        return build

    return register


def random(kind: Any, config: Any, *, seed: int = 7) -> Any:
    """Returns a model of one of transformers' classes with random weights."""
    torch.manual_seed(seed)
    model = kind.from_config(config).eval()
    randomise(model)
    return model


def classifier(config: Any, *, seed: int = 7) -> Any:
    """Returns a sequence classifier with random weights, whose scores differ from text to text."""
    return random(AutoModelForSequenceClassification, config, seed=seed)


def save_plain(folder: Path, model: Any, tokenizer: Any, **config: Any) -> None:
    """Writes a folder without `modules.json`, with some more keys in its config."""
    with quiet():
        model.save_pretrained(folder)
    save_tokenizer(folder, model, tokenizer)
    edit(folder / "config.json", **config)


def save_tokenizer(folder: Path, model: Any, tokenizer: Any) -> None:
    """Writes a tokenizer; where the model has token types, as those of BERT, it says that it gives them."""
    tokenizer.save_pretrained(folder)
    if getattr(model.config, "type_vocab_size", 0) > 1 and model.config.model_type in TYPED:
        names = ["input_ids", "token_type_ids", "attention_mask"]
        edit(folder / "tokenizer_config.json", model_input_names=names)


TYPED = ("bert", "electra", "albert", "deberta-v2", "nomic_bert")
"""Models whose tokenizers give token types."""


def edit(path: Path, **changes: Any) -> None:
    """Changes keys of a JSON object on disk."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def save_modules(folder: Path, model: Any, tokenizer: Any, *behind: nn.Module, **options: Any) -> None:
    """Writes a folder as sentence-transformers 6 saves a CrossEncoder."""
    task = options.pop("task", "sequence-classification")
    draft = folder.with_name(f"{folder.name}-draft")
    with quiet():
        model.save_pretrained(draft)
        save_tokenizer(draft, model, tokenizer)
        first = Transformer(str(draft), transformer_task=task, model_kwargs={"dtype": torch.float32})
        CrossEncoder(modules=[first, *behind], device="cpu", **options).save(str(folder), create_model_card=False)
    shutil.rmtree(draft)


def reference(folder: Path) -> Any:
    """Loads a folder as sentence-transformers' CrossEncoder, in float32 on the CPU."""
    with quiet():
        return CrossEncoder(str(folder), device="cpu", model_kwargs={"dtype": torch.float32})


def predicted(model: Any, inputs: Sequence[tuple[str, str]] | Sequence[str], **options: Any) -> Any:
    """Returns sentence-transformers' scores of pairs, or of single texts, `[n, labels]`."""
    with quiet():
        if isinstance(inputs[0], str):  # a list of texts would be a pair
            found = np.stack([np.asarray(model.predict(text, **options)) for text in inputs])
        else:
            found = model.predict([list(pair) for pair in inputs], **options)
    return np.asarray(found).reshape(len(inputs), -1)


def answer(engine: EmbeddingEngine, texts: Sequence[str], **call: Any) -> Scores:
    """The whole answer to one request."""
    queries = call.pop("queries", ())
    result = asyncio.run(engine.run(ScoreCall(model_id="m", texts=tuple(texts), queries=tuple(queries), **call)))
    assert isinstance(result, Scores)
    return result


def scores(engine: EmbeddingEngine, pairs: Sequence[tuple[str, str]], **call: Any) -> NDArray[np.float32]:
    """The scores of pairs in one request, `[n, labels]`."""
    return answer(engine, [text for _, text in pairs], queries=[query for query, _ in pairs], **call).array()


def bert(**changes: Any) -> BertConfig:
    """The config of a small BERT with one label."""
    vocab_size = len(vocabularies.bert())
    return BertConfig(**{"vocab_size": vocab_size, "max_position_embeddings": 128, "num_labels": 1, **SHAPE, **changes})


def _roberta(kind: Any, **changes: Any) -> Any:
    tokenizer = vocabularies.xlm_roberta() if kind is XLMRobertaConfig else vocabularies.roberta()
    return kind(
        **{
            "vocab_size": len(tokenizer), "max_position_embeddings": 130, "pad_token_id": 1, "type_vocab_size": 1,
            "num_labels": 1, **SHAPE, **changes,
        }
    )  # fmt: skip


@family("bert-legacy-identity")
def _bert_legacy(folder: Path) -> None:
    """ms-marco-MiniLM: a folder from before version 4, whose scores are logits."""
    identity = "torch.nn.modules.linear.Identity"
    save_plain(folder, classifier(bert()), vocabularies.bert(), sbert_ce_default_activation_function=identity)


@family("bert-modules")
def _bert_modules(folder: Path) -> None:
    save_modules(folder, classifier(bert()), vocabularies.bert())


@family("bert-tanh")
def _bert_tanh(folder: Path) -> None:
    """A folder of version 4, with its own activation."""
    newer = {"sentence_transformers": {"activation_fn": "torch.nn.modules.activation.Tanh", "version": "4.1.0"}}
    save_plain(folder, classifier(bert()), vocabularies.bert(), **newer)


@family("bert-prompt")
def _bert_prompt(folder: Path) -> None:
    prompts = {"query": "Which passage answers this? "}
    save_modules(folder, classifier(bert()), vocabularies.bert(), prompts=prompts, default_prompt_name="query")


@family("bert-left")
def _bert_left(folder: Path) -> None:
    """A tokenizer that cuts at the start."""
    save_plain(folder, classifier(bert()), vocabularies.bert())
    edit(folder / "tokenizer_config.json", truncation_side="left")


@family("bert-multi-label", num_labels=4)
def _bert_multi(folder: Path) -> None:
    labels = {"id2label": {0: "toxic", 1: "rude", 2: "threat", 3: "spam"}}
    config = bert(num_labels=4, problem_type="multi_label_classification", **labels)
    save_plain(folder, classifier(config), vocabularies.bert())


@family("bert-pooled")
def _bert_pooled(folder: Path) -> None:
    model = random(AutoModel, bert())
    dense = Dense(WIDTH, 1, activation_function=nn.Identity(), module_output_name="scores")
    save_modules(folder, model, vocabularies.bert(), Pooling(WIDTH, "mean"), dense, task="feature-extraction")


@family("xlm-roberta")
def _xlm_roberta(folder: Path) -> None:
    """bge-reranker-base, -large, -v2-m3."""
    save_plain(folder, classifier(_roberta(XLMRobertaConfig)), vocabularies.xlm_roberta(max_length=128))


@family("roberta-nli", num_labels=3)
def _roberta_nli(folder: Path) -> None:
    labels = {0: "contradiction", 1: "entailment", 2: "neutral"}
    save_plain(
        folder, classifier(_roberta(RobertaConfig, num_labels=3, id2label=labels)), vocabularies.roberta(max_length=128)
    )


@family("deberta-v2", is_packed=False)
def _deberta(folder: Path) -> None:
    """mxbai-rerank-v1, DeBERTa-v3 for NLI."""
    tokenizer = vocabularies.bert()
    config = configure(
        DebertaV2Config, vocab_size=len(tokenizer), max_position_embeddings=128, relative_attention=True,
        position_buckets=32, pos_att_type=["p2c", "c2p"], share_att_key=True, norm_rel_ebd="layer_norm",
        num_labels=1, type_vocab_size=2, **SHAPE,
    )  # fmt: skip
    save_plain(folder, classifier(config), tokenizer)


def _modernbert(pooling: str) -> Any:
    return configure(
        ModernBertConfig, vocab_size=len(vocabularies.bert()), max_position_embeddings=512, local_attention=32,
        pad_token_id=0, bos_token_id=2, cls_token_id=2, sep_token_id=3, eos_token_id=3, num_labels=1,
        classifier_pooling=pooling,
        **{**SHAPE, "num_hidden_layers": 4},
    )  # fmt: skip


@family("modernbert-mean")
def _modernbert_mean(folder: Path) -> None:
    """gte-reranker-modernbert."""
    save_plain(folder, classifier(_modernbert("mean")), vocabularies.bert(max_length=200))


@family("modernbert-cls")
def _modernbert_cls(folder: Path) -> None:
    save_modules(folder, classifier(_modernbert("cls")), vocabularies.bert(max_length=200))


@family("gte")
def _gte(folder: Path) -> None:
    """gte-multilingual-reranker."""
    tokenizer = vocabularies.xlm_roberta()
    config = configure(GteConfig, vocab_size=len(tokenizer), max_position_embeddings=200, num_labels=1, **SHAPE)
    save_plain(folder, classifier(config), tokenizer)


@family("jina-v3")
def _jina(folder: Path) -> None:
    tokenizer = vocabularies.xlm_roberta()
    config = configure(
        JinaEmbeddingsV3Config, vocab_size=len(tokenizer), max_position_embeddings=200, num_labels=1, **SHAPE
    )
    save_plain(folder, classifier(config), tokenizer)


@family("nomic")
def _nomic(folder: Path) -> None:
    tokenizer = vocabularies.bert()
    config = configure(NomicBertConfig, vocab_size=len(tokenizer), max_position_embeddings=200, num_labels=1, **SHAPE)
    save_plain(folder, classifier(config), tokenizer)


@family("distilbert", num_labels=2)
def _distilbert(folder: Path) -> None:
    tokenizer = vocabularies.bert()
    config = configure(
        DistilBertConfig, vocab_size=len(tokenizer), max_position_embeddings=128, dim=WIDTH, n_layers=2, n_heads=4,
        hidden_dim=96, num_labels=2, id2label={0: "NEGATIVE", 1: "POSITIVE"},
    )  # fmt: skip
    save_plain(folder, classifier(config), tokenizer)


@family("electra")
def _electra(folder: Path) -> None:
    """ms-marco-electra-base."""
    tokenizer = vocabularies.bert()
    config = configure(
        ElectraConfig, vocab_size=len(tokenizer), max_position_embeddings=128, embedding_size=24, num_labels=1, **SHAPE
    )
    save_plain(folder, classifier(config), tokenizer)


@family("albert")
def _albert(folder: Path) -> None:
    tokenizer = vocabularies.bert()
    config = configure(
        AlbertConfig, vocab_size=len(tokenizer), max_position_embeddings=128, embedding_size=24, num_labels=1, **SHAPE
    )
    save_plain(folder, classifier(config), tokenizer)


@family("mpnet")
def _mpnet(folder: Path) -> None:
    tokenizer = vocabularies.mpnet(max_length=128)
    config = configure(MPNetConfig, vocab_size=len(tokenizer), max_position_embeddings=130, num_labels=1, **SHAPE)
    save_plain(folder, classifier(config), tokenizer)


def _decoder(kind: Any, tokenizer: Any, **changes: Any) -> Any:
    return kind(
        **{"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, "num_labels": 1, **GROUPED, **changes}
    )


@family("qwen2")
def _qwen2(folder: Path) -> None:
    """The padding token ends every text, so that the head reads the one before."""
    tokenizer = vocabularies.qwen()
    save_plain(folder, classifier(_decoder(Qwen2Config, tokenizer)), tokenizer)


@family("qwen3")
def _qwen3(folder: Path) -> None:
    tokenizer = vocabularies.qwen(with_specials=False)
    save_modules(folder, classifier(_decoder(Qwen3Config, tokenizer, head_dim=16)), tokenizer)


@family("qwen3-chat", kind="chat")
def _qwen3_chat(folder: Path) -> None:
    """Qwen3-Reranker converted to a classifier, with a chat template."""
    tokenizer = vocabularies.chat()
    save_plain(folder, classifier(_decoder(Qwen3Config, tokenizer, head_dim=16)), tokenizer)
    (folder / "chat_template.jinja").write_text(QWEN3_CHAT)


@family("mistral")
def _mistral(folder: Path) -> None:
    tokenizer = vocabularies.llama()
    save_plain(folder, classifier(_decoder(MistralConfig, tokenizer, sliding_window=24, head_dim=16)), tokenizer)


@family("llama", num_labels=3)
def _llama(folder: Path) -> None:
    tokenizer = vocabularies.llama(with_end=False)
    save_plain(folder, classifier(_decoder(LlamaConfig, tokenizer, num_labels=3)), tokenizer)


@family("gemma2", is_packed=False)
def _gemma2(folder: Path) -> None:
    tokenizer = vocabularies.gemma()
    config = _decoder(
        Gemma2Config, tokenizer, head_dim=16, sliding_window=32, attn_logit_softcapping=20.0, query_pre_attn_scalar=16
    )
    model = classifier(config)
    model.get_input_embeddings().weight.data.mul_(0.1)  # Gemma multiplies its embeddings
    save_plain(folder, model, tokenizer)


def causal(config: Any, *, scale: float = 0.3) -> Any:
    """Returns a language model with random weights, whose answers differ from text to text."""
    model = random(AutoModelForCausalLM, config)
    output = model.get_output_embeddings()
    output.weight = nn.Parameter(torch.randn_like(output.weight) * scale)
    return model


def _lm(kind: Any, tokenizer: Any, **changes: Any) -> Any:
    return _decoder(kind, tokenizer, **{"tie_word_embeddings": False, **changes})


@family("qwen3-logits", kind="chat")
def _qwen3_logits(folder: Path) -> None:
    """Qwen3-Reranker as sentence-transformers saves it: LogitScore behind a chat template."""
    tokenizer = vocabularies.chat(max_length=300)
    tokenizer = type(tokenizer).from_pretrained(_saved(folder, tokenizer))
    tokenizer.chat_template = QWEN3_CHAT
    true, false = (tokenizer.convert_tokens_to_ids(word) for word in ("yes", "no"))
    model = causal(_lm(Qwen3Config, tokenizer, head_dim=16))
    save_modules(folder, model, tokenizer, LogitScore(true, false), task="text-generation")


def _saved(folder: Path, tokenizer: Any) -> str:
    draft = folder.with_name(f"{folder.name}-tokenizer")
    tokenizer.save_pretrained(draft)
    return str(draft)


@family("llama-one-logit")
def _llama_logit(folder: Path) -> None:
    """A LogitScore of one token, without a template."""
    tokenizer = vocabularies.llama(with_end=False)
    save_modules(folder, causal(_lm(LlamaConfig, tokenizer)), tokenizer, LogitScore(300), task="text-generation")


@family("qwen3-reranker", kind="original", spec={"template": "qwen3-reranker"})
def _qwen3_original(folder: Path) -> None:
    tokenizer = vocabularies.chat()
    save_plain(folder, causal(_lm(Qwen3Config, tokenizer, head_dim=16, tie_word_embeddings=True)), tokenizer)


@family("mxbai-rerank-v2", kind="original", spec={"template": "mxbai-rerank-v2"})
def _mxbai_original(folder: Path) -> None:
    tokenizer = vocabularies.chat()
    save_plain(folder, causal(_lm(Qwen2Config, tokenizer)), tokenizer)


@family("bge-reranker-v2-gemma", kind="original", spec={"template": "bge-reranker-v2-gemma"})
def _gemma_original(folder: Path) -> None:
    tokenizer = vocabularies.gemma(with_end=False)
    model = causal(_lm(GemmaConfig, tokenizer, head_dim=16))
    model.get_input_embeddings().weight.data.mul_(0.1)
    save_plain(folder, model, tokenizer)


def card_ids(name: str, tokenizer: Any, query: str, text: str) -> list[int]:
    """Returns the ids of a pair as the model card of a causal reranker puts them together."""

    def ids(part: str) -> list[int]:
        found: list[int] = tokenizer(part, add_special_tokens=False)["input_ids"]
        return found

    if name == "qwen3-reranker":
        before = (
            "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
            'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
        )
        task = "Given a web search query, retrieve relevant passages that answer the query"
        end = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
        return ids(before) + ids(f"<Instruct>: {task}\n<Query>: {query}\n<Document>: {text}") + ids(end)
    if name == "mxbai-rerank-v2":
        before = (
            "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
            "<|im_start|>user\n"
        )
        task = (
            "You are a search relevance expert who evaluates how well documents match search queries. For each "
            "query-document pair, carefully analyze the semantic relationship between them, then provide your binary "
            "relevance judgment (0 for not relevant, 1 for relevant).\nRelevance:"
        )
        end = "<|im_end|>\n<|im_start|>assistant\n"
        content = ids(f"query: {query}") + ids("\n") + ids(f"document: {text}")
        return ids(before) + content + ids("\n") + ids(task) + ids(end)
    prompt = (
        "Given a query A and a passage B, determine whether the passage contains an answer to the query by providing a "
        "prediction of either 'Yes' or 'No'."
    )
    content = ids(f"A: {query}") + ids("\n") + ids(f"B: {text}")
    return [tokenizer.bos_token_id, *content, *ids("\n"), *ids(prompt)]


ANSWERS = {"qwen3-reranker": ("yes", "no"), "mxbai-rerank-v2": ("1", "0"), "bge-reranker-v2-gemma": ("Yes",)}
"""The tokens whose logits make the score."""


@torch.inference_mode()
def card_logits(name: str, folder: Path, pairs: Sequence[tuple[str, str]]) -> NDArray[np.float32]:
    """Returns the scores of pairs before an activation, each pair alone and with the logits of the whole vocabulary."""
    with quiet():
        tokenizer, model = _card(folder)
    found = []
    for query, text in pairs:
        ids = torch.tensor([card_ids(name, tokenizer, query, text)])
        logits = model(input_ids=ids).logits[0, -1]
        answers = [logits[tokenizer(word, add_special_tokens=False)["input_ids"][0]] for word in ANSWERS[name]]
        found.append(float(answers[0] - answers[1]) if len(answers) == 2 else float(answers[0]))
    return np.array(found, np.float32)[:, None]


@cache
def _card(folder: Path) -> tuple[Any, Any]:
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder), model.eval()
