"""Serves a reranker, a classifier and an embedding model with random weights, and says what their scores must be.

The folders are those of `tests/testkit/rerankers.py`; what they must give, sentence-transformers says.
"""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from benchmarks.lib import vocabularies
from benchmarks.lib.models import RECIPES, quiet, wider
from tests.testkit.rerankers import FAMILIES, bert, classifier, predicted, reference, save_plain
from tests.testkit.servers import LiveServer, serve_live

KEY = "sk-contract"
QUERY = "what is a yard"
DOCUMENTS = (
    "The yard keeps.",
    "It does.",
    "Why not a longer one, about yards and cats and what they do all day",
    "院子里有一只猫 🐈",
    "The yard keeps.",
)
"""The last one is the first again: equal scores are in the order of the request."""
FOLDERS = {"ranker": "xlm-roberta", "labeler": "roberta-nli"}
ALIASES = {"ranker": ["rerank-v3.5"]}


class RerankModels:
    """The folders of the models, and their scores by the reference.

    Args:
        width: hidden size of the reranker and the embedding model, if they shall be larger than a few hundred KB.
    """

    def __init__(self, root: Path, width: int | None = None) -> None:
        self.folders = {name: root / name for name in (*FOLDERS, "embedder")}
        with quiet():
            for name, family in FOLDERS.items():
                FAMILIES[family].build(self.folders[name])
            if width is None:
                RECIPES["bert-cls"].build(self.folders["embedder"])
                return
            wide = classifier(bert(hidden_size=width))  # as large as the embedding model
            shutil.rmtree(self.folders["ranker"])
            save_plain(self.folders["ranker"], wide, vocabularies.bert())
            with wider(width):
                RECIPES["bert-cls"].build(self.folders["embedder"])

    @cached_property
    def ranker(self) -> Any:
        """The reranker, loaded by sentence-transformers."""
        return reference(self.folders["ranker"])

    @cached_property
    def expected(self) -> list[float]:
        """The scores of `DOCUMENTS` for `QUERY`."""
        return self.scores()

    def scores(self, query: str = QUERY, documents: Sequence[str] = DOCUMENTS, **options: Any) -> list[float]:
        """Return the scores of documents in their order; `options`: of `CrossEncoder.predict`."""
        found: list[float] = predicted(self.ranker, [(query, text) for text in documents], **options)[:, 0].tolist()
        return found

    def ranking(self, query: str = QUERY, documents: Sequence[str] = DOCUMENTS) -> list[tuple[int, float]]:
        """Return indexes and scores, best first; equal scores in the order of the request."""
        return sorted(enumerate(self.scores(query, documents)), key=lambda ranked: (-round(ranked[1], 6), ranked[0]))

    def labels(self, texts: Sequence[str]) -> tuple[list[str], list[list[float]]]:
        """Return the names of the labels, and the probabilities of each text."""
        labeler = reference(self.folders["labeler"])
        names = labeler.model.config.id2label
        return [names[index] for index in range(len(names))], predicted(labeler, texts, apply_softmax=True).tolist()

    @contextmanager
    def serve(self, registry: Path, **environ: str) -> Iterator[LiveServer]:
        """Serve all of them until the block ends; `environ`: settings of the server."""
        file = {"version": 1, "default_model": "ranker", "models": self._entries()}
        registry.write_text(yaml.safe_dump(file))
        with serve_live(registry, API_KEY=KEY, **environ) as server:
            yield server

    def _entries(self) -> list[dict[str, Any]]:
        return [
            {"name": name, "source": str(folder), "aliases": ALIASES.get(name, []), "max_batch_tokens": 512}
            for name, folder in self.folders.items()
        ]
