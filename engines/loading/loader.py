"""Model folder → engine on a device. One loader a device; the caller holds the process-wide load lock.

transformers' loading is not thread-safe (four threads, a hundred loads: four models came out silently wrong), which
is why `LOAD_LOCK` exists and why nothing else in this process may call `from_pretrained`.
"""

import ctypes
import gc
import os
import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
import transformers
from msgspec import Struct, structs

from engines.batching.autotune import CANDIDATES, BatchSizeSearch, BatchSizeTuner, TuningStore
from engines.batching.batch import BatchLimits
from engines.batching.engine import EmbeddingEngine, EngineLimits, Parts
from engines.device.load_throttle import LoadThrottle, throttled_load
from engines.device.scheduler import DeviceScheduler
from engines.device.torch_runtime import device_name, finisher
from engines.errors import OutOfMemory, UnsupportedModel, is_out_of_memory
from engines.inputs.tokenizer import Tokenizer
from engines.inputs.tokenizer_threads import TokenizerThreads
from engines.loading.builders import build
from engines.loading.folder import PLACEHOLDER_PROMPTS, read_folder
from engines.models.base import CheckableEncoder, weight_bytes, workspace_bytes
from engines.models.cuda_graphs import CAPTURING
from engines.models.prepacked import MAX_PREPACKED_BYTES
from engines.models.verification import Canaries, check_again, select_forward_path
from engines.spec import Matryoshka, ModelSpec
from engines.types import ModelFiles, ModelInfo, fingerprint

# Batches of this many tokens fit in a core's cache on CPU and fill a GPU.
_BATCH_TOKENS = {"cpu": 512, "cuda": 16384}


class LoaderSettings(Struct, frozen=True, kw_only=True):
    """What the server's settings say to engines; `None` means the device's default.

    `largest_copy`: bytes of second copies of weights that a model may hold where that is faster.
    `paces`: how large batches should be, where that is not set; None tries nothing out.
    """

    max_batch_tokens: int | None = None
    max_batch_items: int = 512
    max_queue_items: int = 8192
    batch_timeout_s: float = 0.0
    target_dim: int | None = None
    canary_folder: Path | None = None
    largest_copy: int = MAX_PREPACKED_BYTES
    paces: TuningStore | None = None


