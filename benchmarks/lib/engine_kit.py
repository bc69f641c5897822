"""What tests of real models share: loading as the server does, and the measures of likeness."""

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
    """One lane, its threads and a loader; and every recipe's folder, engine and reference, made once."""

    def __init__(self, folder: Path) -> None:
        torch.set_num_threads(1)  # small models gain nothing from more, and lose much beside busy neighbours
        self.folder = folder
        self.lane = DeviceScheduler("kit")
        self.threads = TokenizerThreads(2)
        self._engines: dict[str, EmbeddingEngine] = {}
        self._references: dict[str, SentenceTransformer] = {}

    def close(self) -> None:
        """End the threads."""
        self.lane.close()
        self.threads.close()

    def recipe_folder(self, name: str) -> Path:
        """The folder of a recipe; not to be changed."""
        folder = self.folder / name
        if not folder.exists():
            with quiet():
                RECIPES[name].build(folder)
        return folder

    def engine(self, name: str) -> EmbeddingEngine:
        """The warm engine of a recipe."""
        if name not in self._engines:
            self._engines[name] = self.load(self.recipe_folder(name), **RECIPES[name].spec)
        return self._engines[name]

    def reference(self, name: str) -> SentenceTransformer:
        """sentence-transformers on the folder of a recipe."""
        if name not in self._references:
            self._references[name] = reference(self.recipe_folder(name))
        return self._references[name]

    def load(
        self, folder: Path, *, settings: LoaderSettings | None = None, revision: str = "r1", **spec: Any
    ) -> EmbeddingEngine:
        """Load a folder and warm it up, as a host does."""
        loader = TorchLoader("cpu", self.lane, self.threads, settings or LoaderSettings())
        files = ModelFiles(path=str(folder), revision=revision, size_bytes=0)
        engine = loader.load(ModelSpec(**{"model_id": "m", "source": str(folder), **spec}), files)
        asyncio.run(engine.warm_up())
        return engine


def embed(engine: EmbeddingEngine, texts: list[str], **call: Any) -> Vectors:
    """The vectors of one request."""
    return answer(engine, texts=tuple(texts), **call).array()


def answer(engine: EmbeddingEngine, **call: Any) -> Embeddings:
    """The whole answer to one request."""
    result = asyncio.run(engine.run(EmbedCall(model_id="m", **call)))
    assert isinstance(result, Embeddings)
    return result


def encode(model: SentenceTransformer, texts: list[str], **options: Any) -> Vectors:
    """sentence-transformers' vectors, of length one unless `normalize_embeddings=False`."""
    with quiet():
        options = {"normalize_embeddings": True, "show_progress_bar": False, **options}
        return np.asarray(model.encode(texts, **options))


def cosines(a: Vectors, b: Vectors) -> NDArray[np.float64]:
    """The cosine of each row of one with the same row of the other."""
    left, right = a.astype(np.float64), b.astype(np.float64)
    lengths = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
    return np.asarray((left * right).sum(axis=1) / lengths)


def component_error(got: Vectors, wanted: Vectors) -> float:
    """The largest difference of two components, as a share of the largest component where that is more than 1."""
    return float(np.abs(got - wanted).max() / max(1.0, np.abs(wanted).max()))


def assert_same(got: Vectors, wanted: Vectors) -> None:
    """Each row the same: cosine ≥ 0.999999 and no component further off than 1e-5."""
    assert got.shape == wanted.shape
    assert not wanted.any() or cosines(got, wanted).min() >= 0.999999
    assert component_error(got, wanted) <= 1e-5
