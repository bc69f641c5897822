"""One registry, a scripted backend, and the edge served with it over a real socket."""

from collections.abc import Iterator

import httpx
from msgspec import Struct

from engines.spec import Calibration, Matryoshka, ModelSpec
from router.app import create_app
from router.config.settings import Settings
from router.registry.registry import Registry
from tests.testkit.scripted_backend import WIDTH, ScriptedBackend
from tests.testkit.threaded_server import serving_in_thread

REGISTRY = Registry(
    models={
        "mini": ModelSpec(model_id="mini", source="org/mini", matryoshka=Matryoshka(widths=(4,))),
        "BAAI/bge-m3": ModelSpec(
            model_id="BAAI/bge-m3",
            source="/secret/place/bge-m3",
            calibration=Calibration(lowest=(-0.5,) * WIDTH, highest=(0.5,)),
        ),
        "cold": ModelSpec(
            model_id="cold",
            source="org/cold",
            prompts={"query": "q: "},
            max_tokens=77,
            revision="v1",
            trust_remote_code=True,
        ),
    },
    aliases={"text-embedding-3-small": "mini", "org/deep/alias": "BAAI/bge-m3"},
    default_model="mini",
)


MAX_BODY_BYTES = 2**20


class Served(Struct):
    """A server in a thread, its blocking client, and the backend behind it."""

    url: str
    client: httpx.Client
    backend: ScriptedBackend


def serve(settings: Settings) -> Iterator[Served]:
    backend = ScriptedBackend("mini", "BAAI/bge-m3")
    app = create_app(settings, REGISTRY, backend, wall_clock=lambda: 1_700_000_000.9)
    with serving_in_thread(app) as url, httpx.Client(base_url=url, timeout=10) as client:
        yield Served(url, client, backend)
