"""Vectors of reduced dtypes against sentence-transformers' float32, of encoders, decoders and state spaces."""

import pytest

from benchmarks.lib.engine_kit import Kit, cosines, embed, encode
from benchmarks.lib.models import RECIPES
from benchmarks.lib.workloads import SENTENCES
from engines.errors import UnsupportedModel

TEXTS = [*SENTENCES[:6], " ".join(SENTENCES[:4]), "x"]


@pytest.mark.parametrize(
    ("name", "dtype", "least"),
    [
        ("bert-cls", "bfloat16", 0.999),
        ("bert-cls", "int8", 0.99),
        ("mpnet-mean", "int8", 0.99),
        ("distilbert-mean", "int8", 0.99),
        ("qwen3-last", "bfloat16", 0.999),
        ("qwen3-last", "int8", 0.98),
        ("jamba-mean", "bfloat16", 0.99),
    ],
)
def test_vectors_of_a_reduced_dtype_are_near_those_of_sentence_transformers(
    kit: Kit, name: str, dtype: str, least: float
) -> None:
    engine = kit.load(kit.recipe_folder(name), dtype=dtype, **RECIPES[name].spec)

    got = embed(engine, TEXTS)

    assert engine.info.dtype == dtype
    assert cosines(got, encode(kit.reference(name), TEXTS)).min() > least
    engine.close()


def test_int8_of_a_model_with_state_spaces_is_refused_with_the_remedy(kit: Kit) -> None:
    with pytest.raises(UnsupportedModel, match="int8` is not supported for jamba: set another"):
        kit.load(kit.recipe_folder("jamba-mean"), dtype="int8", **RECIPES["jamba-mean"].spec)
