"""Where sentence-transformers is wrong or depends on chance, the engine follows the meaning of the model's files."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling
from transformers import ConvBertConfig, LlamaConfig, MistralConfig, MobileBertConfig, RobertaConfig

from benchmarks.lib import vocabularies
from benchmarks.lib.engine_kit import Kit, answer, assert_same, embed, encode
from benchmarks.lib.models import WIDTH, bert_config, configure, edit_json, reference, save, to_legacy, transformer
from benchmarks.lib.workloads import mixed, text
from engines.errors import InvalidTokenId, InvalidValue

SHAPE: dict[str, Any] = {
    "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96,
    "num_key_value_heads": 4,
}  # fmt: skip
TEXTS = [*mixed(8, seed=4), text(70, 1), text(90, 2)]


def _roberta(folder: Path, max_length: int | None) -> None:
    """Saves a RoBERTa for 60 tokens: a table of 62 rows, of which the first two are never used."""
    tokenizer = vocabularies.roberta(max_length=10_000)
    config = configure(
        RobertaConfig, vocab_size=len(tokenizer), max_position_embeddings=62, pad_token_id=1, type_vocab_size=1, **SHAPE
    )
    save(folder, transformer(config), tokenizer, [Pooling(WIDTH, "mean")], max_length=max_length)


@pytest.mark.parametrize("stated", [None, 62, 512])
def test_a_roberta_stops_at_the_end_of_its_position_table(kit: Kit, tmp_path: Path, stated: int | None) -> None:
    _roberta(tmp_path, None)
    to_legacy(tmp_path, max_length=stated)
    model = reference(tmp_path)
    with pytest.raises((IndexError, RuntimeError)):
        encode(model, [text(100, 3)])
    model.max_seq_length = 60
    engine = kit.load(tmp_path)

    assert engine.info.max_tokens == 60
    assert_same(embed(engine, [text(100, 3)]), encode(model, [text(100, 3)]))


def test_the_smaller_of_all_stated_limits_counts(kit: Kit, tmp_path: Path) -> None:
    _roberta(tmp_path, 40)

    assert kit.load(tmp_path).info.max_tokens == 40
    assert kit.load(tmp_path, max_tokens=24).info.max_tokens == 24


@pytest.mark.parametrize("name", ["roberta-mean", "xlm-roberta-cls", "mpnet-mean", "camembert-mean"])
def test_a_pad_token_in_a_text_takes_no_position(kit: Kit, name: str) -> None:
    texts = ["before <pad> between <pad><pad> behind", "<pad>", *TEXTS[:3]]

    assert_same(embed(kit.engine(name), texts), encode(kit.reference(name), texts))


@pytest.mark.parametrize(
    "config",
    [
        configure(
            MobileBertConfig, vocab_size=900, true_hidden_size=24, embedding_size=24, intra_bottleneck_size=24,
            num_feedforward_networks=1, normalization_type="layer_norm", **SHAPE,
        ),
        configure(ConvBertConfig, vocab_size=900, embedding_size=WIDTH, conv_kernel_size=3, **SHAPE),
    ],
    ids=lambda config: config.model_type,
)  # fmt: skip
def test_a_model_whose_vectors_depend_on_padding_gets_none(kit: Kit, tmp_path: Path, config: Any) -> None:
    """MobileBERT reads the next token, ConvBERT several: sentence-transformers' vectors depend on the padding."""
    save(tmp_path, transformer(config), vocabularies.bert(), [Pooling(WIDTH, "mean")])
    model = reference(tmp_path)
    alone = np.concatenate([encode(model, [one]) for one in TEXTS])
    engine = kit.load(tmp_path)

    assert engine.info.attention == "unpadded"
    assert engine.info.notes[-1].startswith("unpadded: the padded path is")
    assert_same(embed(engine, TEXTS), alone)
    assert np.abs(encode(model, TEXTS) - alone).max() > 1e-3, "the recipe would not show a difference"


LONG_ROPE = {
    "rope_type": "longrope", "rope_theta": 10_000.0, "factor": 2.0, "original_max_position_embeddings": 64,
    "short_factor": [1.0] * 6, "long_factor": [1.5, 2.0, 2.5, 3.0, 3.5, 4.0],
}  # fmt: skip


