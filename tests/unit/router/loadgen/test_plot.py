"""The plot of a run is a PNG and shows failures clearly."""

import sys
from pathlib import Path

import numpy as np
import pytest

from router.loadgen.plot import PlotError, draw
from router.loadgen.report import Measured, Report
from tests.testkit.load_reports import measured

RED = (0xA5, 0x34, 0x2B)


def report(*phases: Measured) -> Report:
    return Report(
        url="http://127.0.0.1:6008", model="m3e-base", route="embeddings", dimensions=768, words=12,
        texts_per_request=1, started_at="2026-11-25T12:00:00Z", embedyard="0.1.0", is_whole=True, phases=list(phases),
    )  # fmt: skip


def reds(path: Path) -> int:
    """Count the pixels in the colour of failures."""
    image = pytest.importorskip("matplotlib.image").imread(path)
    return int(np.sum(np.all(np.abs(image[..., :3] - np.array(RED) / 255) < 0.02, axis=-1)))


def test_failures_are_red_and_only_they_are(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    good, bad = measured(20.0, texts=[20, 21, 19], failed=[0, 0, 0]), measured(50.0, texts=[40, 0], failed=[10, 50])
    draw(report(good), tmp_path / "new" / "good.png")
    draw(report(good, bad), tmp_path / "bad.png")

    assert (tmp_path / "bad.png").read_bytes().startswith(b"\x89PNG")
    assert reds(tmp_path / "new" / "good.png") == 0
    assert reds(tmp_path / "bad.png") > 5000


def test_without_matplotlib_it_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)

    with pytest.raises(PlotError, match=r"pip install 'embedyard\[bench\]'"):
        draw(report(), tmp_path / "none.png")
