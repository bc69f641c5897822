"""Serves a reranker, a classifier and an embedding model with random weights, and says what their scores must be.

The folders are those of `tests/testkit/rerankers.py`; what they must give, sentence-transformers says.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from benchmarks.lib.models import RECIPES, quiet
from tests.testkit.rerankers import FAMILIES, predicted, reference
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
ALIASES = {"ranker": ["rerank-v3.5", "default/not-specified"]}


class RerankModels:
    """The folders of the models, and their scores by the reference."""

    def __init__(self, root: Path) -> None:
        self.folders = {name: root / name for name in (*FOLDERS, "embedder")}
        with quiet():
            for name, family in FOLDERS.items():
                FAMILIES[family].build(self.folders[name])
            RECIPES["bert-cls"].build(self.folders["embedder"])

    @cached_property
    def ranker(self) -> Any:
        """The reranker, loaded by sentence-transformers."""
        return reference(self.folders["ranker"])

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

    def entries(self, *names: str, **fields: Any) -> list[dict[str, Any]]:
        """Return entries of a registry; `fields`: of each."""
        return [
            {"name": name, "source": str(self.folders[name]), "aliases": ALIASES.get(name, []), **fields}
            for name in names or self.folders
        ]

    @contextmanager
    def serve(self, registry: Path, **environ: str) -> Iterator[LiveServer]:
        """Serve all of them until the block ends; `environ`: settings of the server."""
        file = {"version": 1, "default_model": "ranker", "models": self.entries()}
        registry.write_text(yaml.safe_dump(file))
        with serve_live(registry, API_KEY=KEY, **environ) as server:
            yield server
