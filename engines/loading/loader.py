"""Builds an engine from a model folder. One loader per device; the caller holds the process-wide load lock.

transformers' loading is not thread-safe (four threads, a hundred loads: four models came out silently wrong), which
is why `LOAD_LOCK` exists and why nothing else in this process may call `from_pretrained`.
"""

import ctypes
import gc
import os
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import structlog
import torch
import transformers
from msgspec import Struct, structs

from engines.batching.autotune import CANDIDATES, BatchSizeSearch, BatchSizeTuner, TuningStore
from engines.batching.batch import BatchLimits
from engines.batching.engine import EmbeddingEngine, EngineLimits, Parts
from engines.batching.rest_of_check import RestOfCheck
from engines.batching.spaces import ModelSpaces, SpaceSource
from engines.device.load_throttle import LoadThrottle, throttled_load
from engines.device.scheduler import DeviceScheduler
from engines.device.torch_runtime import compute_capability, device_name, finisher
from engines.errors import BadModel, DeviceDown, OutOfMemory, UnsupportedModel, device_loss, is_out_of_memory
from engines.form_cache import QUANTIZED, FormCache
from engines.hub.content_digests import ContentDigests
from engines.inputs.tokenizer import Tokenizer
from engines.inputs.tokenizer_threads import TokenizerThreads
from engines.loading.builders import Built, Knowledge, build
from engines.loading.checksums import Checksums, last_written_s
from engines.loading.dtype import dtype_notes
from engines.loading.folder import PLACEHOLDER_PROMPTS, Folder, read_files
from engines.loading.form_files import FormSource
from engines.loading.form_keeping import FormLoad
from engines.loading.ingredients import list_weights, read_ingredients, unchanged_ingredients
from engines.loading.parts import measure_parts
from engines.loading.precision import PrecisionGate
from engines.loading.recorded_tokenizer import TokenizerRecords
from engines.loading.score_forms import score_form
from engines.loading.scorers import build_scorer
from engines.loading.sparse import build_sparse
from engines.models.base import EncoderConfig, LoadedEncoder, weight_bytes, workspace_bytes
from engines.models.cuda_graphs import CAPTURING
from engines.models.load_records import LoadRecords
from engines.models.parking import ParkableEncoder
from engines.models.prepacked import MAX_PREPACKED_BYTES
from engines.models.self_check import SelfCheck
from engines.models.transformer import TransformerEncoder
from engines.models.verification import Canaries, ProbeTokenizer, SideTokenizers
from engines.precision import PrecisionStore
from engines.protocols import ModelParts, Placement
from engines.space import with_numeric
from engines.space_memory import SpaceMemory
from engines.spec import Matryoshka, ModelSpec
from engines.types import ModelFiles, ModelInfo, fingerprint

log = structlog.get_logger(__name__)

# Batches of this many tokens fit in a core's cache on CPU and fill a GPU.
_BATCH_TOKENS = {"cpu": 512, "cuda": 16384}


class LoaderSettings(Struct, frozen=True, kw_only=True):
    """The server's settings for engines; `None` means the device's default.

    `even_batches`: see `EngineLimits`; sizes are not tuned then, as a tuned size comes in the midst of work.
    `max_prepacked_bytes`: bytes of prepacked copies of weights that a model may hold where that is faster.
    `tuning_store`: tuned batch sizes, for models without a set one; None disables tuning.
    `precision_store`: what reduced dtypes cost; None neither measures nor refuses them.
    `form_cache`: quantised weights of earlier loads; None keeps none.
    `content_digests`, `space_memory`: hashes of weights, and the spaces of models that were loaded; None keeps them in
    memory.
    `knowledge`: what earlier loads have proved and found out; None keeps it in memory.
    `copies_parked`: whether weights of parked models are copied on a CPU too, as on a GPU; for tests.
    """

    max_batch_tokens: int | None = None
    max_batch_items: int = 512
    max_queue_items: int = 8192
    max_queue_requests: int | None = None
    batch_timeout_s: float = 0.0
    even_batches: bool = False
    target_dim: int | None = None
    canary_folder: Path | None = None
    max_prepacked_bytes: int = MAX_PREPACKED_BYTES
    tuning_store: TuningStore | None = None
    precision_store: PrecisionStore | None = None
    form_cache: FormCache | None = None
    content_digests: ContentDigests | None = None
    space_memory: SpaceMemory | None = None
    knowledge: Knowledge | None = None
    copies_parked: bool = False


