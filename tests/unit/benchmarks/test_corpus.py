import numpy as np
import pytest
from numpy.typing import NDArray

from benchmarks.offline.corpus import BASE, LOOP, OURS, distances

VECTORS = np.full((3, 4), 0.5, np.float32)


def test_rounding_is_reported() -> None:
    off_by = distances({OURS: VECTORS + np.float32(1e-6), LOOP: VECTORS, BASE: VECTORS})

    assert off_by[OURS] == pytest.approx(1e-6, rel=0.1)
    assert off_by[LOOP] == off_by[BASE] == 0


@pytest.mark.parametrize("found", [VECTORS + np.float32(1e-3), VECTORS[:2], VECTORS * np.float32(np.nan)])
def test_other_vectors_end_the_run(found: NDArray[np.float32]) -> None:
    with pytest.raises(SystemExit, match=r"embedyard embed: other vectors than SentenceTransformer.encode"):
        distances({OURS: found, BASE: VECTORS})
