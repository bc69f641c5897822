"""A registry with a reranker, a classifier, an embedding model, and models of unknown task, and servers of it."""

from collections.abc import Iterator

import httpx

from engines.spec import ModelSpec
from router.app import create_app
from router.config.settings import Settings
from router.registry.registry import Registry
from tests.testkit.backends import ScriptedBackend
from tests.testkit.servers import Served, serving_in_thread

RERANKERS = Registry(
    models={
        "ranker": ModelSpec(model_id="ranker", source="org/ranker", task="rerank", max_tokens=40),
        "labeler": ModelSpec(model_id="labeler", source="org/labeler", task="classify", max_tokens=40),
        "embedder": ModelSpec(model_id="embedder", source="org/embedder", task="embed", max_tokens=40),
        "unknown": ModelSpec(model_id="unknown", source="org/unknown"),
    },
    aliases={"rerank-v3.5": "ranker"},
    default_model="ranker",
)


def serve_rerankers(settings: Settings) -> Iterator[Served]:
    """Serve them with a scripted backend, on a thread."""
    backend = ScriptedBackend("ranker", "labeler", "embedder")
    app = create_app(settings, RERANKERS, backend, wall_clock=lambda: 1_700_000_000.9)
    with serving_in_thread(app) as url, httpx.Client(base_url=url, timeout=10) as client:
        yield Served(url, client, backend)
