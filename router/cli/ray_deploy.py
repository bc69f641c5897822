"""`embedyard ray`: hosts on a Ray cluster. Ray is imported only when one of these runs."""

import click

from engines.errors import InvalidValue
from router.config.settings import SettingsError, load_settings
from router.config.yaml_document import FileError
from router.registry.registry import open_registry

MISTAKES = 2
"""The exit code when something must be put right."""


@click.group(
    name="ray",
    epilog="""
\b
Examples:
  ray start --head                              a cluster of this machine alone
  embedyard ray deploy                          a host for each GPU of the cluster, else for each node
  BACKEND=ray embedyard serve                   a router; any number of them, on any machine of the cluster
  embedyard ray deploy --hosts 4 --cpus 8       four hosts of eight cores each
  embedyard ray remove
""",
)
def command() -> None:
    """Put hosts on a Ray cluster (pip install 'embedyard[ray]').

    Exit code 0: done; 2: something must be put right first, and the message says what.
    """


@command.command()
@click.option("--hosts", type=click.IntRange(1), help="How many; left out, one for each GPU, else for each node.")
@click.option("--gpus", type=click.FloatRange(0), default=0.0, help="GPUs of each, with --hosts.", show_default=True)
@click.option("--cpus", type=click.FloatRange(0.1), default=1.0, help="Cores of each.", show_default=True)
@click.option("--address", help="Of the cluster, instead of RAY_ADDRESS.")
def deploy(hosts: int | None, gpus: float, cpus: float, address: str | None) -> None:
    """Deploy the hosts with the registry and settings of this machine, or bring them up to date."""
    try:
        settings = load_settings()
        registry = open_registry(settings)
        from router.backends.ray import deploy as ray_deploy  # late: takes seconds, and mistakes above are told at once

        ray_deploy.connect(address)
        plan = ray_deploy.Plan(hosts=hosts, gpus=gpus, cpus=cpus) if hosts else ray_deploy.one_per_device(cpus)
        ray_deploy.deploy(ray_deploy.worker_config_of(settings, registry, plan), plan)
    except ImportError:
        _fail("Ray is not installed: pip install 'embedyard[ray]'")
    except (SettingsError, FileError, InvalidValue) as error:
        _fail(str(error))
    click.echo(f"{plan.hosts} hosts are up; serve them with BACKEND=ray embedyard serve")


@command.command()
@click.option("--address", help="Of the cluster, instead of RAY_ADDRESS.")
def remove(address: str | None) -> None:
    """End the hosts; what they have begun is finished within GRACE_SECONDS."""
    try:
        from router.backends.ray import deploy as ray_deploy  # late, as above

        ray_deploy.connect(address)
        ray_deploy.remove()
    except ImportError:
        _fail("Ray is not installed: pip install 'embedyard[ray]'")
    except InvalidValue as error:
        _fail(str(error))


def _fail(message: str) -> None:
    click.echo(message, err=True)
    raise SystemExit(MISTAKES)
