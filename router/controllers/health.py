"""Whether the process lives, and whether it takes work. Open to everyone, so that probes need no key."""

from litestar import Controller, get
from litestar.di import NamedDependency

from router.openapi import failures
from router.schema import Status
from router.yard import Yard


class HealthController(Controller):
    """For load balancers and orchestrators."""

    tags = ("health",)

    @get("/health", responses=failures("device_down"), summary="Is it alive?")
    async def health(self, yard: NamedDependency[Yard]) -> Status:
        """200 as long as the process serves; 503 with the reason when it must be restarted."""
        yard.check_health()
        return Status(status="ok")

    @get("/ready", responses=failures("shutting_down", "device_down"), summary="Does it take work?")
    async def ready(self, yard: NamedDependency[Yard]) -> Status:
        """200 when new work is taken, 503 while the server drains, or when no device can do any."""
        yard.check_ready()
        return Status(status="ready")
