"""Deploys the hosts to a Ray cluster, as one Serve deployment with a replica for each device."""

import ray
from msgspec import Struct
from ray import serve as serve
from ray.serve.config import RequestRouterConfig

from router.backends.ray.environment import APP, DEPLOYMENT, HEALTH_PERIOD_S, STATS_PERIOD_S
from router.backends.ray.replica import HostReplica
from router.backends.worker_config import WorkerConfig, memory_rules, open_real_host
from router.config.settings import Settings, load_settings
from router.registry.generation import first_generation
from router.registry.opening import open_registry
from router.registry.registry import Registry

_HEALTH_TIMEOUT_S = 30.0
"""A load may hold a host's interpreter lock for seconds."""


class DeploymentPlan(Struct, frozen=True, kw_only=True):
    """Number of hosts, and the node resources that each of them takes."""

    hosts: int
    gpus: float = 0.0
    cpus: float = 1.0


def one_per_device(cpus: float) -> DeploymentPlan:
    """DeploymentPlan one host per GPU of the cluster; without GPUs, one per node."""
    gpus = int(ray.cluster_resources().get("GPU", 0))
    if gpus:
        return DeploymentPlan(hosts=gpus, gpus=1.0, cpus=cpus)
    return DeploymentPlan(hosts=max(1, sum(node["Alive"] for node in ray.nodes())), cpus=cpus)


def deploy(config: WorkerConfig, plan: DeploymentPlan) -> None:
    """Create or update the deployment; returns when all hosts are ready."""
    serve.start(proxy_location="Disabled")
    serve.run(application(config, plan), name=APP, route_prefix=None, blocking=False)


def remove() -> None:
    """Delete the deployment."""
    serve.delete(APP)


def application(config: WorkerConfig, plan: DeploymentPlan) -> serve.Application:
    """Build the Serve application of the deployment."""
    settings = config.settings
    deployment = serve.deployment(
        HostReplica,
        name=DEPLOYMENT,
        num_replicas=plan.hosts,
        ray_actor_options={"num_gpus": plan.gpus, "num_cpus": plan.cpus},
        max_ongoing_requests=settings.max_concurrent_requests + 16,  # spare ones for operators' calls
        max_queued_requests=settings.max_concurrent_requests,
        health_check_period_s=HEALTH_PERIOD_S,
        health_check_timeout_s=_HEALTH_TIMEOUT_S,
        graceful_shutdown_timeout_s=settings.grace_seconds,
        request_router_config=RequestRouterConfig(
            request_router_class="router.backends.ray.request_router:PlacementRequestRouter",
            request_routing_stats_period_s=STATS_PERIOD_S,
            request_routing_stats_timeout_s=_HEALTH_TIMEOUT_S,
        ),
    )
    return deployment.bind(config)


def worker_config_of(settings: Settings, registry: Registry, plan: DeploymentPlan) -> WorkerConfig:
    """Build the config of every replica. A replica takes the first device that its node assigns to it."""
    rules = memory_rules(settings, registry)
    return WorkerConfig(
        host_id="",
        device="cuda" if plan.gpus else "cpu",
        cores=max(1, int(plan.cpus)),
        specs=registry.models,
        budget=rules.budget,
        host_budget=rules.host_budget,
        host_parts=plan.hosts,
        settings=settings,
        open=open_real_host,
        eviction=rules.eviction,
        generation=first_generation(registry.models),
    )


def from_environment(args: dict[str, str]) -> serve.Application:
    """Build the application for a Serve config file (`import_path: router.backends.ray.deploy:from_environment`).

    Args:
        args: `hosts`, `gpus` and `cpus` of a `DeploymentPlan`.
    """
    settings = load_settings()
    plan = DeploymentPlan(
        hosts=int(args.get("hosts", 1)), gpus=float(args.get("gpus", 0)), cpus=float(args.get("cpus", 1))
    )
    return application(worker_config_of(settings, open_registry(settings), plan), plan)
