"""Tests the manifests, built by kustomize where it is installed, against Kubernetes' schemas."""

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
KINDS = {"base": BASE, "gpu": BASE, "monitored": BASE | {"HorizontalPodAutoscaler", "ServiceMonitor"}}

needs_kubectl = pytest.mark.skipif(shutil.which("kubectl") is None, reason="there is no kubectl, which has kustomize")


@cache
def built(name: str) -> list[dict[str, Any]]:
    done = subprocess.run(
        ["kubectl", "kustomize", FOLDER / name], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


def find(manifests: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    return next(manifest for manifest in manifests if manifest["kind"] == kind)


@needs_kubectl
@pytest.mark.parametrize("name", KINDS)
def test_what_kustomize_builds_is_what_kubernetes_takes(name: str) -> None:
    manifests = built(name)

    assert {manifest["kind"] for manifest in manifests} == KINDS[name]
    for manifest in manifests:
        assert manifest["metadata"]["namespace"] == "embedyard"
        if manifest["kind"] not in OPERATORS:
            kubernetes_validate.validate(manifest, VERSION, strict=True)


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*/*.yaml")), ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_manifest_alone_is_right(path: Path) -> None:
    """Also without kustomize: the test adds its names, labels and selectors."""
    manifest = yaml.safe_load(path.read_text())
    if manifest.get("kind") in {None, "Kustomization", *OPERATORS}:
        return
    if manifest["kind"] == "Deployment":
        manifest["spec"]["selector"] = {"matchLabels": {"a": "b"}}
        manifest["spec"]["template"]["metadata"] = {"labels": {"a": "b"}}

    kubernetes_validate.validate(manifest, VERSION, strict=True)


@needs_kubectl
def test_selectors_probes_and_mounts_meet_what_they_mean() -> None:
    manifests = built("monitored")
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
