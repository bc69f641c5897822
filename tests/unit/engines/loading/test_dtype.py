"""The number format of weights that `dtype: auto` means, by device and family."""

from pathlib import Path

import pytest
import torch
from transformers import CONFIG_MAPPING, BertConfig

from benchmarks.lib.engine_kit import Kit
from engines.errors import UnsupportedModel
from engines.loading import builders, loader
from engines.loading.builders import choose_dtype
from engines.loading.dtype import automatic_dtype, dtype_notes, overflows_float16
from engines.spec import Dtype, ModelSpec

T4, A100, H200, P100, V100 = (7, 5), (8, 0), (9, 0), (6, 0), (7, 0)


@pytest.mark.parametrize(
    ("model_type", "device_kind", "capability", "dtype"),
    [
        ("bert", "cpu", None, "float32"),
        ("qwen3", "cpu", None, "float32"),
        ("bert", "cuda", None, "bfloat16"),
        ("bert", "cuda", A100, "bfloat16"),
        ("gemma3_text", "cuda", H200, "bfloat16"),
        ("bert", "cuda", T4, "float16"),
        ("xlm-roberta", "cuda", V100, "float16"),
        ("qwen2", "cuda", T4, "float16"),
        ("qwen3", "cuda", T4, "float32"),
        ("t5", "cuda", T4, "float32"),
        ("gemma3_text", "cuda", T4, "float32"),
        ("embedding_gemma2_text", "cuda", T4, "float32"),
        ("bert", "cuda", P100, "float32"),
        ("gemma2", "cuda", P100, "float32"),
    ],
)
def test_auto_is_the_fastest_format_in_which_the_family_is_right(
    model_type: str, device_kind: str, capability: tuple[int, int] | None, dtype: str
) -> None:
    assert automatic_dtype(model_type, device_kind, capability) == dtype


def test_no_gemma_runs_in_float16() -> None:
    gemmas = [name for name in CONFIG_MAPPING if "gemma" in name]

    assert len(gemmas) > 5
    assert all(overflows_float16(name) for name in gemmas)


@pytest.mark.parametrize(
    ("requested", "used", "capability", "note"),
    [
        ("auto", "float32", None, None),
        ("auto", "bfloat16", A100, None),
        ("bfloat16", "bfloat16", H200, None),
        ("float32", "float32", T4, None),
        ("float16", "float16", T4, None),
        (
            "auto", "float16", T4,
            "float16: a GPU of compute capability 7.5 has neither bfloat16 nor flash attention",
        ),
        (
            "auto", "float32", T4,
            "float32: a GPU of compute capability 7.5 has neither bfloat16 nor flash attention, and its activations "
            "overflow float16",
        ),
        ("auto", "float32", P100, "float32: a GPU of compute capability 6.0 has neither bfloat16 nor flash attention"),
        (
            "bfloat16", "bfloat16", T4,
            "bfloat16: as the registry has it, but a GPU of compute capability 7.5 emulates it slowly",
        ),
    ],
)  # fmt: skip
def test_operators_are_told_of_a_format_that_is_not_the_usual_one(
    requested: Dtype, used: str, capability: tuple[int, int] | None, note: str | None
) -> None:
    assert dtype_notes(requested, used, capability) == (() if note is None else (note,))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_registry_decides_before_the_device(dtype: Dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builders, "compute_capability", lambda device: T4)
    spec = ModelSpec(model_id="m", source="m", dtype=dtype)

    assert choose_dtype(spec, BertConfig(), torch.device("cuda:0")) == getattr(torch, dtype)
    assert choose_dtype(ModelSpec(model_id="m", source="m"), BertConfig(), torch.device("cuda:0")) == torch.float16


def test_float16_is_refused_where_it_overflows() -> None:
    config = CONFIG_MAPPING["embedding_gemma2_text"]()

    with pytest.raises(UnsupportedModel, match="embedding_gemma2_text overflows in float16"):
        choose_dtype(ModelSpec(model_id="m", source="m", dtype="float16"), config, torch.device("cpu"))


def test_the_note_is_shown_with_the_model(kit: Kit, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(loader, "compute_capability", lambda device: T4)
    engine = kit.load(kit.recipe_folder("bert-cls"))

    assert engine.info.notes[0].startswith("float32: a GPU of compute capability 7.5")
