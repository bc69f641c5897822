"""Observing one pass of a model: its width, its number of positions, and whether packing hides what its masks hide."""

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers.sentence_transformer.modules import Pooling
from torch import Tensor, nn
from transformers import (
    AutoModel,
    CLIPTextConfig,
    EmbeddingGemma2Config,
    EmbeddingGemma2TextConfig,
    GPT2Config,
    GPTNeoConfig,
    Llama4TextConfig,
    MistralConfig,
    OPTConfig,
    PhimoeConfig,
)

from benchmarks.lib import vocabularies
from benchmarks.lib.engine_kit import Kit, assert_same, embed, encode
from benchmarks.lib.models import WIDTH, configure, edit_json, reference, save, to_legacy, transformer
from benchmarks.lib.workloads import text
from engines.errors import UnsupportedModel
from engines.models.adapters import switch_attention
from engines.models.observation import BOUNDED_ROWS, NOT_UNDERSTOOD, Call, Observed, observe
from engines.planner import native_width
from engines.spec import ModelSpec
from tests.testkit.model_folders import POOLING, TRANSFORMER, write_json, write_modules

SHAPE: dict[str, Any] = {
    "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96,
}  # fmt: skip
GROUPED: dict[str, Any] = {**SHAPE, "num_key_value_heads": 4, "max_position_embeddings": 512}
TEXTS = [text(8, 1), text(60, 2), text(300, 3)]
CPU = torch.device("cpu")


def _build(folder: Path, config: Any, tokenizer: Any, *, width: int = WIDTH, max_length: int | None = 400) -> Path:
    save(folder, transformer(config), tokenizer, [Pooling(width, "mean")])
    to_legacy(folder, max_length=max_length)
    return folder


# Masks.


def _chunked(vocab_size: int, chunk_size: int) -> Any:
    return configure(
        Llama4TextConfig, vocab_size=vocab_size, attention_chunk_size=chunk_size, num_local_experts=2,
        intermediate_size_mlp=96, head_dim=12, pad_token_id=0, no_rope_layers=[1, 1], **GROUPED,
    )  # fmt: skip


def _moe(vocab_size: int, window: int) -> Any:
    """A model whose masks have a window that its attention calls do not state."""
    return configure(
        PhimoeConfig, vocab_size=vocab_size, sliding_window=window, num_local_experts=4, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, **GROUPED,
    )  # fmt: skip


@pytest.mark.parametrize("size", [100, 140, 300])
@pytest.mark.parametrize("config", [_chunked, _moe])
def test_models_with_windows_and_chunks_that_no_call_states_are_not_packed(
    kit: Kit, tmp_path: Path, config: Callable[[int, int], Any], size: int
) -> None:
    tokenizer = vocabularies.llama()
    engine = kit.load(_build(tmp_path, config(len(tokenizer), size), tokenizer))

    assert_same(embed(engine, TEXTS), encode(reference(tmp_path), TEXTS))
    assert engine.info.attention == "padded"
    assert NOT_UNDERSTOOD in engine.info.notes


@pytest.mark.parametrize("config", [_chunked, _moe])
def test_a_window_longer_than_the_longest_text_hides_nothing(
    kit: Kit, tmp_path: Path, config: Callable[[int, int], Any]
) -> None:
    tokenizer = vocabularies.llama()
    engine = kit.load(_build(tmp_path, config(len(tokenizer), 400), tokenizer))

    assert_same(embed(engine, TEXTS), encode(reference(tmp_path), TEXTS))
    assert (engine.info.attention, engine.info.notes) == ("packed", ())


@pytest.mark.parametrize("window", [100, 140, 300])
def test_a_model_whose_calls_state_their_window_is_packed(kit: Kit, tmp_path: Path, window: int) -> None:
    tokenizer = vocabularies.llama()
    config = MistralConfig(vocab_size=len(tokenizer), sliding_window=window, head_dim=12, **GROUPED)
    engine = kit.load(_build(tmp_path, config, tokenizer))

    assert_same(embed(engine, TEXTS), encode(reference(tmp_path), TEXTS))
    assert engine.info.attention == "packed"


OWN_MASKS = """\
import torch
from transformers import BertConfig, BertModel


class OwnConfig(BertConfig):
    model_type = "own"


class OwnModel(BertModel):
    config_class = OwnConfig

    def forward(self, input_ids, attention_mask=None, position_ids=None, **options):
        if attention_mask is not None:
            place = torch.arange(input_ids.shape[1])
            near = (place[:, None] - place[None, :]).abs() < self.config.local_window
            attention_mask = near[None, None] & attention_mask[:, None, None, :].bool()
        return super().forward(input_ids, attention_mask=attention_mask, position_ids=position_ids, **options)
"""


