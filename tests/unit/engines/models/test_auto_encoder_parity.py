"""Latents of an autoencoder (CSR) are those of sentence-transformers' SparseEncoder for the same folder."""

from pathlib import Path

import numpy as np
import pytest

from benchmarks.lib.engine_kit import Kit
from benchmarks.lib.models import edit_json
from engines.errors import BrokenFiles, InvalidValue, UnsupportedModel
from tests.testkit.sparse_models import save_auto_encoder, sparse_encode, sparse_reference
from tests.unit.engines.models.test_sparse_parity import TEXTS, assert_same_weights, outputs_of, weights_of


@pytest.mark.parametrize(("normalized", "pooling"), [(False, "mean"), (True, "mean"), (True, "cls")])
def test_the_latents_are_those_of_sentence_transformers(
    kit: Kit, tmp_path: Path, normalized: bool, pooling: str
) -> None:
    save_auto_encoder(tmp_path / "m", normalized=normalized, pooling=pooling)
    engine = kit.load(tmp_path / "m")
    found = weights_of(engine, TEXTS)

    assert_same_weights(found, sparse_encode(sparse_reference(tmp_path / "m"), TEXTS))
    assert (engine.info.outputs, engine.info.vocab_size, engine.info.dimensions) == (("sparse",), 160, 0)
    assert 0 < (found != 0).sum(1).min() <= (found != 0).sum(1).max() <= 12


def test_a_text_has_the_same_latents_alone(kit: Kit, tmp_path: Path) -> None:
    save_auto_encoder(tmp_path / "m")
    engine = kit.load(tmp_path / "m")

    np.testing.assert_allclose(
        np.concatenate([weights_of(engine, [text]) for text in TEXTS]), weights_of(engine, TEXTS), atol=1e-5
    )


def test_a_limit_in_the_folder_and_prompts_are_obeyed(kit: Kit, tmp_path: Path) -> None:
    save_auto_encoder(tmp_path / "m", max_active_dims=5, prompts={"query": "find this: ", "document": ""})
    engine, reference = kit.load(tmp_path / "m"), sparse_reference(tmp_path / "m")
    found = weights_of(engine, TEXTS, input_type="query")

    assert_same_weights(found, sparse_encode(reference, TEXTS, prompt_name="query"))
    assert (found != 0).sum(1).max() == 5


def test_latents_have_no_tokens(kit: Kit, tmp_path: Path) -> None:
    save_auto_encoder(tmp_path / "m")
    engine = kit.load(tmp_path / "m")

    with pytest.raises(InvalidValue, match="no tokens: omit return_tokens"):
        outputs_of(engine, TEXTS, "sparse", names_terms=True)


def test_weights_that_do_not_fit_are_refused(kit: Kit, tmp_path: Path) -> None:
    save_auto_encoder(tmp_path / "m")
    edit_json(tmp_path / "m" / "2_SparseAutoEncoder" / "config.json", hidden_dim=161)

    with pytest.raises(BrokenFiles, match="no matrix of 161 x 48"):
        kit.load(tmp_path / "m")


def test_pooling_without_the_prompt_is_refused(kit: Kit, tmp_path: Path) -> None:
    save_auto_encoder(tmp_path / "m")
    edit_json(tmp_path / "m" / "1_Pooling" / "config.json", include_prompt=False)

    with pytest.raises(UnsupportedModel, match="include_prompt"):
        kit.load(tmp_path / "m")
