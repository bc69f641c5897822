"""`ModelSpec`: one model's registry entry, and what its `dtype` costs. Imports nothing of the project."""

from typing import Literal

from msgspec import Struct, structs

Truncate = Literal["end", "start", "error"]
Dtype = Literal["auto", "float32", "bfloat16", "float16", "int8", "int4"]
PoolingMode = Literal["cls", "mean", "max", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"]
"""Pooling modes as sentence-transformers names them; several are concatenated in the order given."""

CalibrationTexts = Literal["built-in", "own"]
"""What a reduced dtype was compared on: the texts of `engines/loading/calibration_texts.py`, or the operator's."""

Task = Literal["embed", "rerank", "classify"]
"""What a model computes: a vector for a text, one score for a pair, or a score for each label of a text or pair."""

Output = Literal["dense", "sparse", "multi_vector"]
"""What an embedding model gives for a text: one vector, weights of vocabulary entries, or one vector for each token."""

Similarity = Literal["maxsim", "meanmaxsim"]
"""How vectors of tokens score a document: the sum of the best matches of a query's vectors, or their mean."""

Side = Literal["query", "document"]
"""The side of a search that a text is on, where a model treats the two differently; without one: `document`."""

RerankTemplate = Literal["qwen3-reranker", "mxbai-rerank-v2", "bge-reranker-v2-gemma"]
"""The templates of causal rerankers whose own files do not state one; `engines/loading/rerank_templates.py`."""

Eviction = Literal["lru", "cost"]
"""Which model leaves memory first: the least recently used one, or the one whose absence is expected to cost least."""

Offload = Literal["allowed", "never"]
"""Whether a model that no device can hold alone may be split over the devices of a host and main memory."""

NEVER_IDLE = -1.0
"""`keep_alive_s` of a model that is never evicted for idleness."""


class Matryoshka(Struct, frozen=True, kw_only=True):
    """The widths that a model's vectors may be truncated to (Matryoshka representation learning).

    Either `widths` (a list) or `minimum` (every width from there to the native one).
    `layer_norm`: apply a layer norm over the full width before truncating (nomic-embed-text-v1.5's model card).
    """

    widths: tuple[int, ...] = ()
    minimum: int | None = None
    layer_norm: bool = False

    def allows(self, width: int, native: int) -> bool:
        """Tells whether a vector of `native` components may be truncated to `width`."""
        if self.minimum is not None:
            return self.minimum <= width <= native
        return width == native or width in self.widths

    def describe(self, native: int) -> str:
        """Formats the allowed widths for messages and `/v1/models`."""
        if self.minimum is not None:
            return f"any of {self.minimum} to {native}"
        return ", ".join(map(str, sorted({*self.widths, native})))


class Calibration(Struct, frozen=True, kw_only=True):
    """The range of each component of a model's vectors over representative texts; int8 quantization divides it evenly.

    `lowest` and `highest` hold one number per component of the full width, or one number for all components.
    """

    lowest: tuple[float, ...]
    highest: tuple[float, ...]

    def covers(self, width: int) -> bool:
        """Tells whether the ranges apply to vectors of `width` components."""
        return {len(self.lowest), len(self.highest)} <= {1, width}


class Precision(Struct, frozen=True, kw_only=True):
    """How near a reduced dtype comes to float32, measured on this machine over calibration texts.

    `recall_at_10`: the share of each text's ten nearest other texts that stay among them. `speedup`, `size_ratio`: the
    speed and the bytes of the weights, each as a multiple of float32's. `texts`: what it was measured on.
    """

    dtype: str
    worst_cosine: float
    median_cosine: float
    recall_at_10: float
    speedup: float
    size_ratio: float
    num_texts: int
    texts: CalibrationTexts = "built-in"


class ModelSpec(Struct, frozen=True, kw_only=True):
    """One model of the registry, defaults applied. `None` means: the value from the model's own files.

    `preload_at`: a time in cron's words at which it is loaded, in local time.

    `host_keep_alive_s`: the idle time before a parked model leaves main memory too. `warm`: it is loaded at start and
    may then be parked for others.

    `min_cosine`: the least that a reduced `dtype` may reach against float32 (`engines/precision.py`).

    `smaller_dtypes`: what a load may take instead of `dtype`, in this order, where that would evict other models.

    `replicas`: the maximum number of hosts that hold a busy model at the same time.

    `offload`: `allowed` splits the model where no device can hold it alone (`engines/pool/splitting.py`).

    `source` is a hub id, a local folder (absolute, or starting with `./` or `../` or `~`),
    or `package:NAME/SUB/FOLDER` for files inside an installed Python package.

    `adapter`: of a PEFT adapter, as `source`; it is merged into the weights of `source` at load.

    `sha256`: of files in the model's folder, by name, in lower-case hex; others are refused at load. Names of files of
    the adapter begin with `adapter/`.
    """

    model_id: str
    source: str
    task: Task | None = None
    template: RerankTemplate | None = None
    revision: str | None = None
    adapter: str | None = None
    adapter_revision: str | None = None
    dtype: Dtype = "auto"
    smaller_dtypes: tuple[Dtype, ...] = ()
    min_cosine: float | None = None
    device: str = "auto"
    max_tokens: int | None = None
    pooling: tuple[PoolingMode, ...] | None = None
    normalize: bool = True
    prompts: dict[str, str] = {}
    default_prompt: str | None = None
    instruction_template: str | None = None
    matryoshka: Matryoshka | None = None
    truncate: Truncate | None = None
    keep_alive_s: float = NEVER_IDLE
    host_keep_alive_s: float = NEVER_IDLE
    pinned: bool = False
    preload: bool = False
    warm: bool = False
    preload_at: str | None = None
    replicas: int = 1
    offload: Offload = "never"
    trust_remote_code: bool = False
    max_batch_tokens: int | None = None
    description: str = ""
    license: str = ""
    token_encoding: Literal["cl100k_base"] | None = None
    unframed_token_ids: bool = False
    cache_bytes: int = 0
    cache_shared: bool = False
    calibration: Calibration | None = None
    sha256: dict[str, str] = {}


def in_dtype(spec: ModelSpec, dtype: Dtype) -> ModelSpec:
    """Returns the spec of a model in one of its dtypes."""
    return structs.replace(spec, dtype=dtype, smaller_dtypes=())


def parts_of(spec: ModelSpec) -> tuple[ModelSpec, ...]:
    """Returns a spec for each folder or repository that a model's files come from: the model's, then its adapter's."""
    if spec.adapter is None:
        return (spec,)
    base = structs.replace(spec, adapter=None, adapter_revision=None)
    return base, ModelSpec(model_id=spec.model_id, source=spec.adapter, revision=spec.adapter_revision)


IN_PLACE = frozenset(
    {
        "keep_alive_s",
        "host_keep_alive_s",
        "pinned",
        "preload",
        "warm",
        "preload_at",
        "replicas",
        "description",
        "license",
        "token_encoding",
        "calibration",
    }
)
"""The fields of a `ModelSpec` that change without a reload, as no engine reads them. Every other field affects vectors
or memory (`max_batch_tokens` too: the workspace was measured for it), so changing it loads a new generation."""


def is_same_engine(old: ModelSpec, new: ModelSpec) -> bool:
    """Tells whether an engine built for `old` can serve `new`: they differ in `IN_PLACE` fields only."""
    return old == structs.replace(new, **{name: getattr(old, name) for name in IN_PLACE})