class TorchLoader:
    """Loads models onto one device (`engines.protocols.Loader`).

    Args:
        device: `cpu` or `cuda:N`.
        lane: where the engines take turns.
        threads: where they tokenise.
        settings: their limits.
    """

    def __init__(self, device: str, lane: DeviceScheduler, threads: TokenizerThreads, settings: LoaderSettings) -> None:
        self._device = torch.device(device)
        self._scheduler = lane
        self._threads = threads
        self._settings = settings
        self._canaries = Canaries(settings.canary_folder)
        if self._device.type == "cpu":  # threads that read weights beside each other take cores from who is served
            os.environ.setdefault("HF_DEACTIVATE_ASYNC_LOAD", "1")
        transformers.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # untyped upstream
        transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # untyped upstream

    def load(self, spec: ModelSpec, files: ModelFiles) -> EmbeddingEngine:
        """Build the engine; see `Loader.load`."""
        try:
            with warnings.catch_warnings(), throttled_load(LoadThrottle(self._scheduler.wait_for_short_tasks)):
                warnings.simplefilter("ignore")
                return self._load(spec, files)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise OutOfMemory(f"{self._device} has no memory left to load {spec.model_id}") from error

    def _load(self, spec: ModelSpec, files: ModelFiles) -> EmbeddingEngine:
        folder = read_folder(Path(files.path))
        encoder, tokenizer, dtype = build(folder, spec, self._device)
        encoder.largest_copy, encoder.num_threads = self._settings.largest_copy, self._scheduler.num_threads
        prompts = {**folder.prompts, **spec.prompts}
        info = ModelInfo(
            dimensions=encoder.dimensions,
            max_tokens=tokenizer.max_tokens,
            dtype=dtype,
            attention=encoder.attention,
            path=encoder.path,
            prompts=prompts,
            matryoshka=spec.matryoshka or Matryoshka(widths=folder.widths),
        )
        settled = with_default_prompt(spec, folder.default_prompt, prompts)
        key = fingerprint([spec.model_id, files.revision, dtype, self._device.type, spec.pooling, spec.max_tokens])

        def check() -> tuple[ModelInfo, int, int]:
            encoder.pause = self._scheduler.preemption_point
            vectors, notes = select_forward_path(encoder, tokenizer, dtype, self._canaries.known(key))
            if self._device.type != "cpu":
                encoder.pause = lambda: None  # kernels that wait on the device cannot be overtaken
            self._canaries.compare(key, vectors, dtype, _written_s(files))
            encoder.recheck = partial(check_again, tokenizer=tokenizer, dtype=dtype, vectors=vectors)
            found = structs.replace(info, attention=encoder.attention, path=encoder.path, notes=notes)
            return found, size + encoder.extra_bytes(), workspace

        tokens, tuner = self._batch_tokens(spec, encoder, tokenizer, f"{files.revision} {dtype}")
        limits = self._limits(tokens, folder.truncate_dim)
        # On a GPU batches run one after the other, whatever was handed to it.
        num_turns = self._scheduler.num_threads if encoder.is_reentrant and self._device.type == "cpu" else 1
        largest = max(CANDIDATES[self._device.type]) if tuner is not None else tokens
        workspace = num_turns * workspace_bytes(encoder, largest)
        parts = Parts(encoder, tokenizer, settled, info, tuner)
        # The cache is main memory, which is a CPU's budget and no GPU's.
        size = weight_bytes(encoder) + (spec.cache_bytes if self._device.type == "cpu" else 0)
        return EmbeddingEngine(parts, self._scheduler, self._threads, limits, check, self._release, size)

    def _batch_tokens(
        self, spec: ModelSpec, encoder: CheckableEncoder, tokenizer: Tokenizer, weights: str
    ) -> tuple[int, BatchSizeTuner | None]:
        """Tokens a batch, and who finds out better. Three cases: 1. somebody has set them; 2. they were found out
        before, or nobody is to; 3. they will be found out."""
        given, paces = spec.max_batch_tokens or self._settings.max_batch_tokens, self._settings.paces
        if given is not None or paces is None:
            return given or _BATCH_TOKENS[self._device.type], None  # (1), (2)
        key = fingerprint([weights, device_name(self._device), self._scheduler.num_threads, torch.__version__])
        pace = paces.get(key)
        if pace is not None:
            return pace.batch_tokens, None  # (2)
        num_parts = encoder.num_layers if self._device.type == "cpu" else 1
        tuner = BatchSizeTuner(
            encoder,
            tokenizer,
            BatchSizeSearch(CANDIDATES[self._device.type], num_parts),
            own_s=self._scheduler.task_elapsed_s,
            finish=finisher(self._device),
            keep=partial(paces.put, key),
        )
        return _BATCH_TOKENS[self._device.type], tuner  # (3)

    def _limits(self, tokens: int, truncate_dim: int | None) -> EngineLimits:
        settings = self._settings
        return EngineLimits(
            batch=BatchLimits(tokens, settings.max_batch_items),
            max_queue_items=settings.max_queue_items,
            batch_timeout_s=settings.batch_timeout_s,
            target_dim=settings.target_dim or truncate_dim,
        )

    def _release(self) -> None:
        """Give freed memory back: Python's cycles, torch's cache, and the C library's arenas."""
        gc.collect()
        if self._device.type == "cuda":
            with CAPTURING:
                torch.cuda.empty_cache()
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def _written_s(files: ModelFiles) -> float:
    """When a file of a hub's was written last; 0 for a local folder, whose revision changes with its files."""
    paths = Path(files.path).rglob("*") if files.stamp else ()
    return max((path.stat().st_mtime for path in paths if path.is_file()), default=0.0)


def with_default_prompt(spec: ModelSpec, stated: str | None, prompts: Mapping[str, str]) -> ModelSpec:
    """The spec with its default prompt settled: the registry's, else the folder's (`default_prompt_name`).

    Raises:
        UnsupportedModel: no prompt has that name; leaving it out in silence would be a wrong vector.
    """
    name = spec.default_prompt or stated
    if name is not None and name not in (*prompts, *PLACEHOLDER_PROMPTS):
        known = ", ".join(sorted(prompts)) or "none"
        raise UnsupportedModel(
            f"the default prompt is {name!r}, but the prompts are {known}; name one, or add it to `prompts`"
        )
    return structs.replace(spec, default_prompt=name)
