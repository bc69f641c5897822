"""Every family of the parity table on every path that it has on a GPU, on a fake one (`tests/testkit/fake_gpu.py`).

A family comes in by its recipe in `benchmarks/lib/models.py`, unless `VARIANTS` (`tests/testkit/fake_gpu_families.py`)
leaves it out, and needs nothing here if its first path is a recorded one (or padded, as the recipe states); else add a
line to `FIRST`. What it does on purpose that is found (a sync, or float32) gets a line with the reason in `INTENDED`
(`tests/testkit/fake_gpu_families.py`). An encoder that is called in another way than with texts gets its passes in
`_runs` there.
"""

import pytest
import torch

from benchmarks.lib.engine_kit import Kit, assert_same, cosines
from benchmarks.lib.models import RECIPES
from engines.models.base import ForwardPath, attention_of
from engines.models.transformer import TransformerEncoder
from tests.testkit.fake_gpu import GPU, twin
from tests.testkit.fake_gpu_families import INTENDED, NAMES, VARIANTS, Families, encoder_of, texts_for, unintended
from tests.testkit.fake_gpu_kit import FakeGpuKit

pytestmark = pytest.mark.slow

_BY_LENGTH = "its attention runs by text length, which differs between the rows of a CUDA graph"

FIRST: dict[str, tuple[ForwardPath, tuple[str, ...]]] = {
    "mpnet-mean": ("fused", (f"fused: {_BY_LENGTH}",)),
    "t5-mean-dense": ("packed", (f"packed: {_BY_LENGTH}",)),
    "static": ("packed", ()),
}
"""Path and notes of the families that do not take the first path there is; a position bias has no kernel for rows."""

REFUSED = {
    "gemma2-last": {
        "graphed": "its attention has soft-capped scores",
        "packed": "its attention has soft-capped scores",
    },
    "mpnet-mean": {"graphed": _BY_LENGTH},
    "t5-mean-dense": {"graphed": _BY_LENGTH},
}
"""Paths that a family cannot run, and the first words of the reason."""

SMALLEST_COSINE = 0.95
"""With float32; most have 0.999, ELECTRA's random weights turn bfloat16's rounding into 0.97. Two texts have less."""


@pytest.fixture(scope="module")
def families(fake: FakeGpuKit, kit: Kit) -> Families:
    return Families(fake, kit)


@pytest.mark.parametrize("name", NAMES)
def test_loading_and_the_check_mix_no_devices_and_choose_the_expected_path(families: Families, name: str) -> None:
    recipe, info = RECIPES[name], families[name].info
    path, notes = FIRST.get(name, ("padded" if recipe.padded_because else "graphed", ()))

    assert [finding for finding in families[name].loaded if finding.kind == "device"] == []
    assert (info.path, info.dtype) == (path, "float32" if name == "static" else "bfloat16")
    assert [recipe.padded_because in note for note in info.notes] if recipe.padded_because else info.notes == notes


@pytest.mark.parametrize("name", NAMES)
def test_no_path_mixes_devices_waits_for_the_host_or_computes_in_float32(families: Families, name: str) -> None:
    for path, one in families[name].paths.items():
        assert unintended(one.findings, attention_of(path)) == [], path


@pytest.mark.parametrize("name", NAMES)
def test_every_path_gives_the_vectors_of_float32(families: Families, name: str) -> None:
    expected = families.expected(name)
    for path, one in families[name].paths.items():
        for what, vectors in one.vectors.items():
            assert cosines(vectors, expected[what]).min() >= SMALLEST_COSINE, (path, what)


@pytest.mark.parametrize("name", NAMES)
def test_only_the_paths_that_are_known_to_be_refused_are(families: Families, name: str) -> None:
    refused = {path: one.refused for path, one in families[name].paths.items() if one.refused}

    assert list(refused) == list(REFUSED.get(name, {}))
    for path, start in REFUSED.get(name, {}).items():
        assert refused[path].startswith(start)  # type: ignore[index]  # the names of paths


@pytest.mark.parametrize("name", ["bert-cls", "gemma3-bidirectional", "mistral-last", "modernbert-cls"])
def test_without_a_kernel_for_rows_nothing_waits_either(fake: FakeGpuKit, kit: Kit, name: str) -> None:
    """In float32 attention runs by text length, and with masks where there is a window."""
    encoder = encoder_of(fake.load(kit.recipe_folder(name), dtype="float32", **RECIPES[name].spec))
    texts = texts_for(encoder)
    fake.gpu.take()

    vectors = fake.call(lambda: twin(encoder(texts)))

    assert (encoder.attention, fake.gpu.take()) == ("packed", [])
    assert_same(vectors.numpy(), encoder_of(kit.engine(name))(texts).numpy())


@pytest.mark.parametrize("name", NAMES)
def test_all_that_a_model_holds_is_on_the_gpu_and_in_bfloat16(families: Families, name: str) -> None:
    """But the frequencies of rotary embeddings, and the modules after the transformer."""
    encoder = encoder_of(families[name].engine)
    tensors = encoder.tensors()  # type: ignore[attr-defined]  # a loader made it

    assert {tensor.device for tensor in tensors} == {GPU}
    if isinstance(encoder, TransformerEncoder):
        assert {weight.dtype for weight in encoder._model.parameters()} == {torch.bfloat16}


def test_whatever_is_intended_is_found_somewhere(families: Families) -> None:
    assert [item for item in INTENDED if item not in families.used()] == []


def test_what_is_left_out_is_a_recipe_of_a_bert() -> None:
    assert {RECIPES[name].family for name in VARIANTS} == {"bert"}
