"""What leaves a fake GPU: cut, normalised, copied back once, and the same as from a CPU."""

import numpy as np
import pytest
import torch

from benchmarks.lib.engine_kit import Kit, answer, cosines
from engines.batching.output import DenseOutput
from engines.spec import Matryoshka
from tests.testkit.fake_gpu import GPU, Finding
from tests.testkit.fake_gpu_kit import FakeGpuKit

COPIED_BACK = Finding("sync", "engines/batching/output.py:_finished", "aten._to_copy.default")
"""The one moment at which the host waits for a batch."""

TEXTS = ("a cat", "a dog sleeps", "the yard keeps a cat and a dog")


@pytest.mark.parametrize("indexes", [None, [2, 0]], ids=["all", "some"])
@pytest.mark.parametrize(
    ("dimensions", "normalized", "pre_norm"), [(16, True, False), (8, False, False), (8, True, True)]
)
def test_vectors_of_a_batch_are_finished_on_the_device_and_copied_once(
    fake: FakeGpuKit, dimensions: int, normalized: bool, pre_norm: bool, indexes: list[int] | None
) -> None:
    output = DenseOutput(dimensions, normalized, pre_norm)
    vectors = torch.randn(3, 16, generator=torch.Generator().manual_seed(1))
    raw = fake.call(lambda: vectors.to(GPU))
    fake.gpu.take()

    got = fake.call(lambda: output.finish(raw, indexes))

    assert fake.gpu.take() == [COPIED_BACK]
    assert np.array_equal(got.rows, output.finish(vectors, indexes).rows)
    assert got.is_finite.all()


def test_rows_for_the_cache_are_copied_once(fake: FakeGpuKit) -> None:
    raw = fake.call(lambda: torch.ones(3, 16).to(GPU))
    fake.gpu.take()

    assert np.array_equal(fake.call(lambda: DenseOutput.cache_rows(raw)).rows, np.ones((3, 16)))
    assert fake.gpu.take() == [COPIED_BACK]


def test_a_request_waits_once_and_gets_the_vectors_of_the_cpu(fake: FakeGpuKit, kit: Kit) -> None:
    engine = fake.load(kit.recipe_folder("qwen3-last"), matryoshka=Matryoshka(minimum=8))
    fake.gpu.take()

    got = fake.embed(engine, texts=TEXTS, dimensions=24)

    assert fake.gpu.take() == [COPIED_BACK]
    assert cosines(got.array(), answer(kit.engine("qwen3-last"), texts=TEXTS, dimensions=24).array()).min() > 0.99
    assert np.allclose(np.linalg.norm(got.array(), axis=1), 1)


def test_requests_of_one_batch_with_different_widths_wait_once_each(fake: FakeGpuKit, kit: Kit) -> None:
    """Each width is finished by itself; what it needs of the batch is chosen without waiting."""
    raw = fake.call(lambda: torch.ones(4, 16).to(GPU))
    fake.gpu.take()

    fake.call(lambda: [DenseOutput(width, True, False).finish(raw, [0, 2]) for width in (8, 16)])

    assert fake.gpu.take() == [COPIED_BACK, COPIED_BACK]
