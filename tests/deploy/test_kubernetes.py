"""Tests the manifests, built by kustomize where it is installed, against Kubernetes' schemas."""

import os
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from router.config.settings import VARIABLES
from router.registry.registry import parse_registry
from tests.deploy.proxies import DEPLOY

FOLDER = DEPLOY / "kubernetes"
VERSION = "1.34"
"""Older ones do not know everything here (the pause before the signal)."""
OPERATORS = {"ServiceMonitor"}
"""Kinds that the Prometheus Operator brings, with a schema of its own."""
BASE = {"ConfigMap", "Deployment", "PersistentVolumeClaim", "PodDisruptionBudget", "Service"}
CLUSTER = BASE | {"HorizontalPodAutoscaler", "Ingress", "ServiceMonitor"}
KINDS = {"base": BASE, "gpu": BASE, "cluster": CLUSTER}
COMPONENTS = {
    "autoscaled": {"HorizontalPodAutoscaler"},
    "gpu": set(),
    "ingress": {"Ingress"},
    "monitored": {"ServiceMonitor"},
    "redis": set(),
    "shared-cache": set(),
}
"""With the kinds that each adds to the base."""

needs_kubectl = pytest.mark.skipif(shutil.which("kubectl") is None, reason="there is no kubectl, which has kustomize")


def kustomized(folder: Path) -> list[dict[str, Any]]:
    done = subprocess.run(["kubectl", "kustomize", folder], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


@cache
def built(name: str) -> list[dict[str, Any]]:
    return kustomized(FOLDER / name)


def composed(folder: Path, *components: str) -> list[dict[str, Any]]:
    """The base with components, in a kustomization of one's own."""
    own = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": [os.path.relpath(FOLDER / "base", folder)],
        "components": [os.path.relpath(FOLDER / "components" / name, folder) for name in components],
    }
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(own))
    return kustomized(folder)


def find(manifests: list[dict[str, Any]], kind: str, name: str = "embedyard") -> dict[str, Any]:
    names = {"PersistentVolumeClaim": f"{name}-models"}
    return next(
        manifest
        for manifest in manifests
        if (manifest["kind"], manifest["metadata"]["name"]) == (kind, names.get(kind, name))
    )


@needs_kubectl
@pytest.mark.parametrize("name", KINDS)
def test_what_kustomize_builds_is_what_kubernetes_takes(name: str) -> None:
    check_all(built(name), KINDS[name])


def check_all(manifests: list[dict[str, Any]], kinds: set[str]) -> None:
    assert {manifest["kind"] for manifest in manifests} == kinds
    for manifest in manifests:
        assert manifest["metadata"]["namespace"] == "embedyard"
        if manifest["kind"] not in OPERATORS:
            kubernetes_validate.validate(manifest, VERSION, strict=True)


def test_every_component_is_tested_and_in_the_example() -> None:
    example = (FOLDER / "cluster/kustomization.yaml").read_text()

    assert COMPONENTS.keys() == {folder.name for folder in (FOLDER / "components").iterdir()}
    assert set(re.findall(r"- \.\./components/(\S+)", example)) == COMPONENTS.keys()


@needs_kubectl
@pytest.mark.parametrize("name", COMPONENTS)
def test_each_component_stands_on_the_base_alone(name: str, tmp_path: Path) -> None:
    check_all(composed(tmp_path, name), BASE | COMPONENTS[name])


@needs_kubectl
def test_all_components_stand_together(tmp_path: Path) -> None:
    """A GPU comes after the cache: its rollout needs no GPU to spare."""
    manifests = composed(tmp_path, *sorted(COMPONENTS, reverse=True))
    first_cache, first_gpu = (
        composed(tmp_path, *names) for names in (("gpu", "shared-cache"), ("shared-cache", "gpu"))
    )
    strategies = [find(found, "Deployment")["spec"]["strategy"]["rollingUpdate"] for found in (first_cache, first_gpu)]

    check_all(manifests, CLUSTER)
    assert strategies == [{"maxUnavailable": 0, "maxSurge": 1}, {"maxUnavailable": 1, "maxSurge": 0}]


@needs_kubectl
def test_the_base_fits_a_cluster_of_one_node() -> None:
    """Any storage class, no second pod during a rollout, an image without a registry, and room for other pods."""
    manifests = built("base")
    deployment, claim = find(manifests, "Deployment"), find(manifests, "PersistentVolumeClaim")
    (container,) = deployment["spec"]["template"]["spec"]["containers"]

    assert claim["spec"]["accessModes"] == ["ReadWriteOnce"]
    assert "storageClassName" not in claim["spec"]
    assert deployment["spec"]["strategy"] == {"type": "Recreate"}
    assert "replicas" not in deployment["spec"]
    assert container["imagePullPolicy"] == "IfNotPresent"
    assert container["resources"]["requests"] == {"cpu": "1", "memory": "4Gi"}


@needs_kubectl
def test_replicas_on_several_nodes_share_their_cache_and_their_limits() -> None:
    manifests = built("cluster")
    settings = next(found["data"] for found in manifests if "LOG_FORMAT" in found.get("data", {}))
    redis = find(manifests, "Service", "embedyard-redis")
    (port,) = redis["spec"]["ports"]

    assert find(manifests, "PersistentVolumeClaim")["spec"]["accessModes"] == ["ReadWriteMany"]
    assert find(manifests, "Deployment")["spec"]["strategy"]["rollingUpdate"]["maxUnavailable"] == 0
    assert settings["RATE_LIMIT_STORAGE"] == f"async+redis://{redis['metadata']['name']}:{port['port']}"
    assert settings["GRACE_SECONDS"] == "30", "what the base says stays"


