"""Rerankers and classifiers on a fake GPU: their heads on every path, how they load, and what leaves the device.

A family comes in by its folder in `tests/testkit/rerankers.py`, unless `VARIANTS` (`tests/testkit/fake_gpu_scores.py`)
leaves it out.
"""

import asyncio

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from benchmarks.lib.engine_kit import Kit
from engines.batching.scores import ScoreOutput
from engines.models import cuda_graphs
from engines.models.base import ForwardPath, Size, attention_of
from engines.models.score_head import TOLERANCE, ScoreHead
from engines.models.transformer import TransformerEncoder
from engines.types import ScoreCall, Scores
from tests.testkit.fake_gpu import GPU, Finding, twin
from tests.testkit.fake_gpu_families import encoder_of, texts_for, unintended
from tests.testkit.fake_gpu_kit import FakeGpuKit
from tests.testkit.fake_gpu_scores import NAMES, SCORES_INTENDED, ScoreFamilies
from tests.testkit.rerankers import FAMILIES, scores

pytestmark = pytest.mark.slow

FIRST: dict[str, ForwardPath] = {"deberta-v2": "padded", "gemma2": "padded", "mpnet": "fused"}
"""Families that cannot be recorded: their attention has no kernel for rows."""

COPIED_BACK = Finding("sync", "engines/batching/output.py:_finished", "aten._to_copy.default")
"""The one moment at which the host waits for a batch."""

PAIRS = (("what is kept?", "The yard keeps a cat."), ("what is kept?", "It does."))


@pytest.fixture(scope="module")
def families(fake: FakeGpuKit, kit: Kit, tmp_path_factory: pytest.TempPathFactory) -> ScoreFamilies:
    return ScoreFamilies(fake, kit, tmp_path_factory.mktemp("rerankers"))


def assert_close(found: NDArray[np.float32], wanted: NDArray[np.float32]) -> None:
    """Asserts that scores in bfloat16 are those in float32, as close as the check at load asks for."""
    assert np.abs(found - wanted).max() <= TOLERANCE[torch.bfloat16] * np.abs(wanted).max()


@pytest.mark.parametrize("name", NAMES)
def test_loading_mixes_no_devices_and_chooses_the_first_path_there_is(families: ScoreFamilies, name: str) -> None:
    info = families[name].info

    assert [finding for finding in families[name].loaded if finding.kind == "device"] == []
    assert (info.path, info.dtype) == (FIRST.get(name, "graphed"), "bfloat16")


@pytest.mark.parametrize("name", NAMES)
def test_no_path_waits_for_the_host_or_computes_in_float32_before_the_head(families: ScoreFamilies, name: str) -> None:
    for path, one in families[name].paths.items():
        assert unintended(one.findings, attention_of(path), SCORES_INTENDED) == [], path


@pytest.mark.parametrize("name", NAMES)
def test_every_path_gives_the_scores_of_float32(families: ScoreFamilies, name: str) -> None:
    expected = families.expected(name)
    for one in families[name].paths.values():
        for what, found in one.vectors.items():
            assert_close(found, expected[what])


@pytest.mark.parametrize("name", NAMES)
def test_heads_are_on_the_gpu_in_float32_and_backbones_in_bfloat16(families: ScoreFamilies, name: str) -> None:
    encoder = encoder_of(families[name].engine)
    assert isinstance(encoder, TransformerEncoder)

    assert {tensor.device for tensor in encoder.tensors()} == {GPU}
    assert {weight.dtype for weight in encoder._model.parameters()} == {torch.bfloat16}
    assert {weight.dtype for weight in encoder._chain.weights if weight.is_floating_point()} == {torch.float32}


def test_rows_that_are_shorter_than_a_template_are_not_recorded(
    fake: FakeGpuKit, families: ScoreFamilies, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No text of the check fits into them, nor does any pair; the larger ones serve."""
    small, large = Size(32, 16), Size(256, 64)
    monkeypatch.setattr(cuda_graphs, "SIZES", (small, large))
    folder, spec = families.source("qwen3-reranker")

    encoder = encoder_of(fake.load(folder, **spec))

    assert isinstance(encoder, TransformerEncoder)
    assert (encoder.path, encoder.sizes) == ("graphed", (large,))


def test_a_sync_in_a_head_is_found(fake: FakeGpuKit, families: ScoreFamilies, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = encoder_of(families["bert-multi-label"].engine)
    assert isinstance(encoder, TransformerEncoder)
    right = ScoreHead._logits
    monkeypatch.setattr(ScoreHead, "_logits", lambda head, rows: right(head, rows.cpu().to(rows.device)))
    fake.call(lambda: encoder.switch_to("fused"))
    fake.gpu.take()

    fake.passes(lambda: encoder(texts_for(encoder)))

    found = unintended(fake.gpu.take(), encoder.attention, SCORES_INTENDED)
    assert {(finding.kind, finding.place) for finding in found} == {
        ("sync", "engines/models/score_head.py:ScoreHead.__call__")
    }


@pytest.mark.parametrize("indexes", [None, [2, 0]], ids=["all", "some"])
@pytest.mark.parametrize("activation", ["Identity", "Sigmoid", "Softmax"])
def test_scores_of_a_batch_are_finished_on_the_device_and_copied_once(
    fake: FakeGpuKit, activation: str, indexes: list[int] | None
) -> None:
    output = ScoreOutput(labels=("a", "b", "c"), activation=activation)
    logits = torch.randn(3, 3, generator=torch.Generator().manual_seed(1))
    raw = fake.call(lambda: logits.to(GPU))
    fake.gpu.take()

    got = fake.call(lambda: output.finish(raw, indexes))

    assert fake.gpu.take() == [COPIED_BACK]
    assert np.array_equal(got.rows, output.finish(logits, indexes).rows)
    assert got.is_finite.all()


def test_logits_for_the_cache_are_copied_once(fake: FakeGpuKit) -> None:
    raw = fake.call(lambda: torch.ones(3, 2).to(GPU))
    fake.gpu.take()

    assert np.array_equal(fake.call(lambda: ScoreOutput.cache_rows(raw)).rows, np.ones((3, 2)))
    assert fake.gpu.take() == [COPIED_BACK]


@pytest.mark.parametrize("name", ["bert-multi-label", "qwen3-reranker"])
def test_a_request_waits_once_and_gets_the_scores_of_the_cpu(
    fake: FakeGpuKit, families: ScoreFamilies, name: str
) -> None:
    engine, encoder = families[name].engine, encoder_of(families[name].engine)
    assert isinstance(encoder, TransformerEncoder)
    fake.call(lambda: encoder.switch_to(encoder.candidate_paths()[0]))
    fake.gpu.take()
    queries, texts = zip(*PAIRS, strict=True)

    got = asyncio.run(engine.run(ScoreCall(model_id="m", texts=texts, queries=queries, activation="none")))

    assert fake.gpu.take() == [COPIED_BACK]
    assert isinstance(got, Scores)
    assert_close(got.array(), scores(families.on_cpu(name), PAIRS, activation="none"))


def test_the_gpu_has_the_scores(fake: FakeGpuKit) -> None:
    """What tests above read is of the device, not of a twin that was never there."""
    raw = fake.call(lambda: torch.ones(1, 2, device=GPU))

    assert (raw.device, twin(raw).tolist()) == (GPU, [[1.0, 1.0]])


def test_what_is_left_out_is_a_family() -> None:
    assert set(NAMES) < set(FAMILIES)