@pytest.mark.parametrize(
    "rope",
    [{"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 4.0}, LONG_ROPE],
    ids=lambda rope: rope["rope_type"],
)
def test_frequencies_that_depend_on_the_longest_text_do_not_mix_texts(
    kit: Kit, tmp_path: Path, rope: dict[str, Any]
) -> None:
    tokenizer = vocabularies.llama()
    config = configure(
        LlamaConfig, vocab_size=len(tokenizer), max_position_embeddings=64, rope_parameters=rope, **SHAPE
    )
    save(tmp_path, transformer(config), tokenizer, [Pooling(WIDTH, "mean")])
    to_legacy(tmp_path, max_length=200)
    model = reference(tmp_path)
    # A short text in between resets the longest length that sentence-transformers keeps.
    alone = np.concatenate([encode(model, [one]) for two in TEXTS for one in ("a", two)])[1::2]
    crowd = encode(model, TEXTS)
    engine = kit.load(tmp_path)

    assert engine.info.attention == "packed"
    assert_same(embed(engine, TEXTS), alone)
    assert_same(embed(engine, TEXTS[::-1]), alone[::-1])
    assert np.abs(crowd - alone).max() > 1e-3, "the recipe would not show a difference"


def test_an_end_token_that_only_the_config_demands_is_appended(kit: Kit, tmp_path: Path) -> None:
    """e5-mistral: `add_eos_token: true` beside a tokenizer.json without it; transformers 5 follows the latter."""
    for name, tokenizer in (("whole", vocabularies.llama()), ("lost", vocabularies.llama(with_end=False))):
        config = MistralConfig(vocab_size=len(tokenizer), head_dim=12, sliding_window=None, **SHAPE)
        save(tmp_path / name, transformer(config), tokenizer, [Pooling(WIDTH, "lasttoken")])
    edit_json(tmp_path / "lost/tokenizer_config.json", add_eos_token=True, add_bos_token=True)
    wanted = encode(reference(tmp_path / "whole"), TEXTS)

    assert_same(embed(kit.load(tmp_path / "lost"), TEXTS), wanted)
    assert np.abs(encode(reference(tmp_path / "lost"), TEXTS) - wanted).max() > 1e-2


def test_a_tokenizer_that_truncates_at_the_start_does_so_by_default(kit: Kit, tmp_path: Path) -> None:
    _bert(tmp_path, max_length=32)
    edit_json(tmp_path / "tokenizer_config.json", truncation_side="left")
    engine = kit.load(tmp_path)

    assert_same(embed(engine, TEXTS), encode(reference(tmp_path), TEXTS))
    assert np.abs(embed(engine, TEXTS, truncate="end") - embed(engine, TEXTS)).max() > 1e-2
    assert_same(embed(kit.load(tmp_path, truncate="end"), TEXTS), embed(engine, TEXTS, truncate="end"))


def test_padding_on_the_left_shifts_no_positions(kit: Kit, tmp_path: Path) -> None:
    """sentence-transformers counts BERT's positions from the start of the padding: a vector depends on other texts."""
    _bert(tmp_path, max_length=64)
    edit_json(tmp_path / "tokenizer_config.json", padding_side="left")
    model = reference(tmp_path)
    alone = np.concatenate([encode(model, [one]) for one in TEXTS])

    assert_same(embed(kit.load(tmp_path), TEXTS), alone)
    assert np.abs(encode(model, TEXTS) - alone).max() > 1e-2, "the recipe would not show a difference"


def test_the_limit_that_a_folder_gives_its_tokenizer_counts_more_than_others(kit: Kit, tmp_path: Path) -> None:
    _bert(tmp_path, max_length=64)
    edit_json(tmp_path / "sentence_bert_config.json", processor_kwargs={"model_max_length": 20})

    assert reference(tmp_path).max_seq_length == 20
    assert kit.load(tmp_path).info.max_tokens == 20


def test_modules_may_be_in_folders_of_their_own(kit: Kit, tmp_path: Path) -> None:
    _bert(tmp_path, max_length=64)
    wanted = embed(kit.load(tmp_path), TEXTS)
    (tmp_path / "0_Transformer").mkdir()
    for file in (
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "sentence_bert_config.json",
    ):
        (tmp_path / file).rename(tmp_path / "0_Transformer" / file)
    lines = json.loads((tmp_path / "modules.json").read_text())
    lines[0]["path"] = "0_Transformer"
    (tmp_path / "modules.json").write_text(json.dumps(lines))

    assert_same(encode(reference(tmp_path), TEXTS), wanted)
    assert_same(embed(kit.load(tmp_path), TEXTS), wanted)


def test_a_model2vec_table_is_unfolded(kit: Kit, tmp_path: Path) -> None:
    tokenizer = vocabularies.bare()
    size = tokenizer.get_vocab_size()
    torch.manual_seed(3)
    tables = {
        "embeddings": torch.randn(50, 24).half(),
        "mapping": torch.randint(0, 50, (size,)),
        "weights": torch.rand(size).double() + 0.5,
    }
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    save_file(tables, tmp_path / "model.safetensors")
    kind = "sentence_transformers.models.StaticEmbedding"
    (tmp_path / "modules.json").write_text(json.dumps([{"idx": 0, "name": "0", "path": ".", "type": kind}]))
    model = SentenceTransformer(str(tmp_path), device="cpu").float()

    assert_same(embed(kit.load(tmp_path), TEXTS), encode(model, TEXTS))


def test_a_static_text_without_any_known_token_is_zero(kit: Kit) -> None:
    assert not embed(kit.engine("static"), [" "]).any()


def test_a_text_without_a_token_is_refused_where_it_would_get_another_texts_vector(kit: Kit, tmp_path: Path) -> None:
    tokenizer = vocabularies.qwen(with_specials=False)
    config = LlamaConfig(vocab_size=len(tokenizer), **SHAPE)
    save(tmp_path, transformer(config), tokenizer, [Pooling(WIDTH, "lasttoken")])
    engine = kit.load(tmp_path, pooling=("lasttoken",))

    with pytest.raises(InvalidValue, match=r"input\[1\] has no token"):
        embed(engine, ["a text", "", "another"])
    with pytest.raises(InvalidValue, match=r"input\[0\] has no token"):
        answer(engine, token_ids=((),))


def test_a_token_without_a_row_in_the_table_fails_its_own_request_only(kit: Kit, tmp_path: Path) -> None:
    """Tokens were added to the tokenizer, but the model was not resized."""
    tokenizer = vocabularies.bert()
    save(tmp_path, transformer(bert_config(tokenizer)), tokenizer, [Pooling(WIDTH, "mean")])
    backend = json.loads((tmp_path / "tokenizer.json").read_text())
    extra = {**backend["added_tokens"][-1], "id": len(tokenizer), "content": "<|extra|>"}
    backend["added_tokens"].append(extra)
    (tmp_path / "tokenizer.json").write_text(json.dumps(backend))
    engine = kit.load(tmp_path)

    with pytest.raises(InvalidTokenId, match=rf"input\[1\] holds token id {len(tokenizer)}"):
        embed(engine, ["fine", "not <|extra|> fine"])
    assert embed(engine, ["fine"]).shape == (1, WIDTH)


def _bert(folder: Path, max_length: int) -> None:
    tokenizer = vocabularies.bert()
    save(folder, transformer(bert_config(tokenizer)), tokenizer, [Pooling(WIDTH, "mean")], max_length=max_length)


def test_ids_without_the_models_special_tokens_are_refused_unless_the_registry_allows_them(kit: Kit) -> None:
    """Ids of OpenAI's tokenizer that are small enough are valid here as well, but they mean other texts."""
    with pytest.raises(InvalidTokenId, match="check_embedding_ctx_length=False"):
        answer(kit.engine("bert-cls"), token_ids=((5, 6, 7),))
    meant = kit.load(kit.recipe_folder("bert-cls"), unframed_token_ids=True)

    assert answer(meant, token_ids=((5, 6, 7),)).token_counts == (3,)
    assert answer(kit.engine("static"), token_ids=((5, 6, 7),)).token_counts == (3,)


@pytest.mark.parametrize("num_words", [90, 5000])
def test_a_prompt_that_is_left_out_is_truncated_as_in_sentence_transformers(kit: Kit, num_words: int) -> None:
    """Where the prompt is longer than the model reads, only the end token is pooled."""
    engine, model = kit.engine("bert-instructor"), kit.reference("bert-instructor")
    prompt = "represent " * num_words
    got = embed(engine, TEXTS, prompt=prompt)

    assert got.any(axis=-1).all()
    assert_same(got, encode(model, TEXTS, prompt=prompt))


def test_a_text_that_its_prompt_displaces_is_refused(kit: Kit, tmp_path: Path) -> None:
    tokenizer = vocabularies.qwen(with_specials=False)
    config = LlamaConfig(vocab_size=len(tokenizer), **SHAPE)
    pooling = Pooling(WIDTH, "mean", include_prompt=False)
    save(tmp_path, transformer(config), tokenizer, [pooling], max_length=16)
    engine = kit.load(tmp_path)

    assert embed(engine, ["a text"], prompt="a prompt: ").any()
    with pytest.raises(InvalidValue, match=r"input\[0\] has 16 tokens, and the first 16 are its prompt"):
        embed(engine, ["a text"], prompt="a long prompt " * 20)
