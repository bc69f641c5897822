"""The real hosts of this machine: its devices, a lane and a loader for each, one store of files for all.

The composition root of this package; importing it imports torch, so the door (`engines/host.py`) does not.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from msgspec import Struct, structs

from engines.batching.autotune import TuningStore
from engines.device import torch_runtime as cores
from engines.device.crash_journal import CrashJournal, JournaledLoader, JournaledScheduler
from engines.device.memory import device_memory
from engines.device.scheduler import DeviceScheduler
from engines.errors import InvalidValue
from engines.host import Host, HostConfig, default_runtime
from engines.hub.client import HubConfig
from engines.hub.file_verification import Verification
from engines.hub.store import ModelStore
from engines.inputs.tokenizer_threads import TokenizerThreads
from engines.loading.loader import LoaderSettings, TorchLoader
from engines.models.prepacked import COPY_SHARE, MAX_PREPACKED_BYTES
from engines.pool.estimates import Measurements
from engines.pool.slot import PoolPolicy
from engines.protocols import Loader
from engines.spec import ModelSpec
from engines.types import Budget

__all__ = ["LoaderSettings", "Machine", "MachineConfig", "find_devices"]

# Up to so many cores the forward passes take them all; beyond, one is left to the event loop.
_SHARED_CORES = 2


_GPU_THREADS = 2


class MachineConfig(Struct, frozen=True, kw_only=True):
    """What the server's settings say about this machine.

    `devices`: `auto`, `cpu`, `cuda`, `cuda:N`, several of them; `cores`: those that this process may use.
    `hub`: None is what huggingface_hub reads from the environment. `host_id`: of the only host, where a device's
    name is not enough. `note`: see `engines/device/crash_journal.py`; None where nobody would read it.
    """

    devices: tuple[str, ...] = ("auto",)
    budget: Budget = Budget(fraction=0.8)
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
    """All hosts of this process, and what they share.

    Args:
        config: the machine's part.
        specs: the models that may be served.
    """

    def __init__(self, config: MachineConfig, specs: Mapping[str, ModelSpec]) -> None:
        folder = config.state_folder
        self._threads = TokenizerThreads(config.tokenizer_threads)
        self._store = ModelStore(config.hub, verification=Verification(folder / "verified.json" if folder else None))
        self._lanes: list[DeviceScheduler] = []
        self._measurements = Measurements(folder / "measurements.json" if folder else None)
        self._loader_settings = structs.replace(
            config.loader, canary_folder=folder / "canaries" if folder else None, tuning_store=TuningStore(folder)
        )
        self.hosts = tuple(self._host(device, config, specs) for device in find_devices(config.devices))

    def close(self) -> None:
        """End the threads; the hosts must be closed before."""
        self._store.close()
        for lane in self._lanes:
            lane.close()
        self._threads.close()

    @property
    def schedulers(self) -> Sequence[DeviceScheduler]:
        """One for each host, in their order."""
        return self._lanes

    def _host(self, device: str, config: MachineConfig, specs: Mapping[str, ModelSpec]) -> Host:
        lane, loader, conditions = self._lane_and_loader(device, config)
        self._lanes.append(lane)
        own = HostConfig(
            host_id=config.host_id or device,
            device=device,
            budget=config.budget,
            conditions=conditions,
            watchdog_s=config.watchdog_s,
            rules=config.rules,
        )
        world = structs.replace(default_runtime(own, self._measurements), health=lane.health)
        return Host(own, specs, self._store, loader, world)

    def _lane_and_loader(self, device: str, config: MachineConfig) -> tuple[DeviceScheduler, Loader, str]:
        """Also says what the bytes of a model depend on here (`HostConfig.conditions`)."""
        lane = open_scheduler(device, config.cores, DeviceScheduler if config.note is None else JournaledScheduler)
        settings = self._loader_settings
        if device == "cpu":  # elsewhere nothing is held twice, and to read a GPU's memory takes a context
            room = config.budget.of(device_memory(device).read().total_bytes) // COPY_SHARE
            settings = structs.replace(settings, max_prepacked_bytes=min(MAX_PREPACKED_BYTES, room))
        loader = TorchLoader(device, lane, self._threads, settings)
        conditions = conditions_of(settings, lane.num_threads)
        if config.note is None or not isinstance(lane, JournaledScheduler):
            return lane, loader, conditions
        lane.journal = CrashJournal(config.note)
        return lane, JournaledLoader(loader, lane), conditions


def conditions_of(settings: LoaderSettings, num_threads: int) -> str:
    """The settings on which the measured bytes of a model depend: as many batches as threads are in work at once, each
    of at most so many tokens, and a budget decides how large second copies of weights may be.
    """
    tokens = settings.max_batch_tokens or "default"
    return f"threads={num_threads} tokens={tokens} copies={settings.max_prepacked_bytes}"


def find_devices(wanted: Sequence[str]) -> tuple[str, ...]:
    """The devices behind `DEVICE`: `auto` is every GPU there is, else the CPU.

    Raises:
        InvalidValue: a GPU is asked for that is not here.
    """
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    found: list[str] = []
    for device in wanted:
        if device == "auto":
            found += [f"cuda:{index}" for index in range(num_gpus)] or ["cpu"]
        else:
            found.append("cuda:0" if device == "cuda" else device)
    for device in found:
        if device != "cpu" and int(device.removeprefix("cuda:")) >= num_gpus:
            raise InvalidValue(
                f"DEVICE names {device}, but this machine has {num_gpus} CUDA devices that torch can use"
            )
    return tuple(dict.fromkeys(found))


def open_scheduler(device: str, num_cores: int, kind: type[DeviceScheduler] = DeviceScheduler) -> DeviceScheduler:
    """The lane of a device; a CPU's has a thread for each core that the forward passes may take.

    A GPU's has two: while one waits for a batch, the other makes the next one ready and hands it to the device.
    """
    if device != "cpu":
        return kind(device, partial(torch.cuda.set_device, torch.device(device)), num_threads=_GPU_THREADS)
    num_threads = num_cores if num_cores <= _SHARED_CORES else num_cores - 1
    return kind(device, cores.prepare, num_threads=num_threads, use_cores=cores.set_threads)
