"""`embedyard ray`: deploys hosts to a Ray cluster. Ray is imported only when a subcommand runs."""

import click

from engines.errors import InvalidValue
from router.config.settings import SettingsError, load_settings
from router.config.yaml_document import FileError
from router.registry.opening import open_registry

EXIT_INVALID = 2
"""Exit code for invalid settings or registry, or when no cluster is reachable."""


@click.group(
    name="ray",
    epilog="""
\b
Examples:
  ray start --head                              a cluster of this machine only
  embedyard ray deploy                          one host per GPU of the cluster, else per node
  BACKEND=ray embedyard serve                   a router; any number, on any machine of the cluster
  embedyard ray deploy --hosts 4 --cpus 8       four hosts with eight cores each
  embedyard ray remove
""",
)
def command() -> None:
    """Deploy hosts to a Ray cluster (pip install 'embedyard[ray]').

    Exit code 0: success; 2: invalid settings or registry, or no cluster is reachable.
    """


@command.command()
@click.option("--hosts", type=click.IntRange(1), help="Number of hosts. Default: one per GPU, else one per node.")
@click.option("--gpus", type=click.FloatRange(0), default=0.0, help="GPUs per host, with --hosts.", show_default=True)
@click.option("--cpus", type=click.FloatRange(0.1), default=1.0, help="Cores per host.", show_default=True)
@click.option("--address", help="Address of the cluster, instead of RAY_ADDRESS.")
def deploy(hosts: int | None, gpus: float, cpus: float, address: str | None) -> None:
    """Deploy or update the hosts with the registry and settings of this machine."""
    try:
        settings = load_settings()
        registry = open_registry(settings)
        from router.backends.ray import connection  # late: takes seconds, and the mistakes above are reported first
        from router.backends.ray import deploy as ray_deploy

        connection.connect(address)
        plan = (
            ray_deploy.DeploymentPlan(hosts=hosts, gpus=gpus, cpus=cpus) if hosts else ray_deploy.one_per_device(cpus)
        )
        ray_deploy.deploy(ray_deploy.worker_config_of(settings, registry, plan), plan)
    except ImportError:
        _fail("Ray is not installed: pip install 'embedyard[ray]'")
    except (SettingsError, FileError, InvalidValue) as error:
        _fail(str(error))
    click.echo(f"{plan.hosts} hosts are up; serve them with BACKEND=ray embedyard serve")


@command.command()
@click.option("--address", help="Address of the cluster, instead of RAY_ADDRESS.")
def remove(address: str | None) -> None:
    """Remove the hosts; running requests are finished within GRACE_SECONDS."""
    try:
        from router.backends.ray import connection  # late, as above
        from router.backends.ray import deploy as ray_deploy

        connection.connect(address)
        ray_deploy.remove()
    except ImportError:
        _fail("Ray is not installed: pip install 'embedyard[ray]'")
    except InvalidValue as error:
        _fail(str(error))


def _fail(message: str) -> None:
    click.echo(message, err=True)
    raise SystemExit(EXIT_INVALID)
