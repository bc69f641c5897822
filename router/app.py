"""Composition root: builds the parts of a server and connects them. There is no module-level app."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager

from litestar import Controller, Litestar
from litestar.config.cors import CORSConfig
from litestar.datastructures import State
from litestar.di import Provide

from router.api.admin import AdminController
from router.api.batch_service import open_batches, run_batches
from router.api.batches import BatchesController
from router.api.compat.cohere import CohereController
from router.api.compat.ollama import OllamaController, answer_ollama_error
from router.api.compat.ollama_models import OllamaModelsController
from router.api.compat.tei import TeiController, TeiRootController
from router.api.compat.tei_outputs import TeiOutputsController
from router.api.compat.voyage import VoyageController
from router.api.dashboard import DashboardController
from router.api.docs import openapi_config
from router.api.embeddings import (
    OPENAI_HEADERS,
    AzureController,
    EmbeddingsController,
    InfinityController,
    PathController,
)
from router.api.files import FilesController
from router.api.inference import SPACE_HEADER
from router.api.models import ModelsController
from router.api.probes import HealthController, MetricsController
from router.api.rerank import RerankController
from router.api.score import ScoreController
from router.backends.base import Backend
from router.config.settings import Settings
from router.errors import answer_error
from router.limits.limiter import RATE_HEADERS, Limiter
from router.limits.store import open_store
from router.observability.observers import open_observers
from router.observability.recorder import MetricsRecorder
from router.observability.traffic import Traffic
from router.registry.registry import Registry
from router.server.application import Application
from router.server.background import background_tasks
from router.server.reloader import Reloader, open_keyring, watched_keys
from router.server.schedule import run_schedule
from router.server.state import ServerState, provide_spec

_CONTROLLERS = (
    EmbeddingsController, RerankController, ScoreController, ModelsController, FilesController, BatchesController,
    AdminController, HealthController, MetricsController,
)  # fmt: skip
_COMPATIBILITY_APIS: dict[str, tuple[type[Controller], ...]] = {
    "tei": (TeiController, TeiOutputsController),
    "cohere": (CohereController,),
    "ollama": (OllamaController, OllamaModelsController),
    "infinity": (InfinityController,),
    "azure": (AzureController,),
    "path": (PathController,),
    "voyage": (VoyageController,),
}


def create_app(
    settings: Settings,
    registry: Registry,
    backend: Backend,
    *,
    wall_clock: Callable[[], float] = time.time,
    limit_clock: Callable[[], float] | None = None,
    watch_registry: bool = False,
) -> Litestar:
    """Build the server as an ASGI app. Its lifespan starts the backend, and drains and closes it at the end.

    Args:
        settings: of the server.
        registry: the models to serve.
        backend: runs the models.
        wall_clock: Unix time in seconds.
        limit_clock: seconds, for the moving windows of limits.
        watch_registry: reload the registry when the file changes that `REGISTRY` names.

    Raises:
        KeysError, SettingsError: the keys file, the storage of limits, the tracing exporter or DATA_DIR cannot be used.
    """
    server_state = ServerState(settings, registry, backend, open_keyring(settings), int(wall_clock()))
    reloader = Reloader(server_state)
    recorder, traffic = MetricsRecorder(), Traffic()
    observers = open_observers(settings, recorder, traffic, backend.snapshots)
    limiter = Limiter(settings, open_store(settings, limit_clock))
    parts = {
        "server_state": server_state,
        "reloader": reloader,
        "limiter": limiter,
        "recorder": recorder,
        "traffic": traffic,
        "batches": open_batches(settings, server_state, recorder, wall_clock),
    }
    compatibility_apis = [controller for name in settings.skins for controller in _COMPATIBILITY_APIS[name]]
    page = TeiRootController if "tei" in settings.skins else DashboardController
    return Application(
        route_handlers=[*_CONTROLLERS, page, *compatibility_apis],
        dependencies={"spec": Provide(provide_spec, sync_to_thread=False)},
        exception_handlers={Exception: answer_ollama_error if "ollama" in settings.skins else answer_error},
        lifespan=[
            lambda _: aclosing(observers),
            lambda _: aclosing(limiter.store),
            lambda _: watched_keys(server_state),
            lambda _: background_tasks(backend, recorder),
            _lifespan(server_state, reloader if watch_registry else None),
            run_batches,
        ],
        state=State(parts | {"observers": observers}),
        request_max_body_size=settings.max_body_bytes,
        cors_config=_cors(settings),
        openapi_config=openapi_config(),
        logging_config=None,
    )


def _lifespan(
    server_state: ServerState, reloader: Reloader | None
) -> Callable[[Litestar], AbstractAsyncContextManager[None]]:
    @asynccontextmanager
    async def lifespan(_: Litestar) -> AsyncIterator[None]:
        await server_state.backend.start()
        tasks = [asyncio.create_task(run_schedule(server_state))]
        if reloader is not None:
            tasks.append(asyncio.create_task(reloader.watch()))
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await server_state.close()

    return lifespan


def _cors(settings: Settings) -> CORSConfig | None:
    if not settings.cors_origins:
        return None
    return CORSConfig(
        allow_origins=list(settings.cors_origins),
        expose_headers=[
            "x-request-id",
            "server-timing",
            "x-embed-truncated",
            SPACE_HEADER,
            "retry-after-ms",
            *OPENAI_HEADERS,
            *RATE_HEADERS,
        ],
    )