@pytest.mark.parametrize(("window", "attention"), [(100, "padded"), (140, "padded"), (256, "packed")])
def test_masks_of_a_models_own_forward_are_found(
    kit: Kit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, window: int, attention: str
) -> None:
    """They are made only where there is a padding mask, which packed texts do not have."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "code"))
    folder = Path(shutil.copytree(kit.recipe_folder("bert-cls"), tmp_path / "model"))
    (folder / "own.py").write_text(OWN_MASKS)
    auto = {"AutoConfig": "own.OwnConfig", "AutoModel": "own.OwnModel"}
    edit_json(
        folder / "config.json", model_type="own", architectures=["OwnModel"], auto_map=auto, local_window=window,
    )  # fmt: skip
    to_legacy(folder, max_length=256)
    engine = kit.load(folder, trust_remote_code=True, revision="f" * 40)
    model = reference(folder, trust_remote_code=True)

    assert_same(embed(engine, TEXTS), encode(model, TEXTS))
    assert engine.info.attention == attention


def _causal_pattern(query: int, num_keys: int) -> Tensor:
    return torch.arange(num_keys) <= query


def _window_pattern(query: int, num_keys: int) -> Tensor:
    return (torch.arange(num_keys) - query).abs() < 50


def _broken_pattern(query: int, num_keys: int) -> Tensor:
    raise IndexError


@pytest.mark.parametrize(
    ("call", "fits"),
    [
        (Call(causal=True, window=None, own=None, pattern=_causal_pattern), True),
        (Call(causal=False, window=None, own=None, pattern=_causal_pattern), False),
        (Call(causal=True, window=90, own=None, pattern=_causal_pattern), False),
        (Call(causal=True, window=200, own=None, pattern=_causal_pattern), True),
        (Call(causal=False, window=50, own=None, pattern=_window_pattern), True),
        (Call(causal=False, window=51, own=None, pattern=_window_pattern), False),
        (Call(causal=False, window=49, own=None, pattern=_window_pattern), False),
        (Call(causal=False, window=None, own=None, pattern=_window_pattern), False),
        (Call(causal=True, window=50, own=None, pattern=_window_pattern), False),
        (Call(causal=True, window=None, own=None, pattern=_broken_pattern), False),
        (Call(causal=True, window=None, own=torch.ones(5, 5).tril().bool(), pattern=None), True),
        (Call(causal=False, window=None, own=torch.ones(5, 5).tril().bool(), pattern=None), False),
        (Call(causal=True, window=None, own=None, pattern=None), True),
        (Call(causal=True, window=90, own=None, pattern=None), False),
    ],
)
def test_a_call_must_state_what_its_mask_hides(call: Call, fits: bool) -> None:
    assert (Observed(calls=(call,)).why_not_packed(200) == ()) == fits


@pytest.mark.parametrize(("windows", "fits"), [((), True), ((4096,), True), ((100,), False), ((4096, 3), False)])
def test_without_observed_calls_the_windows_of_the_config_decide(windows: tuple[int, ...], fits: bool) -> None:
    own = Call(causal=False, window=None, own=torch.ones(5, 5, dtype=torch.bool), pattern=None)

    assert (Observed(windows=windows).why_not_packed(200) == ()) == fits
    assert (Observed(windows=windows, calls=(own,)).why_not_packed(200) == ()) == fits


def test_observing_does_not_change_a_model() -> None:
    model: Any = transformer(MistralConfig(vocab_size=90, sliding_window=9, head_dim=12, **GROUPED))
    ids = torch.arange(40)[None]
    with torch.inference_mode():
        before = model(input_ids=ids).last_hidden_state
        observe(model, 90, CPU)

        assert torch.equal(model(input_ids=ids).last_hidden_state, before)


# The number of positions.


def _roberta_sized(kind: Any, **options: Any) -> Any:
    tokenizer = vocabularies.roberta()
    return configure(kind, vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=2, pad_token_id=1, **options)


TABLES = [
    _roberta_sized(GPT2Config, n_embd=WIDTH, n_layer=2, n_head=4, n_positions=150),
    _roberta_sized(
        OPTConfig, hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=4, ffn_dim=96,
        max_position_embeddings=150, word_embed_proj_dim=WIDTH,
    ),
    _roberta_sized(
        GPTNeoConfig, hidden_size=WIDTH, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]],
        window_size=20, max_position_embeddings=150,
    ),
    _roberta_sized(CLIPTextConfig, max_position_embeddings=150, **SHAPE),
]  # fmt: skip


@pytest.mark.parametrize("config", TABLES, ids=lambda config: config.model_type)
def test_a_table_of_positions_of_any_name_limits_the_tokens(kit: Kit, tmp_path: Path, config: Any) -> None:
    folder = _build(tmp_path, config, vocabularies.roberta())
    engine = kit.load(folder)
    attention = engine.info.attention
    model = reference(folder)
    model.max_seq_length = 150

    assert engine.info.max_tokens == 150
    assert (BOUNDED_ROWS in engine.info.notes) == (config.model_type == "clip_text_model")
    assert_same(embed(engine, TEXTS), encode(model, TEXTS))
    assert engine._runner is not None
    assert engine._runner._encoder.attention == attention, "no path is left"


class Places(nn.Module):
    """A model whose positions are looked up by a given function, offset by two."""

    def __init__(self, look_up: Callable[["Places", Tensor], Tensor]) -> None:
        super().__init__()
        self.config = type("Config", (), {"_attn_implementation": "eager", "get_text_config": lambda self: self})()
        self.config.to_dict = lambda: {"max_window_layers": 3, "sliding_window": 7, "num_blocks": 1}
        self.words = nn.Embedding(10, 4)
        self.places = nn.Embedding(32, 4)
        self.parameter = nn.Parameter(torch.zeros(32, 4))
        self.register_buffer("rows", torch.zeros(1, 32, 4))
        self._look_up = look_up

    def _can_set_attn_implementation(self) -> bool:
        return False

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        place = torch.arange(2, 2 + input_ids.shape[1])
        hidden = self.words(input_ids) + self._look_up(self, place)
        return type("Output", (), {"last_hidden_state": hidden})


@pytest.mark.parametrize(
    ("look_up", "limit"),
    [
        (lambda self, place: self.places(place), 30),
        (lambda self, place: nn.functional.embedding(place[None], self.parameter), 30),
        (lambda self, place: self.parameter[place], 30),
        (lambda self, place: self.parameter[2 : 2 + len(place)], 30),
        (lambda self, place: self.parameter[: len(place), :], 32),
        (lambda self, place: torch.gather(self.rows, 1, place[None, :, None].expand(1, -1, 4)), 30),
        (lambda self, place: self.places(place * 0), None),
        (lambda self, place: self.parameter[:, None, 0].sum(), None),
        (lambda self, place: place[:, None] * 0.1, None),
    ],
    ids=["embedding", "function", "indexed", "slice", "first rows", "gather", "constant", "no rows", "computed"],
)
def test_a_table_of_positions_is_recognized_by_consecutive_rows(
    look_up: Callable[[Any, Tensor], Tensor], limit: int | None
) -> None:
    seen = observe(Places(look_up), 10, CPU)

    assert (seen.position_limit, seen.width, seen.calls, seen.windows) == (limit, 4, None, (7,))


def test_a_pass_that_fails_shows_nothing() -> None:
    def fail(*_: Any) -> Tensor:
        raise KeyError

    assert observe(Places(fail), 10, CPU) == Observed(windows=(7,))


# The width of a model.


def _gemma(**options: Any) -> EmbeddingGemma2TextConfig:
    config: EmbeddingGemma2TextConfig = configure(
        EmbeddingGemma2TextConfig, vocab_size=len(vocabularies.gemma()), head_dim=12, global_head_dim=24,
        num_global_key_value_heads=1, sliding_window=20, hidden_size_per_layer_input=8, embedding_dim=64,
        layer_types=["sliding_attention", "full_attention"], **GROUPED, **options,
    )  # fmt: skip
    return config


def test_the_width_of_a_model_with_a_projection_is_that_of_its_output(kit: Kit, tmp_path: Path) -> None:
    folder = _build(tmp_path, _gemma(), vocabularies.gemma(), width=64)
    engine = kit.load(folder)

    assert engine.info.dimensions == 64
    assert native_width(folder, ModelSpec(model_id="m", source="s")) == 64
    assert engine.info.attention == "packed"
    assert_same(embed(engine, TEXTS), encode(reference(folder), TEXTS))


def test_a_config_with_the_padding_token_in_its_text_config_is_served(kit: Kit, tmp_path: Path) -> None:
    """EmbeddingGemma 2 as it is published, without its image and audio models."""
    config = configure(
        EmbeddingGemma2Config, text_config=_gemma().to_dict(), image_token_id=3, video_token_id=3, audio_token_id=3
    )
    model: Any = transformer(config)
    tokenizer = vocabularies.gemma()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    write_modules(tmp_path, [("", TRANSFORMER), ("1_Pooling", POOLING)])
    write_json(tmp_path / "1_Pooling/config.json", {"pooling_mode": "mean", "embedding_dimension": 64})
    assert not hasattr(AutoModel.from_pretrained(tmp_path).config, "pad_token_id")
    engine = kit.load(tmp_path)
    alone = []
    with torch.inference_mode():
        for one in TEXTS:
            hidden = model(**tokenizer(one, return_tensors="pt", truncation=True, max_length=512)).last_hidden_state
            alone.append(nn.functional.normalize(hidden[0].mean(0), dim=0).numpy())

    assert engine.info.dimensions == native_width(tmp_path, ModelSpec(model_id="m", source="s")) == 64
    assert_same(embed(engine, TEXTS), np.stack(alone))


def test_a_model_with_a_part_that_lacks_the_attention_function_is_refused() -> None:
    class Composite:
        config = SimpleNamespace(model_type="gemma4")

        def _can_set_attn_implementation(self) -> bool:
            return True

        def set_attn_implementation(self, name: str) -> None:
            raise ValueError(f"Gemma4AudioModel does not support {name}")

    with pytest.raises(UnsupportedModel, match="a gemma4, a part of which cannot use the attention"):
        switch_attention(Composite(), "sdpa")
