"""Settings and registry → `BACKEND=ray`: a stateless router before hosts that are deployed already."""

from ray import serve
from ray.serve.exceptions import RayServeException

from engines.errors import InvalidValue
from router.ray.board import BOARD
from router.ray.deploy import connect
from router.ray.fleet import RayFleet
from router.ray.names import APP, DEPLOYMENT
from router.registry import Registry
from router.remote_backend import RemoteBackend
from router.settings import Settings


def open_ray_backend(settings: Settings, registry: Registry) -> RemoteBackend:
    """Join the cluster and find the deployment.

    Raises:
        InvalidValue: there is no cluster, or nothing is deployed there.
    """
    connect(None)
    try:
        handle = serve.get_deployment_handle(DEPLOYMENT, APP)
        status = serve.status().applications.get(APP)
    except RayServeException as error:
        raise _nothing_there() from error
    if status is None:
        raise _nothing_there()
    fleet = RayFleet(
        handle,
        BOARD,
        patience_s=settings.watchdog_seconds + settings.grace_seconds,
        grace_s=settings.grace_seconds,
    )
    return RemoteBackend(fleet, registry.models)


def _nothing_there() -> InvalidValue:
    return InvalidValue("no hosts are deployed on this Ray cluster: run `embedyard ray deploy` first")
