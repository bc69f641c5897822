"""Opens the batch service of a server, and finds it for handlers. SQLAlchemy is optional, so it is imported late."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from litestar import Litestar

from router.api.batch_lines import BatchLines
from router.auth.guards import Connection
from router.config.settings import Settings, SettingsError
from router.errors import BatchesDisabled
from router.observability import metrics
from router.observability.recorder import MetricsRecorder
from router.server.state import ServerState

if TYPE_CHECKING:
    from router.batches.service import BatchService

_NOT_INSTALLED = "DATA_DIR is set, but SQLAlchemy is not installed: pip install 'embedyard[batches]', or unset it"


def open_batches(
    settings: Settings, server_state: ServerState, recorder: MetricsRecorder, clock: Callable[[], float]
) -> "BatchService | None":
    """Open the files and batches of DATA_DIR; None if it is not set.

    Raises:
        SettingsError: SQLAlchemy is not installed, or the folder or the database cannot be used.
    """
    if settings.data_dir is None:
        return None
    try:
        from router.batches.service import BatchService, ServiceHooks
    except ImportError as error:
        raise SettingsError((_NOT_INSTALLED,)) from error

    def count(outcome: str, number: int) -> None:
        if number:
            recorder.add(metrics.BATCH_LINES, outcome, amount=number)

    hooks = ServiceHooks(
        may_run=lambda owner: server_state.keyring.find(owner) is not None,
        on_line=count,
        on_end=lambda status, seconds: recorder.observe(metrics.BATCH_JOB_SECONDS, status, value=seconds),
        clock=clock,
    )
    return BatchService(settings, hooks)


@asynccontextmanager
async def run_batches(app: Litestar) -> AsyncIterator[None]:
    """Run batches inside the block, if the server has them; they stop as soon as it drains."""
    service: BatchService | None = app.state.batches
    if service is None:
        yield
        return
    server_state: ServerState = app.state.server_state
    async with service.running(BatchLines(app), server_state.draining):
        yield


def batches_of(connection: Connection) -> "BatchService":
    """Return the service.

    Raises:
        BatchesDisabled: this server has none.
    """
    service: BatchService | None = connection.app.state.batches
    if service is None:
        raise BatchesDisabled("This server stores no files and runs no batches: set DATA_DIR to a folder for them")
    return service
