"""Records that cross a thread, a process or the network between router and engine: frozen, without live objects.

Vectors are bytes: little-endian float32, row after row, so that a record is sent without conversion.
"""

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, Self, TypedDict

from msgspec import Struct, structs

from engines.spec import Matryoshka, Precision, Task, Truncate

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class Budget(Struct, frozen=True):
    """The part of a device's memory that models may use: a fraction or bytes. Exactly one of the two is not None."""

    fraction: float | None = None
    size_bytes: int | None = None

    def of(self, total_bytes: int) -> int:
        """Returns the budget in bytes on a device with `total_bytes`, at most `total_bytes`."""
        if self.size_bytes is not None:
            return min(self.size_bytes, total_bytes)
        return int(total_bytes * (self.fraction or 0.0))

    def __str__(self) -> str:
        if self.size_bytes is None:
            return f"{(self.fraction or 0.0) * 100:g}%"
        return f"{self.size_bytes / 2**30:.2f} GiB"


def format_bytes(size_bytes: int) -> str:
    """Formats bytes with about three digits and a decimal unit (1 GB = 10**9 B): `9.1 GB`, `512 B`."""
    size = float(size_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if abs(size) < 999.5:
            return f"{size:.0f} {unit}" if unit == "B" or abs(size) >= 99.95 else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


State = Literal[
    "absent", "fetching", "cold", "waiting_space", "loading", "warming", "ready", "draining", "unloading",
    "failed", "retired",
]  # fmt: skip
"""The states of a slot in the pool; `engines/pool/state_machine.py` has the diagram."""


class BaseCall(Struct, frozen=True, kw_only=True):
    """Fields that every kind of call has; pools, backends and transports read only these.

    `load_timeout_s` is how long the call waits for a cold model; `keep_alive_s` overrides the model's idle time from
    this request on (0: evict after it). `None` means the model's own default.
    `may_move`: another host could take the call, so it is refused rather than made to wait for memory that other
    processes hold.
    `caller` separates the users of one server: no caller fills a queue alone, and none learns what another has asked.
    Empty where there is one user.
    """

    model_id: str
    keep_alive_s: float | None = None
    load_timeout_s: float = 300.0
    may_move: bool = False
    caller: str = ""


class TextCall(BaseCall, frozen=True, kw_only=True):
    """A call about independent inputs. Exactly one of `texts` and `token_ids` is not empty.

    `input_type`, `instruction` and `prompt` choose the prompt as `engines/inputs/prompts.py` documents; `token_ids` are
    taken verbatim. `None` means the model's own default.
    """

    texts: tuple[str, ...] = ()
    token_ids: tuple[tuple[int, ...], ...] = ()
    input_type: str | None = None
    instruction: str | None = None
    prompt: str | None = None
    truncate: Truncate | None = None

    @property
    def num_items(self) -> int:
        """Returns the number of inputs, which is the number of rows of the result."""
        return len(self.texts) or len(self.token_ids)


class EmbedCall(TextCall, frozen=True, kw_only=True, tag="embed"):
    """Asks for one dense vector for each input, answered by `Embeddings`."""

    dimensions: int | None = None
    normalize: bool | None = None


Activation = Literal["default", "none", "probabilities"]
"""What becomes of the logits of a pair or text.

`default`: what `CrossEncoder.predict` of sentence-transformers applies for the folder. `none`: logits. `probabilities`:
softmax over the labels; sigmoid where the model has one label or its labels do not exclude each other.
"""


class ScoreCall(BaseCall, frozen=True, kw_only=True, tag="score"):
    """Asks for the scores of pairs or of single texts, answered by `Scores`.

    Args:
        texts: the documents of the pairs, or the single texts; not empty.
        queries: the first texts of the pairs: as many as `texts`, one for all of them, or none for single texts.
        instruction: the task of a model whose template has one; None is the model's own.
        truncate: `end` and `start` cut the document of a pair, `error` refuses; None is the model's own default.
        max_text_tokens: tokens of each of `texts` that are read at the most; None is as many as the model reads.
    """

    texts: tuple[str, ...]
    queries: tuple[str, ...] = ()
    instruction: str | None = None
    truncate: Truncate | None = None
    max_text_tokens: int | None = None
    activation: Activation = "default"

    @property
    def num_items(self) -> int:
        """Returns the number of pairs or texts, which is the number of rows of the result."""
        return len(self.texts)


Call = EmbedCall | ScoreCall
"""All kinds of calls: a tagged union, by `type`. A new kind is a new member here."""


class Timings(Struct, frozen=True, kw_only=True):
    """The time that each stage of one call took, in seconds of wall clock; stages do not overlap.

    `load_s`: waiting for a lease. `tokenize_s`: texts to token ids. `queue_s`: from admission to the start of the
    first batch with one of its texts. `forward_s`: from there to the last vector.
    """

    load_s: float = 0.0
    tokenize_s: float = 0.0
    queue_s: float = 0.0
    forward_s: float = 0.0


class Batch(Struct, frozen=True, kw_only=True):
    """Counts of one forward pass: texts, their tokens, and the computed tokens, padding included."""

    texts: int
    tokens: int
    computed_tokens: int


class ResultDetails(TypedDict):
    """Keyword arguments of every `BaseResult`, as an engine counts them."""

    token_counts: tuple[int, ...]
    truncated: tuple[int, ...]
    timings: Timings
    batches: tuple[Batch, ...]
    deduplicated: int
    cache_hits: int


class BaseResult(Struct, frozen=True, kw_only=True):
    """Fields that every kind of result has, and the split into head and body that transports need.

    `token_counts`: tokens run through the model for each input, special tokens included. `truncated`: indexes of the
    inputs that were cut. `batches`: forward passes to be counted with this result; one that several results shared is
    reported with the first of them only. `deduplicated`: inputs that were already in the queue, for another request or
    twice in this one; `cache_hits`: inputs found in the cache.
    """

    token_counts: tuple[int, ...]
    truncated: tuple[int, ...] = ()
    timings: Timings = Timings()
    batches: tuple[Batch, ...] = ()
    deduplicated: int = 0
    cache_hits: int = 0

    def split_body(self) -> tuple[Self, bytes]:
        """Returns the result without its bulk, and the bulk as raw bytes that no transport converts or copies."""
        return self, b""

    def with_body(self, body: bytes) -> Self:
        """Returns the result with the bulk that `split_body` took out."""
        return self


class Embeddings(BaseResult, frozen=True, kw_only=True, tag="embeddings"):
    """The result of one `EmbedCall`, rows in input order.

    `vectors`: float32 little-endian, `num_items × dimensions`.
    """

    vectors: bytes
    dimensions: int

    def split_body(self) -> tuple[Self, bytes]:
        """See `BaseResult`; the body is `vectors`."""
        return structs.replace(self, vectors=b""), self.vectors

    def with_body(self, body: bytes) -> Self:
        """See `BaseResult`."""
        return structs.replace(self, vectors=body)

    def array(self) -> "NDArray[np.float32]":
        """Returns a read-only view of the vectors, shape `[num_items, dimensions]`."""
        import numpy as np  # imported late: CLI commands that only need budgets start faster without it

        return np.frombuffer(self.vectors, dtype="<f4").reshape(len(self.token_counts), self.dimensions)


class Scores(BaseResult, frozen=True, kw_only=True, tag="scores"):
    """The result of one `ScoreCall`, rows in input order.

    `values`: float32 little-endian, `num_items × num_labels`. `labels`: names of the columns, as in `ModelInfo`.
    """

    values: bytes
    num_labels: int
    labels: tuple[str, ...] = ()

    def split_body(self) -> tuple[Self, bytes]:
        """See `BaseResult`; the body is `values`."""
        return structs.replace(self, values=b""), self.values

    def with_body(self, body: bytes) -> Self:
        """See `BaseResult`."""
        return structs.replace(self, values=body)

    def array(self) -> "NDArray[np.float32]":
        """Returns a read-only view of the scores, shape `[num_items, num_labels]`."""
        import numpy as np  # imported late, as for `Embeddings`

        return np.frombuffer(self.values, dtype="<f4").reshape(len(self.token_counts), self.num_labels)


Result = Embeddings | Scores
"""All kinds of results: a tagged union, by `type`. A new kind is a new member here."""


class ModelFiles(Struct, frozen=True, kw_only=True):
    """A model's files, complete and on disk.

    `revision` is the commit, or for a folder without one a fingerprint of names, sizes and times. `size_bytes` is
    their size on disk. `stamp` changes when a file is replaced or written, even if `revision` stays the same; empty
    if `revision` covers that.
    """

    path: str
    revision: str
    size_bytes: int
    stamp: str = ""


class ModelInfo(Struct, frozen=True, kw_only=True):
    """Properties of a loaded engine.

    `attention`: `packed` (no padding), `padded`, or `unpadded` (one length per batch). `path`: the forward path in use
    (`engines/models/transformer.py` lists them). `is_fallback`: the path selected at load failed, and the slowest
    path is in use until the selected one is retried. `notes`: each fallback and its reason. `task`: what it computes;
    `dimensions` is 0 unless that is `embed`. `labels`: names of the columns of `Scores`, `is_multi_label`: whether they
    do not exclude each other; none and False for `embed`. `precision`: of a reduced dtype, where it was measured.
    """

    dimensions: int
    max_tokens: int
    dtype: str
    attention: str
    path: str = ""
    is_fallback: bool = False
    prompts: dict[str, str] = {}
    matryoshka: Matryoshka = Matryoshka()
    notes: tuple[str, ...] = ()
    task: Task = "embed"
    labels: tuple[str, ...] = ()
    is_multi_label: bool = False
    precision: Precision | None = None


class ModelStatus(Struct, frozen=True, kw_only=True):
    """The status of one model on one host. Times are Unix seconds.

    `weight_bytes` and `workspace_bytes` are charged against the budget. `need_bytes`: its weights when resident,
    estimated or measured; 0 if unknown. `need_workspace_bytes`: the additional memory of its largest forward pass;
    a guess until the first load.
    """

    model_id: str
    state: State
    host_id: str
    device: str
    source: str
    revision: str | None = None
    info: ModelInfo | None = None
    weight_bytes: int = 0
    workspace_bytes: int = 0
    leases: int = 0
    waiters: int = 0
    queue_items: int = 0
    pinned: bool = False
    keep_alive_s: float = -1.0
    last_used_at: float | None = None
    load_s: float | None = None
    loads: int = 0
    evictions: int = 0
    fetched_bytes: int = 0
    fetch_total_bytes: int = 0
    last_error: str | None = None
    retry_at: float | None = None
    need_bytes: int = 0
    need_workspace_bytes: int = 0


class HostSnapshot(Struct, frozen=True, kw_only=True):
    """The state of one device at one moment. `residents` are model ids in eviction order, the next victim first.

    `used_bytes` is the sum of all charged weights (of loading and unloading models too), `workspace_bytes` the largest
    workspace: a model's is for as many batches as run at once, so the largest holds those of any models together.
    `claimed_bytes`: weights of models that wait for memory here and are not charged yet. `ceiling_bytes`: the memory
    that this process could use at most beside other processes, as of a recent reading; None without one. `stuck`: the
    load that hangs and blocks all loads and unloads; empty if none does. `restarts`: how often the host's process has
    died and was restarted.
    """

    host_id: str
    device: str
    total_bytes: int
    budget_bytes: int
    used_bytes: int
    workspace_bytes: int
    free_bytes: int
    residents: tuple[str, ...]
    models: tuple[ModelStatus, ...]
    is_draining: bool = False
    claimed_bytes: int = 0
    ceiling_bytes: int | None = None
    stuck: str = ""
    restarts: int = 0


class Event(Struct, frozen=True, kw_only=True):
    """One change of one slot. `kind` `state`: `source → target` and its cause. `kind` `progress`: bytes of a download.

    `seq` rises by one on each host; `time_s` is Unix time; `cause` is text for people, and names the claimant of an
    eviction; `claimant` holds that model id for programs. `missing_bytes`: not 0 when the two models take turns
    because they do not fit together; that much more memory would end the thrashing.

    For programs: `reason` is why a model is evicted (`room, over_budget, idle, operator, registry, shutdown, damaged`,
    on the step to `unloading`) or the kind of a failure; `seconds` is the duration of the load (on `ready`) or of the
    residency (on `unloading`); `estimated_bytes` is what a load was admitted with, `measured_bytes` what it took.
    """

    seq: int
    time_s: float
    host_id: str
    model_id: str
    kind: Literal["state", "progress"]
    source: State
    target: State
    cause: str = ""
    claimant: str | None = None
    done_bytes: int = 0
    total_bytes: int = 0
    missing_bytes: int = 0
    reason: str = ""
    seconds: float = 0.0
    estimated_bytes: int = 0
    measured_bytes: int = 0


class Plan(Struct, frozen=True, kw_only=True):
    """The predicted effect of loading a model. `seconds` is an estimate from earlier loads, None if unknown."""

    model_id: str
    host_id: str
    state: State
    fits: bool
    need_bytes: int
    free_bytes: int
    evict: tuple[str, ...] = ()
    seconds: float | None = None
    reason: str = ""


def fingerprint(parts: Sequence[object]) -> str:
    """Hashes a sequence of printable values to 40 hex digits, the length of a commit."""
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()[:40]