class TorchLoader:
    """Loads models onto one device (`engines.protocols.Loader`).

    Args:
        device: `cpu` or `cuda:N`.
        scheduler: runs the engines' batches on the device.
        threads: tokenise the engines' requests.
        settings: the engines' limits.
    """

    def __init__(
        self, device: str, scheduler: DeviceScheduler, threads: TokenizerThreads, settings: LoaderSettings
    ) -> None:
        self._device = torch.device(device)
        self._scheduler = scheduler
        self._threads = threads
        self._settings = settings
        self._canaries = Canaries(settings.canary_folder)
        self._digests = settings.content_digests or ContentDigests(None)
        self._space_memory = settings.space_memory or SpaceMemory(None)
        self._knowledge = settings.knowledge or Knowledge(LoadRecords(None), TokenizerRecords(None))
        if self._device.type == "cpu":  # threads that read weights in parallel take cores from requests
            os.environ.setdefault("HF_DEACTIVATE_ASYNC_LOAD", "1")
        transformers.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # untyped upstream
        transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # untyped upstream

    def parts(self, spec: ModelSpec, files: ModelFiles) -> ModelParts | None:
        """See `SplitLoader.parts`."""
        config = self._encoder_config(SelfCheck(self._canaries), None)
        tokens = spec.max_batch_tokens or self._settings.max_batch_tokens or _BATCH_TOKENS[self._device.type]
        return measure_parts(read_files(files), spec, config, tokens)

    def load(self, spec: ModelSpec, files: ModelFiles) -> EmbeddingEngine:
        """Builds the engine; see `Loader.load`."""
        return self._load_guarded(spec, lambda: self._load(spec, files))

    def load_split(self, spec: ModelSpec, files: ModelFiles, placement: Placement) -> EmbeddingEngine:
        """See `SplitLoader.load_split`."""
        return self._load_guarded(spec, lambda: self._load(spec, files, placement))

    def _load_guarded(self, spec: ModelSpec, load: Callable[[], EmbeddingEngine]) -> EmbeddingEngine:
        """Loads while requests are served, and translates errors of the device."""
        try:
            with warnings.catch_warnings(), throttled_load(LoadThrottle(self._scheduler.wait_for_short_tasks)):
                warnings.simplefilter("ignore")
                return load()
        except Exception as error:
            self._scheduler.report_error(error)
            if loss := device_loss(error):
                raise DeviceDown(f"{self._device} failed while {spec.model_id} was loaded ({loss})") from error
            if isinstance(error, OutOfMemory) or not is_out_of_memory(error):
                raise
            raise OutOfMemory(f"{self._device} has no memory left to load {spec.model_id}") from error

    def _load(self, spec: ModelSpec, files: ModelFiles, placement: Placement | None = None) -> EmbeddingEngine:
        folder = read_files(files)
        form = score_form(folder, spec)
        spaces = self._spaces(folder, spec) if form is None else None
        try:
            return self._build(spec, files, folder, spaces, placement)
        except BaseException:
            if spaces is not None:
                spaces.close()
            raise

    def _build(
        self,
        spec: ModelSpec,
        files: ModelFiles,
        folder: Folder,
        spaces: ModelSpaces | None,
        placement: Placement | None,
    ) -> EmbeddingEngine:
        checksums = Checksums(Path(files.path), spec.sha256, spec.model_id, files.adapter_folder)
        self_check = SelfCheck(self._canaries, self._knowledge.loads, f"threads={self._scheduler.num_threads}")
        form, config = score_form(folder, spec), self._encoder_config(self_check, placement)
        store = self._settings.precision_store if form is None and not folder.is_sparse_encoder else None
        gate = PrecisionGate(store, spec, files.revision, self._device)
        gate.prepare(folder, config)
        forms = self._form_load(spec, files, folder, placement)
        built = forms.build(partial(self._built, folder, spec, config))
        encoder, tokenizer, dtype, scoring, facts = built
        checksums.check()
        prompts = {**folder.prompts, **spec.prompts}
        cache_bytes = spec.cache_bytes if self._device.type == "cpu" else 0  # in main memory: of a CPU's budget alone
        info = structs.replace(
            _info(built, spec, folder), prompts=prompts, share_bytes=share_bytes_of(encoder, cache_bytes)
        )
        resolved = with_default_prompt(spec, folder.default_prompt, prompts)
        key = self._canary_key(spec, files.revision, built)
        probes = _probe_tokenizer(built)

        def check() -> tuple[ModelInfo, int, int]:
            with forms.accepting():
                notes = self_check.run(encoder.paths, probes, dtype, key, last_written_s(files))
                precision = gate.check(encoder, tokenizer, dtype, self._own_seconds)
            if isinstance(encoder, TransformerEncoder):
                notes = (*dtype_notes(spec.dtype, dtype, compute_capability(self._device)), *notes)
            paths = {"attention": encoder.attention, "path": encoder.path}
            found = structs.replace(info, **paths, notes=notes, precision=precision)
            return found, size + encoder.extra_bytes(), workspace

        tokens, tuner = self._batch_tokens(spec, encoder, tokenizer, f"{files.revision} {dtype}")
        limits = self._limits(tokens, self._default_width(spec, info, folder.truncate_dim))
        largest = tokens if tuner is None else max(CANDIDATES[self._device.type])
        workspace = reserved_workspace_bytes(encoder, largest, self._scheduler.num_threads)
        parkable = ParkableEncoder(
            encoder, self._device, partial(self_check.check_woken, encoder.paths), copies=self._settings.copies_parked
        )
        rest = None
        if isinstance(encoder, TransformerEncoder):
            check_rest = partial(encoder.check_beside, self_check.finish)
            is_pending, is_refuted = lambda: self_check.is_pending, lambda: self_check.is_refuted
            rest = RestOfCheck(check_rest, is_pending, is_refuted=is_refuted)
        parts = Parts(encoder, tokenizer, resolved, info, tuner, scoring, facts, spaces, parkable, rest)
        if spaces is not None:
            lengths = partial(facts.lengths_of, own=tokenizer) if facts.has_sides else None
            spaces.describe(resolved, info, partial(with_numeric, dtype=dtype), lengths)
        size = weight_bytes(encoder) + cache_bytes
        return EmbeddingEngine(parts, self._scheduler, self._threads, limits, check, self._free_memory, size)

    def _built(self, folder: Folder, spec: ModelSpec, config: EncoderConfig, source: FormSource | None = None) -> Built:
        if (form := score_form(folder, spec)) is not None:
            return build_scorer(folder, spec, config, form)
        is_sparse = folder.is_sparse_encoder
        known = self._knowledge
        return build_sparse(folder, spec, config) if is_sparse else build(folder, spec, config, source, known)

    def _canary_key(self, spec: ModelSpec, revision: str, built: Built) -> str:
        """Returns the key of the vectors that every later load must give again."""
        outputs = built.facts.outputs
        identity = [spec.model_id, revision, built.dtype, self._device.type, spec.pooling, spec.max_tokens]
        identity += outputs if outputs != ("dense",) else ()  # the rows of a check are others then
        is_scored = built.scoring is not None
        return fingerprint([*identity, spec.template, spec.default_prompt, "scores"] if is_scored else identity)

    def _spaces(self, folder: Folder, spec: ModelSpec) -> ModelSpaces | None:
        """Begins to hash the files as they are before the load. None: one is missing, so that the load fails too."""
        try:
            weights = list_weights(folder)
        except (OSError, BadModel):
            return None
        read = partial(read_ingredients, folder, spec, weights, self._digests)
        spaces = ModelSpaces(SpaceSource(read, self._space_memory), spec)
        spaces.begin()
        return spaces

    def _form_load(self, spec: ModelSpec, files: ModelFiles, folder: Folder, placement: Placement | None) -> FormLoad:
        """Returns where the load takes a quantised form from; only those of a CPU are kept."""
        may_be_kept = self._device.type == "cpu" and placement is None and spec.dtype in QUANTIZED
        if not may_be_kept:
            return FormLoad(None, spec, files.revision)
        read = unchanged_ingredients(folder, spec, self._digests)
        return FormLoad(self._settings.form_cache, spec, files.revision, read)

    def _own_seconds(self) -> float:
        """Returns seconds of the present task so far, without those of tasks that preempted it."""
        finisher(self._device)()
        return self._scheduler.task_elapsed_s()

    def _encoder_config(self, self_check: SelfCheck, placement: Placement | None) -> EncoderConfig:
        """Returns how an encoder of this device runs. On a GPU passes can be preempted in the check at load only: when
        they serve, their kernels wait on the device already, and none can be overtaken."""
        preemption_point: Callable[[], None] = self._scheduler.preemption_point
        if self._device.type != "cpu":
            preemption_point = self_check.while_running(preemption_point)
        return EncoderConfig(
            device=self._device,
            num_threads=self._scheduler.num_threads,
            max_prepacked_bytes=self._settings.max_prepacked_bytes,
            preemption_point=preemption_point,
            recheck=self_check.check_again,
            placement=placement,
        )

    def _batch_tokens(
        self, spec: ModelSpec, encoder: LoadedEncoder, tokenizer: Tokenizer, weights: str
    ) -> tuple[int, BatchSizeTuner | None]:
        """Returns the tokens per batch and a tuner, if any.

        Three cases: 1. the size is set in the registry or the settings, tuning is disabled, batches are even, or the
        model is split; 2. it was tuned before; 3. it will be tuned.
        """
        given, tuning_store = spec.max_batch_tokens or self._settings.max_batch_tokens, self._settings.tuning_store
        is_split = bool(share_bytes_of(encoder))
        if given is not None or tuning_store is None or self._settings.even_batches or is_split:
            return given or _BATCH_TOKENS[self._device.type], None  # (1)
        key = fingerprint([weights, device_name(self._device), self._scheduler.num_threads, torch.__version__])
        tuned = tuning_store.get(key)
        if tuned is not None:
            return tuned.batch_tokens, None  # (2)
        num_parts = encoder.num_layers if self._device.type == "cpu" else 1
        tuner = BatchSizeTuner(
            encoder,
            tokenizer,
            BatchSizeSearch(CANDIDATES[self._device.type], num_parts),
            own_s=self._scheduler.task_elapsed_s,
            finish=finisher(self._device),
            keep=partial(tuning_store.put, key),
        )
        return _BATCH_TOKENS[self._device.type], tuner  # (3)

    def _default_width(self, spec: ModelSpec, info: ModelInfo, truncate_dim: int | None) -> int | None:
        """Returns the width of requests that name none; logs a TARGET_DIM that the model does not give."""
        target_dim = self._settings.target_dim
        if target_dim is None or info.task != "embed" or info.matryoshka.allows(target_dim, info.dimensions):
            return target_dim or truncate_dim
        write = log.warning if target_dim > info.dimensions else log.info
        widths = info.matryoshka.describe(info.dimensions)
        write("model.target_dim_ignored", model=spec.model_id, target_dim=target_dim, widths=widths)
        return truncate_dim

    def _limits(self, tokens: int, target_dim: int | None) -> EngineLimits:
        settings = self._settings
        return EngineLimits(
            batch=BatchLimits(tokens, settings.max_batch_items),
            max_queue_items=settings.max_queue_items,
            max_queue_requests=settings.max_queue_requests,
            batch_timeout_s=settings.batch_timeout_s,
            even_batches=settings.even_batches,
            target_dim=target_dim,
        )

    def _free_memory(self) -> None:
        """Returns freed memory to the system: Python's cycles, torch's cache, and the C library's arenas."""
        gc.collect()
        if self._device.type == "cuda":
            with CAPTURING:
                torch.cuda.empty_cache()
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def share_bytes_of(encoder: LoadedEncoder, home_bytes: int = 0) -> tuple[int, ...]:
    """Returns the bytes of weights on each device of a split model, then in main memory; nothing for others.

    Args:
        home_bytes: what else is at home.
    """
    placed = encoder.placed if isinstance(encoder, TransformerEncoder) else None
    if placed is None:
        return ()
    home, *others = placed.share_bytes(encoder.tensors())
    return (home + home_bytes, *others)


