"""Builds the hosts of this machine: a scheduler and a loader for each device, one model store for all.

The composition root of `engines`. Importing it imports torch, so `engines/host.py`, the public interface, does not.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from msgspec import Struct, structs

from engines.batching.autotune import TuningStore
from engines.device import torch_runtime
from engines.device.cores import waking_cores
from engines.device.cpu_features import fast_dtypes
from engines.device.crash_journal import CrashJournal, JournaledLoader, JournaledScheduler
from engines.device.flex import FlexWork
from engines.device.memory import MemoryReading, device_memory, spare_bytes
from engines.device.scheduler import DeviceScheduler
from engines.errors import InvalidValue
from engines.form_cache import FormCache
from engines.host import Host, HostConfig, default_runtime
from engines.hub.client import HubConfig
from engines.hub.content_digests import SERVING_REST_SHARE, ContentDigests
from engines.hub.file_verification import Verification
from engines.hub.store import ModelStore
from engines.inputs.tokenizer_threads import TokenizerThreads
from engines.loading.builders import Knowledge
from engines.loading.loader import LoaderSettings, TorchLoader
from engines.loading.precision import MeasuredState, measure_dtype
from engines.loading.recorded_tokenizer import BUILT_SHARE, TokenizerRecords
from engines.models.load_records import LoadRecords
from engines.models.prepacked import COPY_SHARE, MAX_PREPACKED_BYTES
from engines.pool.estimates import Measurements
from engines.pool.pool_group import PoolGroup
from engines.pool.runtime import GPU_THREADS, guessed_workspace_bytes
from engines.pool.slot import PoolPolicy
from engines.precision import PrecisionStore
from engines.protocols import Loader
from engines.space_memory import SpaceMemory
from engines.spec import ModelSpec, Precision
from engines.types import Budget, HostBudget, ModelFiles

__all__ = ["LoaderSettings", "Machine", "MachineConfig", "PoolPolicy", "find_devices", "measure_precisions"]

# Up to this many cores, forward passes use them all; beyond, one is left to the event loop.
_SHARED_CORES = 2


class MachineConfig(Struct, frozen=True, kw_only=True):
    """The server's settings for this machine.

    `host_budget`: main memory for parked models, of the whole machine. It is divided among the devices of as many
    processes as `host_parts`.

    `devices`: any of `auto`, `cpu`, `cuda`, `cuda:N`; `cpu:0`, `cpu:1` … simulate several devices on a CPU, each with
    the budget. `cores`: the number that this process may use. `hub`: None uses
    huggingface_hub's environment. `host_id`: the only host's id, if the device's name is not unique. `note`: receives
    crash journal notes (`engines/device/crash_journal.py`); None keeps no journal.
    """

    devices: tuple[str, ...] = ("auto",)
    budget: Budget = Budget(fraction=0.8)
    host_budget: HostBudget = "auto"
    host_parts: int = 1
    cores: int = 1
    tokenizer_threads: int = 1
    state_folder: Path | None = None
    watchdog_s: float = 120.0
    loader: LoaderSettings = LoaderSettings()
    rules: PoolPolicy = PoolPolicy()
    hub: HubConfig | None = None
    host_id: str | None = None
    note: Callable[[str], None] | None = None


class Machine:
    """All hosts of this process and their shared resources.

    Args:
        config: the machine's settings.
        specs: the models that may be served.
    """

    def __init__(self, config: MachineConfig, specs: Mapping[str, ModelSpec]) -> None:
        folder = config.state_folder
        self._threads = TokenizerThreads(config.tokenizer_threads)
        self._store = ModelStore(config.hub, verification=Verification(folder / "verified.json" if folder else None))
        self._schedulers: list[DeviceScheduler] = []
        self._main_memory = device_memory("cpu").read()
        self._measurements = Measurements(folder / "measurements.json" if folder else None)
        self._loader_settings = structs.replace(
            config.loader,
            canary_folder=folder / "canaries" if folder else None,
            tuning_store=TuningStore(folder),
            precision_store=PrecisionStore(folder),
            form_cache=form_cache_in(folder),
            content_digests=ContentDigests(folder, rest_share=SERVING_REST_SHARE),
            space_memory=SpaceMemory(folder),
            knowledge=Knowledge(
                LoadRecords(folder),
                TokenizerRecords(
                    folder / "tokenizers" if folder else None,
                    self._main_memory.total_bytes // BUILT_SHARE // config.host_parts,
                ),
            ),
        )
        devices = find_devices(config.devices)
        self._host_parts = config.host_parts * len(devices)
        self._groups = {"cpu": PoolGroup(), "cuda": PoolGroup()}  # models are split over devices of one kind
        self.hosts = tuple(self._host(device, config, specs) for device in devices)

    def close(self) -> None:
        """Ends the threads; the hosts must be closed before."""
        self._store.close()
        for scheduler in self._schedulers:
            scheduler.close()
        self._threads.close()

    @property
    def schedulers(self) -> Sequence[DeviceScheduler]:
        """The hosts' schedulers, in the order of the hosts."""
        return self._schedulers

    def _host(self, name: str, config: MachineConfig, specs: Mapping[str, ModelSpec]) -> Host:
        device = torch_name(name)
        scheduler, loader, conditions = self._scheduler_and_loader(device, config)
        self._schedulers.append(scheduler)
        host_config = HostConfig(
            host_id=config.host_id or name,
            device=device,
            budget=config.budget,
            host_budget_bytes=host_budget_bytes(config.host_budget, device, self._main_memory) // self._host_parts,
            default_host_bytes=host_budget_bytes("auto", device, self._main_memory) // self._host_parts,
            host_parts=self._host_parts,
            workspace_bytes=guessed_workspace_bytes(device),
            conditions=conditions,
            watchdog_s=config.watchdog_s,
            rules=config.rules,
        )
        runtime = structs.replace(
            default_runtime(host_config, self._measurements),
            health=scheduler.health,
            precisions=self._loader_settings.precision_store,
            form_cache=self._loader_settings.form_cache,
            group=self._groups[device.partition(":")[0]],
        )
        return Host(host_config, specs, self._store, loader, runtime)

    def _scheduler_and_loader(self, device: str, config: MachineConfig) -> tuple[DeviceScheduler, Loader, str]:
        """Builds a device's scheduler and loader; also returns the settings that memory use depends on."""
        scheduler = open_scheduler(device, config.cores, DeviceScheduler if config.note is None else JournaledScheduler)
        settings = self._loader_settings
        if device == "cpu":  # GPUs prepack nothing, and reading a GPU's memory takes a CUDA context
            max_bytes = config.budget.of(device_memory(device).read().total_bytes) // COPY_SHARE
            settings = structs.replace(settings, max_prepacked_bytes=min(MAX_PREPACKED_BYTES, max_bytes))
        loader = TorchLoader(device, scheduler, self._threads, settings)
        conditions = conditions_of(settings, scheduler.num_threads)
        if config.note is None or not isinstance(scheduler, JournaledScheduler):
            return scheduler, loader, conditions
        scheduler.journal = CrashJournal(config.note)
        return scheduler, JournaledLoader(loader, scheduler), conditions


