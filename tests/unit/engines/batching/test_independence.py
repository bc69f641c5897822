"""Tests that a text's vector is independent of the batch's other texts, their order, and merged requests."""

import asyncio
from functools import cache

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.lib.engine_kit import Kit, Vectors, assert_same, embed
from benchmarks.lib.models import RECIPES
from benchmarks.lib.workloads import mixed
from engines.batching.engine import EmbeddingEngine
from engines.loading.loader import LoaderSettings
from engines.types import EmbedCall

POOL = (*mixed(20, seed=9, longest_words=80), "a", "a a", "你好")

# One for each way to attend: plain, windowed both ways, biased, grouped and causal, and padded batches.
MODELS = [
    "bert-cls-mean", "modernbert-cls", "gemma3-bidirectional", "mpnet-mean", "xlm-roberta-cls", "mistral-last",
    "deberta-v2-mean",
]  # fmt: skip
SMALL_BATCHES = LoaderSettings(max_batch_tokens=300, max_batch_items=7)

requests = st.lists(st.lists(st.integers(0, len(POOL) - 1), min_size=1, max_size=9), min_size=1, max_size=5)


@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(requests=requests, is_small=st.booleans())
def test_a_vector_is_the_same_however_requests_are_merged(
    kit: Kit, name: str, requests: list[list[int]], is_small: bool
) -> None:
    engine = _engine(kit, name, is_small)
    answers = asyncio.run(_at_once(engine, requests))

    alone = _alone(kit, name)
    for request, vectors in zip(requests, answers, strict=True):
        assert_same(vectors, alone[request])


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_a_text_alone_is_the_same_as_in_a_crowd(kit: Kit, name: str) -> None:
    crowd = embed(kit.engine(name), list(POOL[::-1]))[::-1]

    assert_same(np.concatenate([embed(kit.engine(name), [text]) for text in POOL[-6:]]), crowd[-6:])


async def _at_once(engine: EmbeddingEngine, requests: list[list[int]]) -> list[Vectors]:
    """Run all requests at the same time on one scheduler."""
    calls = [EmbedCall(model_id="m", texts=tuple(POOL[index] for index in request)) for request in requests]
    return [answer.array() for answer in await asyncio.gather(*map(engine.run, calls))]


@cache
def _engine(kit: Kit, name: str, is_small: bool) -> EmbeddingEngine:
    return kit.load(kit.recipe_folder(name), settings=SMALL_BATCHES) if is_small else kit.engine(name)


@cache
def _alone(kit: Kit, name: str) -> Vectors:
    return np.concatenate([embed(kit.engine(name), [text]) for text in POOL])