def _info(built: Built, spec: ModelSpec, folder: Folder) -> ModelInfo:
    """Returns what is known of a model before its check, without prompts."""
    encoder, tokenizer, dtype, scoring, facts = built
    return ModelInfo(
        dimensions=facts.dimensions,
        max_tokens=(facts.document_tokenizer or tokenizer).max_tokens,
        dtype=dtype,
        attention=encoder.attention,
        path=encoder.path,
        matryoshka=spec.matryoshka or Matryoshka(widths=folder.widths),
        task="embed" if scoring is None else scoring.task,
        labels=() if scoring is None else scoring.labels,
        is_multi_label=scoring is not None and scoring.is_multi_label,
        outputs=facts.outputs,
        vocab_size=facts.vocab_size,
        vector_width=facts.vector_width,
        token_pooling=facts.token_pooling,
        pooling=facts.pooling_modes,
    )


def reserved_workspace_bytes(encoder: LoadedEncoder, batch_tokens: int, num_threads: int) -> int:
    """Returns the bytes of as many batches of this model as the device has threads.

    Also on a GPU: its threads share a stream, so that kernels run one after the other, but the tensors of a batch are
    allocated while the other thread still holds those of its own. And also for a model that runs one batch at a time,
    as batches of other models run beside it: the largest of these sums is enough for any batches that run at once.
    """
    return num_threads * workspace_bytes(encoder, batch_tokens)


def _probe_tokenizer(built: Built) -> ProbeTokenizer:
    if built.scoring is not None:
        return built.scoring.pairs
    queries = built.facts.query_tokenizer
    return built.tokenizer if queries is None else SideTokenizers(built.tokenizer, queries)


def with_default_prompt(spec: ModelSpec, stated: str | None, prompts: Mapping[str, str]) -> ModelSpec:
    """Returns the spec with its default prompt: the registry's, else the folder's (`default_prompt_name`).

    Raises:
        UnsupportedModel: no prompt has that name; omitting it silently would give wrong vectors.
    """
    name = spec.default_prompt or stated
    if name is not None and name not in (*prompts, *PLACEHOLDER_PROMPTS):
        known = ", ".join(sorted(prompts)) or "none"
        raise UnsupportedModel(
            f"the default prompt is {name!r}, but the model's prompts are {known}: choose one of them, or add "
            f"{name!r} to `prompts` in the registry"
        )
    return structs.replace(spec, default_prompt=name)
