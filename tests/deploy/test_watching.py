"""Tests alerts, dashboard and scrape rules: each expression is PromQL, and its metrics and labels exist."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml
from prometheus_client import CollectorRegistry
from prometheus_client.process_collector import ProcessCollector
from promql_parser import AggregateExpr, Expr, VectorSelector

from router.observability import metrics
from tests.deploy.proxies import DEPLOY, is_here

RULES: list[dict[str, Any]] = yaml.safe_load((DEPLOY / "prometheus/alerts.yml").read_text())["groups"][0]["rules"]
DASHBOARD: dict[str, Any] = json.loads((DEPLOY / "grafana/embedyard.json").read_text())
_FROM_PROMETHEUS = {"instance", "job", "le"}
_SUFFIXES = {"counter": ("",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}


def series() -> dict[str, set[str]]:
    """Return every series of the server, with its labels."""
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    found = {sample.name: set[str]() for family in registry.collect() for sample in family.samples}
    for metric in metrics.ALL:
        for suffix in _SUFFIXES[metric.kind]:
            found[metric.name + suffix] = set(metric.labels)
    return found | {"up": set()}


def panels() -> Iterator[tuple[str, str]]:
    """Return every query of the dashboard, with the title of its panel."""
    for panel in DASHBOARD["panels"]:
        for target in panel.get("targets", ()):
            yield panel["title"], target["expr"]
    for note in DASHBOARD["annotations"]["list"]:
        yield note["name"], note["expr"]


def parsed(expression: str) -> Expr:
    """Parse PromQL in which Grafana's variables stand for texts and durations."""
    return promql_parser.parse(expression.replace("$__rate_interval", "5m"))


def nodes(expression: Expr) -> list[Expr]:
    found: list[Expr] = []
    promql_parser.walk(expression, lambda node: found.append(node))
    return found


def faults(expression: str) -> list[str]:
    """Return the series and labels that the server does not have."""
    known, found, labels = series(), [], set[str]()
    everything = nodes(parsed(expression))
    for node in everything:
        if isinstance(node, VectorSelector):
            own = known.get(node.name or "")
            found += [f"no metric {node.name}"] if own is None else []
            labels |= own or set()
            found += [
                f"{node.name} has no label {matcher.name}"
                for matcher in node.matchers.matchers
                if matcher.name not in (own or set()) | _FROM_PROMETHEUS
            ]
    for node in everything:
        if isinstance(node, AggregateExpr) and node.modifier is not None:
            found += [f"nothing has a label {name}" for name in set(node.modifier.labels) - labels - _FROM_PROMETHEUS]
    return found


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_an_alert_queries_existing_series_and_names_an_action(rule: dict[str, Any]) -> None:
    assert faults(rule["expr"]) == []
    assert rule["labels"]["severity"] in ("page", "ticket")
    assert rule["annotations"].keys() == {"summary", "action"}


@pytest.mark.parametrize(("title", "expression"), [*panels()], ids=lambda value: value[:40])
def test_a_panel_queries_existing_series(title: str, expression: str) -> None:
    assert faults(expression) == [], title


def test_a_query_with_a_mistake_would_be_found() -> None:
    assert faults("embedyard_nothing > 0") == ["no metric embedyard_nothing"]
    assert faults('embedyard_ready{model="m"}') == ["embedyard_ready has no label model"]
    assert faults("sum by (colour) (embedyard_queue_depth)") == ["nothing has a label colour"]
    with pytest.raises(ValueError, match=r"paren|expect|bracket"):
        faults("sum(embedyard_ready")


def test_every_metric_is_on_the_dashboard() -> None:
    shown = json.dumps(DASHBOARD)

    assert [metric.name for metric in metrics.ALL if metric.name not in shown] == []


def test_the_dashboard_shows_requests_of_each_route_without_probes() -> None:
    (expression,) = (expression for title, expression in panels() if title == "Requests, by route")

    assert expression.startswith("sum by (route)")
    assert 'model!=""' in expression


def test_the_dashboard_has_no_two_panels_in_one_place() -> None:
    taken = [
        (x, y)
        for place in (panel["gridPos"] for panel in DASHBOARD["panels"])
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]

    assert len(taken) == len(set(taken))
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    assert max(x for x, _ in taken) < 24


def test_the_rule_of_the_autoscaler_sums_the_metric_that_it_asks_for() -> None:
    folder = DEPLOY / "kubernetes/components/autoscaled"
    (rule,) = yaml.safe_load((folder / "adapter.yaml").read_text())["rules"]
    scaler = yaml.safe_load((folder / "hpa.yaml").read_text())
    (wanted,) = (metric["pods"]["metric"]["name"] for metric in scaler["spec"]["metrics"])
    query = rule["metricsQuery"].replace("<<.LabelMatchers>>", 'host="cpu"').replace("<<.GroupBy>>", "model")

    assert wanted == metrics.QUEUE_DEPTH.name
    assert faults(query) == []
    assert rule["seriesQuery"].startswith(wanted)


@pytest.mark.skipif(not is_here("promtool"), reason="there is no promtool: apt-get install prometheus")
@pytest.mark.parametrize(
    "words",
    [("check", "rules", "alerts.yml"), ("test", "rules", "alerts_test.yml"),
     ("check", "config", "--syntax-only", "prometheus.yml")],
    ids=" ".join,
)  # fmt: skip
def test_promtool_agrees(words: tuple[str, ...]) -> None:
    done = subprocess.run(
        ["promtool", *words], cwd=DEPLOY / "prometheus", capture_output=True, text=True, timeout=60, check=False
    )

    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_has_a_test_in_which_it_fires() -> None:
    tests = yaml.safe_load((DEPLOY / "prometheus/alerts_test.yml").read_text())["tests"]
    fired = {case["alertname"] for test in tests for case in test["alert_rule_test"] if case.get("exp_alerts")}

    assert fired == {rule["alert"] for rule in RULES}


def test_the_example_scrapes_the_path_and_job_that_the_alerts_know() -> None:
    (job,) = yaml.safe_load(Path(DEPLOY / "prometheus/prometheus.yml").read_text())["scrape_configs"]

    assert job["job_name"] == "embedyard"
    assert job.get("metrics_path", "/metrics") == "/metrics"
