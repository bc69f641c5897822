"""Declares every metric once: name, kind, labels, meaning. A leaf; `recorder.py` keeps the values.

`python -m router.observability.metrics` prints the table of docs/operations.md. Labels take few values: `model` is a
registry name and never what a client has typed, `route` a template, `host` one per device, `code` a code of the error
table or `ok`.
"""

from typing import Literal

import click
from msgspec import Struct

Kind = Literal["counter", "gauge", "histogram"]

_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_LONG_SECONDS = (1.0, 5.0, 15.0, 60.0, 300.0, 900.0, 3600.0, 14400.0, 86400.0)
_TEXTS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0)
_TOKENS = (16.0, 64.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0, 32768.0, 65536.0)
_SHARES = (0.25, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0)
_RATIOS = (0.25, 0.5, 0.8, 0.9, 0.95, 1.0, 1.05, 1.1, 1.25, 1.5, 2.0, 4.0)


class Metric(Struct, frozen=True, cache_hash=True):
    """One metric. `buckets` are the upper bounds of a histogram, in the unit that its name ends with."""

    name: str
    kind: Kind
    labels: tuple[str, ...]
    meaning: str
    buckets: tuple[float, ...] = ()


def _counter(name: str, labels: str, meaning: str) -> Metric:
    return Metric(f"embedyard_{name}_total", "counter", tuple(labels.split()), meaning)


def _gauge(name: str, labels: str, meaning: str) -> Metric:
    return Metric(f"embedyard_{name}", "gauge", tuple(labels.split()), meaning)


def _histogram(name: str, labels: str, meaning: str, buckets: tuple[float, ...] = _SECONDS) -> Metric:
    return Metric(f"embedyard_{name}", "histogram", tuple(labels.split()), meaning, buckets)


# ---- requests, counted when they end ----

REQUESTS = _counter("requests", "route model status code", "Requests answered. A client that hung up counts as 499")
IN_FLIGHT = _gauge("requests_in_flight", "", "Requests inside the server now")
REJECTED = _counter(
    "rejected", "model reason", "Requests refused for lack of room, rights to it, or a model: 429 and 503 by their code"
)
REQUEST_SECONDS = _histogram("request_seconds", "model", "Requests of models that succeeded, from first byte to last")
LOAD_WAIT_SECONDS = _histogram("load_wait_seconds", "model", "Of these, waiting for the model; 0 when it was ready")
TOKENIZE_SECONDS = _histogram("tokenize_seconds", "model", "Of these, turning texts into tokens")
QUEUE_SECONDS = _histogram("queue_seconds", "model", "Of these, waiting in the model's queue")
FORWARD_SECONDS = _histogram(
    "forward_seconds", "model", "Of these, from the first forward pass to the last vector or score"
)
ENCODE_SECONDS = _histogram("encode_seconds", "model", "Of these, writing vectors or scores as JSON or base64")
INPUTS = _counter("inputs", "model", "Texts embedded or labelled, and pairs scored")
PROMPT_TOKENS = _counter(
    "prompt_tokens", "model", "Their tokens, special tokens included; a query counts once for each document"
)
TRUNCATED = _counter("truncated_inputs", "model", "Texts that were longer than the model reads, and were cut")
REUSED = _counter("reused_inputs", "model", "Texts that were under way already, for another request or twice in one")
CACHED = _counter("cached_inputs", "model", "Texts whose vectors came from the model's cache (`cache` in the registry)")
BATCH_TEXTS = _histogram("batch_texts", "model", "Texts in one forward pass", _TEXTS)
BATCH_TOKENS = _histogram("batch_tokens", "model", "Real tokens in one forward pass", _TOKENS)
PACKING = _histogram("packing_efficiency_ratio", "model", "Real tokens over computed ones; 1 has no padding", _SHARES)

BATCH_LINES = _counter("batch_lines", "outcome", "Lines of batches answered: completed, or failed into the error file")
BATCH_JOB_SECONDS = _histogram(
    "batch_job_seconds", "status", "A batch of a file from its creation to its end, by the status it ended with",
    _LONG_SECONDS,
)  # fmt: skip

# ---- models, counted from the event stream ----

