"""Loads real models as the server does, and compares their vectors; shared by tests and benchmarks."""

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer

from benchmarks.lib.models import RECIPES, quiet, reference
from engines.batching.engine import EmbeddingEngine
from engines.device.scheduler import DeviceScheduler
from engines.inputs.tokenizer_threads import TokenizerThreads
from engines.loading.loader import LoaderSettings, TorchLoader
from engines.spec import ModelSpec
from engines.types import EmbedCall, Embeddings, ModelFiles

Vectors = NDArray[np.float32]


class Kit:
    """A device scheduler, tokenizer threads and a loader; each recipe's folder, engine and reference are made once."""

    def __init__(self, folder: Path) -> None:
        torch.set_num_threads(1)  # small models gain nothing from more, and lose much on a busy machine
        self.folder = folder
        self.scheduler = DeviceScheduler("kit")
        self.threads = TokenizerThreads(2)
        self._engines: dict[str, EmbeddingEngine] = {}
        self._references: dict[str, SentenceTransformer] = {}

    def close(self) -> None:
        """End the threads."""
        self.scheduler.close()
        self.threads.close()

    def recipe_folder(self, name: str) -> Path:
        """Return the folder of a recipe, which must not be changed."""
        folder = self.folder / name
        if not folder.exists():
            with quiet():
                RECIPES[name].build(folder)
        return folder

    def engine(self, name: str) -> EmbeddingEngine:
        """Return the warm engine of a recipe."""
        if name not in self._engines:
            self._engines[name] = self.load(self.recipe_folder(name), **RECIPES[name].spec)
        return self._engines[name]

    def reference(self, name: str) -> SentenceTransformer:
        """Return the sentence-transformers model of a recipe's folder."""
        if name not in self._references:
            self._references[name] = reference(self.recipe_folder(name))
        return self._references[name]

    def load(
        self,
        folder: Path,
        *,
        settings: LoaderSettings | None = None,
        revision: str = "r1",
        adapter: Path | None = None,
        **spec: Any,
    ) -> EmbeddingEngine:
        """Load a folder, with the adapter of another, and warm it up, as a host does."""
        loader = TorchLoader("cpu", self.scheduler, self.threads, settings or LoaderSettings())
        files = ModelFiles(path=str(folder), revision=revision, size_bytes=0)
        if adapter is not None:
            files = files.with_adapter(ModelFiles(path=str(adapter), revision="a1", size_bytes=0))
            spec["adapter"] = str(adapter)
        engine = loader.load(ModelSpec(**{"model_id": "m", "source": str(folder), **spec}), files)
        asyncio.run(engine.warm_up())
        return engine


def embed(engine: EmbeddingEngine, texts: list[str], **call: Any) -> Vectors:
    """Return the vectors of one request."""
    return answer(engine, texts=tuple(texts), **call).array()


def answer(engine: EmbeddingEngine, **call: Any) -> Embeddings:
    """Return the whole answer to one request."""
    result = asyncio.run(engine.run(EmbedCall(model_id="m", **call)))
    assert isinstance(result, Embeddings)
    return result


def encode(model: SentenceTransformer, texts: list[str], **options: Any) -> Vectors:
    """Return sentence-transformers' vectors, of length one unless `normalize_embeddings=False`."""
    with quiet():
        options = {"normalize_embeddings": True, "show_progress_bar": False, **options}
        return np.asarray(model.encode(texts, **options))


def cosines(a: Vectors, b: Vectors) -> NDArray[np.float64]:
    """Return the cosine of each row of `a` with the same row of `b`."""
    left, right = a.astype(np.float64), b.astype(np.float64)
    lengths = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
    return np.asarray((left * right).sum(axis=1) / lengths)


def component_error(got: Vectors, wanted: Vectors) -> float:
    """Return the largest difference of two components, relative to the largest component where that exceeds 1."""
    return float(np.abs(got - wanted).max() / max(1.0, np.abs(wanted).max()))


def assert_same(got: Vectors, wanted: Vectors) -> None:
    """Assert that rows are the same: cosine ≥ 0.999999, and no component differs by more than 1e-5."""
    assert got.shape == wanted.shape
    assert not wanted.any() or cosines(got, wanted).min() >= 0.999999
    assert component_error(got, wanted) <= 1e-5
