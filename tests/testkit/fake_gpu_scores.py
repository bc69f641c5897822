"""Runs rerankers and classifiers on their paths on the fake GPU, as `fake_gpu_families.py` runs recipes."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from benchmarks.lib.engine_kit import Kit
from benchmarks.lib.models import quiet, wider
from engines.batching.engine import EmbeddingEngine
from tests.testkit import rerankers
from tests.testkit.fake_gpu_families import INTENDED, Families, Intended
from tests.testkit.fake_gpu_kit import FakeGpuKit
from tests.testkit.rerankers import FAMILIES

VARIANTS = {
    "bert-legacy-identity", "bert-modules", "bert-tanh", "bert-prompt", "bert-left", "roberta-nli", "modernbert-cls",
    "electra", "mistral", "llama", "qwen3", "qwen3-chat", "mxbai-rerank-v2",
}  # fmt: skip
"""Families that differ from another one here in their files or tokenizers only, or in a backbone that is a recipe."""

NAMES = tuple(name for name in FAMILIES if name not in VARIANTS)

WIDTH = 64

SCORES_INTENDED = (
    *INTENDED,
    Intended("float32", "engines/models/score_head.py:ScoreHead.__call__", "the head is float32, and so are scores"),
)


class ScoreFamilies(Families):
    """The families of `tests/testkit/rerankers.py` on the fake GPU.

    Args:
        folder: where they are built.
    """

    skipped = ("unpadded",)  # the padded path at one length

    def __init__(self, fake: FakeGpuKit, kit: Kit, folder: Path) -> None:
        super().__init__(fake, kit)
        self._folder = folder

    def source(self, name: str) -> tuple[Path, dict[str, Any]]:
        """See `Families`."""
        folder = self._folder / name
        if not folder.exists():
            with small_layers(), quiet():
                FAMILIES[name].build(folder)
        return folder, FAMILIES[name].spec

    def on_cpu(self, name: str) -> EmbeddingEngine:
        """See `Families`."""
        folder, spec = self.source(name)
        return self._kit.load(folder, **spec)


@contextmanager
def small_layers() -> Iterator[None]:
    """Gives families that are built inside the block one layer, as a second one repeats what is found in the first.

    It has four heads of 16 (the kernel for rows takes multiples of 8), and weights that make little of rounding.
    """
    with pytest.MonkeyPatch.context() as patch, wider(rerankers.WIDTH):
        patch.setattr(rerankers, "WIDTH", WIDTH)
        for shape in (rerankers.SHAPE, rerankers.GROUPED):
            patch.setitem(shape, "hidden_size", WIDTH)
            patch.setitem(shape, "num_hidden_layers", 1)
        yield