def host_budget_bytes(budget: HostBudget, device: str, main_memory: MemoryReading) -> int:
    """Returns the bytes of main memory for parked models of all devices together. `auto` parks no model of a CPU, whose
    memory is the same."""
    if budget != "auto":
        return budget.of(main_memory.total_bytes)
    return 0 if device == "cpu" else spare_bytes(main_memory)


def conditions_of(settings: LoaderSettings, num_threads: int) -> str:
    """Returns the settings that a model's measured bytes depend on, as a key of measurements (`HostConfig.conditions`).

    These are the number of batches that run at once (one per thread), their tokens, and the limit of prepacked weights.
    """
    tokens = settings.max_batch_tokens or "default"
    return f"threads={num_threads} tokens={tokens} copies={settings.max_prepacked_bytes}"


def form_cache_in(state_folder: Path | None) -> FormCache:
    """Returns the quantised weights that this machine keeps in a folder of state; None keeps none."""
    return FormCache(state_folder / "forms" if state_folder else None, " ".join(fast_dtypes()))


def measure_precisions(
    spec: ModelSpec, files: ModelFiles, dtypes: Sequence[str], texts: Sequence[str] | None, state_folder: Path | None
) -> Iterator[Precision]:
    """Measures reduced dtypes of a model on this machine's CPU, and keeps what was found and quantised weights.

    Args:
        texts: the operator's; None for the built-in ones.
        state_folder: where; None keeps nothing.

    Raises:
        BadModel: the model cannot be loaded.
    """
    store, state = (
        PrecisionStore(state_folder),
        MeasuredState(form_cache_in(state_folder), ContentDigests(state_folder)),
    )
    for dtype in dtypes:
        precision = measure_dtype(spec, files, dtype, texts, state)
        store.put(spec, files.revision, precision, "cpu")
        yield precision


def find_devices(device_settings: Sequence[str]) -> tuple[str, ...]:
    """Resolves the setting `DEVICE`: `auto` is every GPU, or the CPU without one.

    Raises:
        InvalidValue: it names a GPU that this machine does not have.
    """
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    found: list[str] = []
    for device in device_settings:
        if device == "auto":
            found += [f"cuda:{index}" for index in range(num_gpus)] or ["cpu"]
        else:
            found.append("cuda:0" if device == "cuda" else device)
    for device in found:
        if torch_name(device) != "cpu" and int(device.removeprefix("cuda:")) >= num_gpus:
            raise InvalidValue(f"DEVICE names {device}, but {_why_no_gpu(num_gpus)}")
    return tuple(dict.fromkeys(found))


def torch_name(device: str) -> str:
    """Returns torch's name of a device: `cpu:N`, one of several simulated devices, is the CPU."""
    return "cpu" if device.startswith("cpu") else device


def _why_no_gpu(num_gpus: int) -> str:
    if torch.version.cuda is None and torch.version.hip is None:
        return (
            f"PyTorch {torch.__version__} is a build for CPUs: remove .venv, then make serve COMPUTE=cuda (an image: "
            "make image COMPUTE=cuda); or set DEVICE=cpu"
        )
    return f"torch finds {num_gpus} CUDA devices on this machine: choose another DEVICE"


def open_scheduler(device: str, num_cores: int, kind: type[DeviceScheduler] = DeviceScheduler) -> DeviceScheduler:
    """Starts the scheduler of a device; a CPU's has one thread for each core that forward passes may use.

    A GPU's has two: while one waits for a batch, the other prepares the next one and queues it on the device.
    """
    if device != "cpu":
        return kind(device, partial(torch.cuda.set_device, torch.device(device)), num_threads=GPU_THREADS)
    num_threads = num_cores if num_cores <= _SHARED_CORES else num_cores - 1
    return kind(
        device,
        torch_runtime.prepare,
        num_threads=num_threads,
        use_cores=torch_runtime.set_threads,
        flex_work=FlexWork(time.thread_time, pins_cores=True),
        waking_cores=waking_cores(num_threads),
    )
