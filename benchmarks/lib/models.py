"""Builds small models with random weights in sentence-transformers' save format: a recipe for each family and pooling.

The weights have enough variance that texts differ clearly; with the usual initialisation all vectors are nearly
parallel, and a comparison by cosine would prove nothing.
"""

import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from logging import WARNING, disable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from msgspec import Struct
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense, Normalize, Transformer
from sentence_transformers.sentence_transformer.modules import LayerNorm, Pooling, StaticEmbedding
from torch import nn
from transformers import (
    AlbertConfig,
    AutoModel,
    BertConfig,
    CamembertConfig,
    DebertaV2Config,
    DistilBertConfig,
    ElectraConfig,
    EuroBertConfig,
    Gemma2Config,
    Gemma3TextConfig,
    JambaConfig,
    JinaEmbeddingsV3Config,
    LlamaConfig,
    MistralConfig,
    ModernBertConfig,
    MPNetConfig,
    NomicBertConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    RobertaConfig,
    T5Config,
    T5EncoderModel,
    XLMRobertaConfig,
)

from benchmarks.lib import vocabularies
from engines.spec import Matryoshka

WIDTH = 48
"""Hidden size of every recipe's transformer."""

_LEGACY_MODES = {
    "cls": "pooling_mode_cls_token",
    "max": "pooling_mode_max_tokens",
    "mean": "pooling_mode_mean_tokens",
    "mean_sqrt_len_tokens": "pooling_mode_mean_sqrt_len_tokens",
    "weightedmean": "pooling_mode_weightedmean_tokens",
    "lasttoken": "pooling_mode_lasttoken",
}

_SHAPE: dict[str, Any] = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
}
_GROUPED: dict[str, Any] = {**_SHAPE, "num_key_value_heads": 2, "max_position_embeddings": 512}


@contextmanager
def wider(width: int) -> Iterator[None]:
    """Gives the transformers that are built inside the block another hidden size, with four heads as before."""
    global WIDTH  # recipes read it when they build
    before, WIDTH = WIDTH, width
    _SHAPE["hidden_size"] = _GROUPED["hidden_size"] = width
    try:
        yield
    finally:
        WIDTH = _SHAPE["hidden_size"] = _GROUPED["hidden_size"] = before


class Recipe(Struct, frozen=True, kw_only=True):
    """A model to build.

    `spec`: the registry's fields for it. `padded_because`: part of the note of an engine without a packed path; empty
    means packed.
    """

    name: str
    family: str
    pooling: str
    build: Callable[[Path], None]
    spec: dict[str, Any] = {}
    padded_because: str = ""

    @property
    def attention(self) -> Literal["packed", "padded"]:
        """Return the path that the engine is expected to take."""
        return "padded" if self.padded_because else "packed"


RECIPES: dict[str, Recipe] = {}


def recipe(
    name: str, family: str, pooling: str, *, spec: dict[str, Any] | None = None, padded_because: str = ""
) -> Callable[[Callable[[Path], None]], Callable[[Path], None]]:
    """Registers a builder in `RECIPES`."""

    def register(build: Callable[[Path], None]) -> Callable[[Path], None]:
        RECIPES[name] = Recipe(
            name=name, family=family, pooling=pooling, build=build, spec=spec or {}, padded_because=padded_because
        )
        return build

    return register


def reference(folder: Path, **options: Any) -> SentenceTransformer:
    """Loads the same folder with sentence-transformers, in float32 on the CPU."""
    with quiet():
        return SentenceTransformer(str(folder), device="cpu", model_kwargs={"dtype": torch.float32}, **options)


