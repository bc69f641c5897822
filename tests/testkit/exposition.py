"""Parses a scrape of metrics: values by name and labels."""

from collections.abc import Mapping

from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families


class Exposition:
    """The parsed answer of `GET /metrics`."""

    def __init__(self, text: str) -> None:
        self.families: Mapping[str, Metric] = {family.name: family for family in text_string_to_metric_families(text)}
        self._values = {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in self.families.values()
            for sample in family.samples
        }

    def __call__(self, name: str, **labels: str) -> float:
        """Return one value; 0 if it is missing."""
        return self._values.get((name, frozenset(labels.items())), 0.0)

    def label_values(self, label: str) -> set[str]:
        """Return all values of a label."""
        return {value for _, labels in self._values for name, value in labels if name == label}