LOADS = _counter("loads", "model host", "Models loaded")
LOAD_SECONDS = _histogram("load_seconds", "model", "One load with its warm-up, files being on disk")
LOAD_FAILURES = _counter("load_failures", "model kind", "Failed fetches, loads and warm-ups, by kind of failure")
EVICTIONS = _counter(
    "evictions",
    "model cause",
    "Models that left their device: room, over_budget, idle, operator, registry, shutdown or damaged",
)
EVICTION_AGE_SECONDS = _histogram("eviction_age_seconds", "model", "How long evicted models had stayed", _LONG_SECONDS)
WAKES = _counter("wakes", "model host", "Models that came back from main memory, where they were parked")
WAKE_SECONDS = _histogram("wake_seconds", "model", "One return from main memory, with the check of the vectors")
TURNS = _counter(
    "turns", "model", "Evictions in favour of the model that had just made room for this one: memory is too small"
)
ESTIMATE_RATIO = _histogram(
    "estimate_error_ratio", "model", "Measured bytes over those a load was admitted with; 1 is right", _RATIOS
)
DOWNLOAD_BYTES = _counter("download_bytes", "model", "Bytes of model files brought to disk")

# ---- states and bytes, read at each scrape ----

MODEL_STATE = _gauge("model_state", "model host state", "1 for the state that the model is in; other states are absent")
QUEUE_DEPTH = _gauge("queue_depth", "model host", "Texts admitted and not yet run")
LEASES = _gauge("leases", "model host", "Requests running on the model")
WAITERS = _gauge("waiters", "model host", "Requests waiting for the model to be loaded")
FALLBACK = _gauge(
    "model_fallback", "model host", "1 while the model runs on its slowest path because a faster one failed; it returns"
)
MODEL_BYTES = _gauge("model_bytes", "model host", "Weights charged to the budget for the model")
RESIDENTS = _gauge("resident_models", "host", "Models in memory, or on their way in or out")
USED_BYTES = _gauge("used_bytes", "host", "Weights charged to the budget")
WORKSPACE_BYTES = _gauge("workspace_bytes", "host", "Reserved for the forward passes that may run at once")
FREE_BYTES = _gauge("free_bytes", "host", "What the budget has left")
BUDGET_BYTES = _gauge("budget_bytes", "host", "What models may take of the device")
HOST_USED_BYTES = _gauge(
    "host_used_bytes", "host", "Main memory charged to the host budget, for parked models and layers of split ones"
)
HOST_BUDGET_BYTES = _gauge(
    "host_budget_bytes", "host", "Main memory that parked models may take; 0 where none are parked"
)
DEVICE_BYTES = _gauge("device_bytes", "host", "The device's memory")
WORKING_SET_BYTES = _gauge(
    "working_set_bytes", "host", "What the models used within 10 minutes would take together; above the budget: thrash"
)
DEVICE_UP = _gauge("device_up", "host", "0 when the device has failed, its thread has died, or a forward pass hangs")
HOST_RESTARTS = _gauge("host_restarts", "host", "How often the host's worker process has died and was started anew")
READY = _gauge("ready", "", "1 while new work is taken, 0 while the server drains")
LIMIT_STORAGE_UP = _gauge("limit_storage_up", "", "0 while the storage of rate limits does not answer")
BATCHES = _gauge("batches", "status", "Batches of all servers on this database, by status")
BUILD_INFO = _gauge("build_info", "version", "Always 1")
LOOP_LAG_SECONDS = _histogram("event_loop_lag_seconds", "", "How late the event loop woke a task that slept 0.25 s")

ALL: tuple[Metric, ...] = tuple(value for value in vars().values() if isinstance(value, Metric))

READ_AT_SCRAPE = frozenset({
    MODEL_STATE, QUEUE_DEPTH, LEASES, WAITERS, FALLBACK, MODEL_BYTES, RESIDENTS, USED_BYTES, WORKSPACE_BYTES,
    FREE_BYTES, BUDGET_BYTES, HOST_USED_BYTES, HOST_BUDGET_BYTES, DEVICE_BYTES, WORKING_SET_BYTES, DEVICE_UP,
    HOST_RESTARTS, READY, LIMIT_STORAGE_UP, BATCHES, BUILD_INFO,
})  # fmt: skip
"""Metrics whose values are not stored between scrapes."""


def markdown() -> str:
    """The table of metrics in docs/operations.md."""
    rows = [
        f"| `{metric.name}` | {metric.kind} | {' '.join(f'`{label}`' for label in metric.labels)} | {metric.meaning} |"
        for metric in ALL
    ]
    return "\n".join(["| metric | kind | labels | meaning |", "|---|---|---|---|", *rows])


if __name__ == "__main__":
    click.echo(markdown())