@needs_kubectl
def test_redis_is_no_server_of_embeddings() -> None:
    """No selector of one pod selects the other."""
    manifests = built("cluster")
    pods = {name: find(manifests, "Deployment", name)["spec"] for name in ("embedyard", "embedyard-redis")}
    for name, other in (("embedyard", "embedyard-redis"), ("embedyard-redis", "embedyard")):
        selector = find(manifests, "Service", name)["spec"]["selector"]
        assert selector == pods[name]["selector"]["matchLabels"]
        assert selector.items() <= pods[name]["template"]["metadata"]["labels"].items()
        assert not selector.items() <= pods[other]["template"]["metadata"]["labels"].items()
    monitored = find(manifests, "ServiceMonitor")["spec"]["selector"]["matchLabels"]
    assert not monitored.items() <= find(manifests, "Service", "embedyard-redis")["metadata"]["labels"].items()


@needs_kubectl
def test_the_ingress_leads_to_the_service_and_waits_as_long_as_nginx_does() -> None:
    manifests = built("cluster")
    ingress, (port,) = find(manifests, "Ingress"), find(manifests, "Service")["spec"]["ports"]
    backend = ingress["spec"]["rules"][0]["http"]["paths"][0]["backend"]["service"]
    notes = ingress["metadata"]["annotations"]
    nginx = (DEPLOY / "nginx/embedyard.conf").read_text()

    assert backend == {"name": "embedyard", "port": {"name": port["name"]}}
    assert re.search(rf"client_max_body_size\s+{notes['nginx.ingress.kubernetes.io/proxy-body-size']};", nginx)
    assert f"proxy_read_timeout {notes['nginx.ingress.kubernetes.io/proxy-read-timeout']}s;" in nginx


@pytest.mark.parametrize("path", sorted(FOLDER.rglob("*.yaml")), ids=lambda path: str(path.relative_to(FOLDER)))
def test_a_manifest_alone_is_right(path: Path) -> None:
    """Also without kustomize: the test adds its names, labels and selectors."""
    for manifest in yaml.safe_load_all(path.read_text()):
        if manifest.get("kind") in {None, "Component", "Kustomization", *OPERATORS}:
            continue
        if manifest["kind"] == "Deployment":
            manifest["spec"]["selector"] = {"matchLabels": {"a": "b"}}
            manifest["spec"]["template"]["metadata"] = {"labels": {"a": "b"}}

        kubernetes_validate.validate(manifest, VERSION, strict=True)


@needs_kubectl
def test_selectors_probes_and_mounts_meet_what_they_mean() -> None:
    manifests = built("cluster")
    pod = find(manifests, "Deployment")["spec"]["template"]
    (container,) = pod["spec"]["containers"]
    monitor = find(manifests, "ServiceMonitor")["spec"]
    service = find(manifests, "Service")
    labels = pod["metadata"]["labels"].items()

    for selector in (
        service["spec"]["selector"],
        find(manifests, "Deployment")["spec"]["selector"]["matchLabels"],
        find(manifests, "PodDisruptionBudget")["spec"]["selector"]["matchLabels"],
    ):
        assert selector.items() <= labels
    assert monitor["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    assert monitor["endpoints"][0]["port"] == service["spec"]["ports"][0]["name"]
    assert find(manifests, "HorizontalPodAutoscaler")["spec"]["scaleTargetRef"]["name"] == "embedyard"
    assert [container[probe]["httpGet"]["path"] for probe in ("startupProbe", "livenessProbe", "readinessProbe")] == [
        "/health", "/health", "/ready",
    ]  # fmt: skip
    assert {mount["name"] for mount in container["volumeMounts"]} == {v["name"] for v in pod["spec"]["volumes"]}
    maps = {manifest["metadata"]["name"] for manifest in manifests if manifest["kind"] == "ConfigMap"}
    assert {source["configMapRef"]["name"] for source in container["envFrom"] if "configMapRef" in source} <= maps


@needs_kubectl
def test_a_pod_may_do_nothing_that_it_need_not() -> None:
    pod = find(built("base"), "Deployment")["spec"]["template"]["spec"]
    (container,) = pod["containers"]

    assert (pod["securityContext"]["runAsNonRoot"], pod["securityContext"]["runAsUser"]) == (True, 10001)
    assert pod["automountServiceAccountToken"] is False
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }


@needs_kubectl
def test_a_gpu_comes_whole_and_with_its_image() -> None:
    (container,) = find(built("gpu"), "Deployment")["spec"]["template"]["spec"]["containers"]

    assert container["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert container["image"] == "embedyard:cuda"


def test_its_settings_and_its_registry_are_ones() -> None:
    kustomization = yaml.safe_load((FOLDER / "base/kustomization.yaml").read_text())
    literals = dict(text.split("=", 1) for text in kustomization["configMapGenerator"][0]["literals"])
    deployment = (FOLDER / "base/deployment.yaml").read_text()
    known = {variable.name: variable for variable in VARIABLES}

    for name, text in literals.items():
        known[name].read(text)
    assert re.findall(r"\{name: ([A-Z_]+),", deployment) == ["REGISTRY"]
    assert parse_registry((FOLDER / "base/registry.yaml").read_text()).default_model == "all-MiniLM-L6-v2"