@contextmanager
def quiet() -> Iterator[None]:
    """Silences the libraries' logs, progress bars and warnings."""
    disable(WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        disable(0)


def transformer(config: Any, *, seed: int = 7, kind: Any = AutoModel) -> nn.Module:
    """Builds a model of a configuration with weights that give different texts different vectors."""
    torch.manual_seed(seed)
    build = kind.from_config if kind is AutoModel else kind
    model: nn.Module = build(config).eval()
    randomise(model)
    return model


@torch.no_grad()
def randomise(module: nn.Module) -> None:
    """Draws tables with unit variance, projections that preserve it, and varied norms and biases.

    Terms that are the same for every text (positions, segments, biases) stay small, since they make all vectors alike.
    """
    for name, parameter in module.named_parameters():
        if parameter.ndim == 1:
            parameter.add_(0.05 * torch.randn_like(parameter))
        elif "position" in name or "token_type" in name:
            parameter.normal_(std=0.3)
        elif "embed" in name or "shared" in name or "relative_attention" in name:
            parameter.normal_()
        else:
            rows, columns = parameter.shape[0], parameter[0].numel()
            gain = 1.0 if rows > columns else 0.6 if columns > WIDTH else 2.0
            parameter.normal_(std=gain / columns**0.5)


def save(
    folder: Path,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerFast,
    behind: Sequence[nn.Module],
    *,
    max_length: int | None = 160,
    **options: Any,
) -> None:
    """Writes the folder as sentence-transformers 6 does: the transformer, then the other modules.

    Args:
        options: of SentenceTransformer, such as `prompts` and `default_prompt_name`.
    """
    with quiet(), TemporaryDirectory() as draft:
        model.save_pretrained(draft)  # type: ignore[operator]  # nn.Module types attributes as tensors or modules
        tokenizer.save_pretrained(draft)
        first = Transformer(draft, max_seq_length=max_length, model_kwargs={"dtype": torch.float32})
        chain = SentenceTransformer(modules=[first, *behind], device="cpu", **options)
        chain.save(str(folder), create_model_card=False)


def edit_json(path: Path, **changes: Any) -> None:
    """Changes keys of a JSON object on disk."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def to_legacy(folder: Path, *, max_length: int | None, do_lower_case: bool = False) -> None:
    """Rewrites a folder into the format of sentence-transformers 2 to 5.3."""
    lines = json.loads((folder / "modules.json").read_text())
    for line in lines:
        kind = line["type"].rsplit(".", 1)[-1]
        line["type"] = f"sentence_transformers.models.{kind}"
        if kind == "Pooling":
            _to_legacy_pooling(folder / line["path"] / "config.json")
        if kind == "Dense":
            _to_pickle(folder / line["path"])
    (folder / "modules.json").write_text(json.dumps(lines))
    legacy = {"max_seq_length": max_length, "do_lower_case": do_lower_case}
    (folder / "sentence_bert_config.json").write_text(json.dumps(legacy))


def _to_legacy_pooling(path: Path) -> None:
    config = json.loads(path.read_text())
    modes = [config["pooling_mode"]] if isinstance(config["pooling_mode"], str) else config["pooling_mode"]
    flags = {key: mode in modes for mode, key in _LEGACY_MODES.items()}
    path.write_text(json.dumps({"word_embedding_dimension": config["embedding_dimension"], **flags}))


def _to_pickle(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def dense(in_width: int, out_width: int, activation: nn.Module | None, seed: int = 3, **options: Any) -> Dense:
    """Builds a Dense module with random weights."""
    torch.manual_seed(seed)
    module = Dense(in_width, out_width, activation_function=activation, **options)
    randomise(module)
    return module


def configure(kind: Any, **values: Any) -> Any:
    """Builds a config with keys that its class accepts but does not declare."""
    return kind(**values)


def bert_config(tokenizer: PreTrainedTokenizerFast, **changes: Any) -> BertConfig:
    """Returns the config of a minimal BERT."""
    return BertConfig(vocab_size=len(tokenizer), max_position_embeddings=256, **{**_SHAPE, **changes})


def _save_bert(folder: Path, *behind: nn.Module, **options: Any) -> None:
    tokenizer = vocabularies.bert()
    save(folder, transformer(bert_config(tokenizer)), tokenizer, behind, **options)


# BERT, once for every kind of module after it.


@recipe("bert-cls", "bert", "cls")
def _bert_cls(folder: Path) -> None:
    _save_bert(folder, Pooling(WIDTH, "cls"))


@recipe("bert-mean-normalize-legacy", "bert", "mean, normalised")
def _bert_mean(folder: Path) -> None:
    _save_bert(folder, Pooling(WIDTH, "mean"), Normalize())
    to_legacy(folder, max_length=120)


@recipe("bert-max", "bert", "max")
def _bert_max(folder: Path) -> None:
    _save_bert(folder, Pooling(WIDTH, "max"))


@recipe("bert-cls-mean", "bert", "cls + mean")
def _bert_cls_mean(folder: Path) -> None:
    _save_bert(folder, Pooling(WIDTH, ("cls", "mean")))


@recipe("bert-three-legacy", "bert", "cls + max + lasttoken")
def _bert_three(folder: Path) -> None:
    _save_bert(folder, Pooling(WIDTH, ("cls", "max", "lasttoken")))
    to_legacy(folder, max_length=None)


@recipe("bert-mean-sqrt", "bert", "mean_sqrt_len_tokens")
def _bert_sqrt(folder: Path) -> None:
    _save_bert(folder, Pooling(WIDTH, "mean_sqrt_len_tokens"))


@recipe("bert-weighted", "bert", "weightedmean")
def _bert_weighted(folder: Path) -> None:
    _save_bert(folder, Pooling(WIDTH, "weightedmean"))


@recipe("bert-dense-tanh-legacy", "bert", "mean, Dense (Tanh)")
def _bert_tanh(folder: Path) -> None:
    _save_bert(folder, Pooling(WIDTH, "mean"), dense(WIDTH, 40, nn.Tanh()))
    to_legacy(folder, max_length=160)


@recipe("bert-dense-identity", "bert", "mean, Dense, normalised")
def _bert_identity(folder: Path) -> None:
    _save_bert(folder, Pooling(WIDTH, "mean"), dense(WIDTH, 64, nn.Identity(), bias=False), Normalize())


@recipe("bert-dense-residual", "bert", "cls, Dense (ReLU, residual)")
def _bert_residual(folder: Path) -> None:
    _save_bert(folder, Pooling(WIDTH, "cls"), dense(WIDTH, 40, nn.ReLU(), use_residual=True))


@recipe("bert-dense-tokens", "bert", "Dense on tokens, mean")
def _bert_tokens(folder: Path) -> None:
    projection = dense(WIDTH, 40, nn.GELU(), module_input_name="token_embeddings")
    _save_bert(folder, projection, Pooling(40, "mean"))


@recipe("bert-layer-norm", "bert", "mean, LayerNorm")
def _bert_layer_norm(folder: Path) -> None:
    norm = LayerNorm(WIDTH)
    randomise(norm)
    _save_bert(folder, Pooling(WIDTH, "mean"), norm)


@recipe("bert-lower-case", "bert", "mean")
def _bert_lower_case(folder: Path) -> None:
    tokenizer = vocabularies.bert(lowercase=False)
    save(folder, transformer(bert_config(tokenizer)), tokenizer, [Pooling(WIDTH, "mean")])
    to_legacy(folder, max_length=128, do_lower_case=True)


@recipe("bert-instructor", "bert", "mean without the prompt")
def _bert_instructor(folder: Path) -> None:
    prompts = {"query": "Represent the question for retrieval: ", "document": "Represent: "}
    pooling = Pooling(WIDTH, ("mean", "weightedmean", "max", "cls", "mean_sqrt_len_tokens"), include_prompt=False)
    _save_bert(folder, pooling, prompts=prompts)


@recipe("bert-bare-folder", "bert", "mean (no modules.json)")
def _bert_bare(folder: Path) -> None:
    tokenizer = vocabularies.bert(max_length=100)
    transformer(bert_config(tokenizer)).save_pretrained(folder)  # type: ignore[operator]  # as in `save`
    tokenizer.save_pretrained(folder)


@recipe("bert-default-width", "bert", "mean, cut by default")
def _bert_default_width(folder: Path) -> None:
    _save_bert(folder, Pooling(WIDTH, "mean"))
    edit_json(folder / "config_sentence_transformers.json", truncate_dim=32)


# The other encoders.


@recipe("roberta-mean", "roberta", "mean")
def _roberta(folder: Path) -> None:
    tokenizer = vocabularies.roberta()
    config = RobertaConfig(
        vocab_size=len(tokenizer), max_position_embeddings=202, pad_token_id=1, type_vocab_size=1, **_SHAPE
    )
    save(folder, transformer(config), tokenizer, [Pooling(WIDTH, "mean")], max_length=200)


@recipe("xlm-roberta-cls", "xlm-roberta", "cls, normalised")
def _xlm_roberta(folder: Path) -> None:
    tokenizer = vocabularies.xlm_roberta()
    config = XLMRobertaConfig(
        vocab_size=len(tokenizer), max_position_embeddings=302, pad_token_id=1, type_vocab_size=1, **_SHAPE
    )
    prompts = {"query": "query: ", "passage": "passage: ", "document": "passage: "}
    save(
        folder, transformer(config), tokenizer, [Pooling(WIDTH, "cls"), Normalize()],
        prompts=prompts, default_prompt_name="query", max_length=256,
    )  # fmt: skip


@recipe("camembert-mean", "camembert", "mean")
def _camembert(folder: Path) -> None:
    tokenizer = vocabularies.xlm_roberta()
    config = CamembertConfig(
        vocab_size=len(tokenizer), max_position_embeddings=302, pad_token_id=1, type_vocab_size=1, **_SHAPE
    )
    save(folder, transformer(config), tokenizer, [Pooling(WIDTH, "mean")])


@recipe("mpnet-mean", "mpnet", "mean, normalised")
def _mpnet(folder: Path) -> None:
    tokenizer = vocabularies.mpnet()
    config = MPNetConfig(vocab_size=len(tokenizer), max_position_embeddings=302, **_SHAPE)
    save(folder, transformer(config), tokenizer, [Pooling(WIDTH, "mean"), Normalize()])


@recipe("distilbert-mean", "distilbert", "mean")
def _distilbert(folder: Path) -> None:
    tokenizer = vocabularies.bert()
    config = DistilBertConfig(
        vocab_size=len(tokenizer), max_position_embeddings=256, dim=WIDTH, n_layers=2, n_heads=4, hidden_dim=96
    )
    save(folder, transformer(config), tokenizer, [Pooling(WIDTH, "mean")])


@recipe("electra-cls", "electra", "cls")
def _electra(folder: Path) -> None:
    tokenizer = vocabularies.bert()
    config = ElectraConfig(vocab_size=len(tokenizer), max_position_embeddings=256, embedding_size=24, **_SHAPE)
    save(folder, transformer(config), tokenizer, [Pooling(WIDTH, "cls")])


@recipe("albert-mean", "albert", "mean")
def _albert(folder: Path) -> None:
    tokenizer = vocabularies.bert()
    config = AlbertConfig(vocab_size=len(tokenizer), max_position_embeddings=256, embedding_size=24, **_SHAPE)
    save(folder, transformer(config), tokenizer, [Pooling(WIDTH, "mean")])


@recipe("modernbert-cls", "modernbert", "cls")
def _modernbert(folder: Path) -> None:
    tokenizer = vocabularies.bert()
    config = ModernBertConfig(
        vocab_size=len(tokenizer), max_position_embeddings=512, local_attention=32, pad_token_id=0, bos_token_id=2,
        cls_token_id=2, sep_token_id=3, eos_token_id=3, **{**_SHAPE, "num_hidden_layers": 4},
    )  # fmt: skip
    save(folder, transformer(config), tokenizer, [Pooling(WIDTH, "cls")], max_length=250)


@recipe(
    "nomic-mean", "nomic_bert", "mean, normalised",
    spec={"matryoshka": Matryoshka(widths=(16, 32), layer_norm=True)},
)  # fmt: skip
def _nomic(folder: Path) -> None:
    tokenizer = vocabularies.bert()
    config = NomicBertConfig(vocab_size=len(tokenizer), max_position_embeddings=512, **_SHAPE)
    prompts = {
        "search_query": "search_query: ",
        "search_document": "search_document: ",
        "classification": "classification: ",
        "clustering": "clustering: ",
    }
    save(folder, transformer(config), tokenizer, [Pooling(WIDTH, "mean"), Normalize()], prompts=prompts)


@recipe("gte-cls", "gte", "cls, normalised")
def _gte(folder: Path) -> None:
    from transformers import GteConfig  # late: transformers 5.17 does not have it

    tokenizer = vocabularies.xlm_roberta()
    config = GteConfig(vocab_size=len(tokenizer), max_position_embeddings=512, **_SHAPE)
    save(folder, transformer(config), tokenizer, [Pooling(WIDTH, "cls"), Normalize()])


@recipe("jina-v3-mean", "jina_embeddings_v3", "mean, normalised")
def _jina(folder: Path) -> None:
    tokenizer = vocabularies.xlm_roberta()
    config = JinaEmbeddingsV3Config(vocab_size=len(tokenizer), max_position_embeddings=512, **_SHAPE)
    config.matryoshka_dimensions = [16, 32, 48]
    save(folder, transformer(config), tokenizer, [Pooling(WIDTH, "mean"), Normalize()])


@recipe("eurobert-mean", "eurobert", "mean")
def _eurobert(folder: Path) -> None:
    tokenizer = vocabularies.bert()
    config = EuroBertConfig(
        vocab_size=len(tokenizer), pad_token_id=0, bos_token_id=2, eos_token_id=3, mask_token_id=4, **_GROUPED
    )
    save(folder, transformer(config), tokenizer, [Pooling(WIDTH, "mean")])


@recipe("deberta-v2-mean", "deberta-v2", "mean", padded_because="cannot replace its attention function")
def _deberta(folder: Path) -> None:
    tokenizer = vocabularies.bert()
    config = configure(
        DebertaV2Config, vocab_size=len(tokenizer), max_position_embeddings=256, relative_attention=True,
        position_buckets=32, pos_att_type=["p2c", "c2p"], share_att_key=True, norm_rel_ebd="layer_norm", **_SHAPE,
    )  # fmt: skip
    save(folder, transformer(config), tokenizer, [Pooling(WIDTH, "mean")])


@recipe("t5-mean-dense", "t5", "mean, Dense, normalised")
def _t5(folder: Path) -> None:
    tokenizer = vocabularies.t5()
    config = configure(
        T5Config, vocab_size=len(tokenizer), d_model=WIDTH, d_kv=WIDTH // 4, d_ff=96, num_layers=2, num_heads=4,
        pad_token_id=0, eos_token_id=1, decoder_start_token_id=0, feed_forward_proj="gated-gelu",
    )  # fmt: skip
    behind = [Pooling(WIDTH, "mean"), dense(WIDTH, 40, nn.Identity(), bias=False), Normalize()]
    save(folder, transformer(config, kind=T5EncoderModel), tokenizer, behind, max_length=180)


# Decoders.


@recipe("qwen2-last", "qwen2", "lasttoken")
def _qwen2(folder: Path) -> None:
    tokenizer = vocabularies.qwen()
    save(
        folder, transformer(Qwen2Config(vocab_size=len(tokenizer), **_GROUPED)), tokenizer,
        [Pooling(WIDTH, "lasttoken")],
    )  # fmt: skip


@recipe("qwen2-bidirectional", "qwen2", "lasttoken, not causal")
def _qwen2_bidirectional(folder: Path) -> None:
    tokenizer = vocabularies.qwen()
    config = configure(Qwen2Config, vocab_size=len(tokenizer), is_causal=False, **_GROUPED)
    save(folder, transformer(config), tokenizer, [Pooling(WIDTH, "lasttoken"), Normalize()])


@recipe(
    "qwen3-last", "qwen3", "lasttoken, normalised", spec={"matryoshka": Matryoshka(minimum=8)},
)  # fmt: skip
def _qwen3(folder: Path) -> None:
    tokenizer = vocabularies.qwen()
    config = Qwen3Config(vocab_size=len(tokenizer), head_dim=16, tie_word_embeddings=True, **_GROUPED)
    task = "Instruct: Given a web search query, retrieve relevant passages that answer the query\nQuery:"
    save(
        folder, transformer(config), tokenizer, [Pooling(WIDTH, "lasttoken"), Normalize()],
        prompts={"query": task, "document": ""}, max_length=None,
    )  # fmt: skip


@recipe("gemma3-bidirectional", "gemma3_text", "mean, 2 Dense, normalised")
def _gemma3(folder: Path) -> None:
    tokenizer = vocabularies.gemma()
    config = Gemma3TextConfig(
        vocab_size=len(tokenizer), head_dim=WIDTH // 4, sliding_window=32, use_bidirectional_attention=True,
        query_pre_attn_scalar=WIDTH // 4, layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        **{**_GROUPED, "num_hidden_layers": 3},
    )  # fmt: skip
    config.matryoshka_dims = [16, 32]
    prompts = {"query": "task: search result | query: ", "document": "title: none | text: "}
    behind = [
        Pooling(WIDTH, "mean"),
        dense(WIDTH, 128, nn.Identity(), bias=False),
        dense(128, WIDTH, nn.Identity(), seed=4, bias=False),
        Normalize(),
    ]
    save(folder, transformer(config), tokenizer, behind, prompts=prompts, max_length=200)


@recipe("gemma2-last", "gemma2", "lasttoken, normalised", padded_because="its attention has soft-capped scores")
def _gemma2(folder: Path) -> None:
    tokenizer = vocabularies.gemma()
    config = Gemma2Config(
        vocab_size=len(tokenizer), head_dim=WIDTH // 4, sliding_window=32, attn_logit_softcapping=20.0,
        query_pre_attn_scalar=WIDTH // 4, **_GROUPED,
    )  # fmt: skip
    model = transformer(config)
    # Gemma multiplies its embeddings: unchanged, the vector of the end token would depend on that token alone.
    model.get_parameter("embed_tokens.weight").data.mul_(0.1)
    save(folder, model, tokenizer, [Pooling(WIDTH, "lasttoken"), Normalize()])


@recipe("mistral-last", "mistral", "lasttoken, normalised")
def _mistral(folder: Path) -> None:
    tokenizer = vocabularies.llama()
    config = MistralConfig(vocab_size=len(tokenizer), sliding_window=24, head_dim=WIDTH // 4, **_GROUPED)
    save(folder, transformer(config), tokenizer, [Pooling(WIDTH, "lasttoken"), Normalize()])


@recipe("llama-mean", "llama", "mean")
def _llama(folder: Path) -> None:
    tokenizer = vocabularies.llama(with_end=False)
    config = LlamaConfig(vocab_size=len(tokenizer), **_GROUPED)
    save(folder, transformer(config), tokenizer, [Pooling(WIDTH, "mean")])


@recipe("jamba-mean", "jamba", "mean", padded_because="carry a state from token to token")
def _jamba(folder: Path) -> None:
    tokenizer = vocabularies.bert()
    config = configure(
        JambaConfig, vocab_size=len(tokenizer), attn_layer_period=2, attn_layer_offset=1, num_experts=2,
        mamba_d_state=4, use_mamba_kernels=False, pad_token_id=0, bos_token_id=2, eos_token_id=3, **_GROUPED,
    )  # fmt: skip
    save(folder, transformer(config), tokenizer, [Pooling(WIDTH, "mean")])


# Models without a transformer.


@recipe("static", "StaticEmbedding", "mean")
def _static(folder: Path) -> None:
    tokenizer = vocabularies.bare()
    torch.manual_seed(5)
    table = torch.randn(tokenizer.get_vocab_size(), WIDTH).numpy()
    with quiet():
        SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_weights=table)], device="cpu").save(
            str(folder), create_model_card=False
        )
