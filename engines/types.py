"""What crosses a thread, a process or a network between the router and an engine: frozen, plain, no live objects.

Vectors travel as bytes: little-endian float32, row after row, so that a record can be sent as it is.
"""

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from msgspec import Struct

from engines.spec import Matryoshka, Truncate

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class Budget(Struct, frozen=True):
    """How much of a device's memory models may take: a part of it, or that many bytes. Exactly one is not None."""

    fraction: float | None = None
    size_bytes: int | None = None

    def of(self, total_bytes: int) -> int:
        """The budget in bytes on a device that has `total_bytes`; never more than it has."""
        if self.size_bytes is not None:
            return min(self.size_bytes, total_bytes)
        return int(total_bytes * (self.fraction or 0.0))

    def __str__(self) -> str:
        if self.size_bytes is None:
            return f"{(self.fraction or 0.0) * 100:g}%"
        return f"{self.size_bytes / 2**30:.2f} GiB"


def format_bytes(size_bytes: int) -> str:
    """About three digits and a decimal unit, as device makers count: `9.1 GB`, `512 B`."""
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
"""The states of a slot in the pool; `engines/pool/state_machine.py` draws the machine."""


class EmbedCall(Struct, frozen=True, kw_only=True):
    """One client request, decoded. Exactly one of `texts` and `token_ids` is not empty.

    `None` means the model's own default. `input_type`, `instruction` and `prompt` choose the prompt as
    `engines/inputs/tokenizer.py` documents; `token_ids` are taken verbatim. `load_timeout_s` is how long the call waits
    for a cold model; `keep_alive_s` overrides the model's idle time from this request on (0: leave after it).
    `may_move`: another host could take the call, so it is refused rather than made to wait for memory that other
    processes hold.
    `caller` tells those apart who share the server: none fills a queue alone, none learns what another has asked. Empty
    where there is nobody else.
    """

    model_id: str
    texts: tuple[str, ...] = ()
    token_ids: tuple[tuple[int, ...], ...] = ()
    dimensions: int | None = None
    input_type: str | None = None
    instruction: str | None = None
    prompt: str | None = None
    truncate: Truncate | None = None
    normalize: bool | None = None
    keep_alive_s: float | None = None
    load_timeout_s: float = 300.0
    may_move: bool = False
    caller: str = ""

    @property
    def num_items(self) -> int:
        """How many vectors the answer will hold."""
        return len(self.texts) or len(self.token_ids)


class Timings(Struct, frozen=True, kw_only=True):
    """Where the time of one call went, in seconds of wall clock; the parts do not overlap.

    `load_s`: waiting for a lease. `tokenize_s`: texts to ids. `queue_s`: from admission to the start of the
    first batch that held one of its texts. `forward_s`: from there to the last vector.
    """

    load_s: float = 0.0
    tokenize_s: float = 0.0
    queue_s: float = 0.0
    forward_s: float = 0.0


class Batch(Struct, frozen=True, kw_only=True):
    """One forward pass: texts, their real tokens, and the tokens computed, padding included."""

    texts: int
    tokens: int
    computed_tokens: int


class Embeddings(Struct, frozen=True, kw_only=True):
    """The answer to one `EmbedCall`, rows in input order.

    `vectors`: float32 little-endian, `num_items × dimensions`. `token_counts`: tokens run through the model for
    each input, special tokens included. `truncated`: indexes of the inputs that were cut. `batches`: forward passes
    to be counted with this answer; one that several answers shared is told with the first of them only. `reused`:
    inputs that were under way already, for another request or twice in this one; `recalled`: those found in the cache.
    """

    vectors: bytes
    dimensions: int
    token_counts: tuple[int, ...]
    truncated: tuple[int, ...] = ()
    timings: Timings = Timings()
    batches: tuple[Batch, ...] = ()
    deduplicated: int = 0
    cache_hits: int = 0

    def array(self) -> "NDArray[np.float32]":
        """A read-only view of the vectors, shape `[num_items, dimensions]`."""
        import numpy as np  # late: commands that only read budgets start without it

        return np.frombuffer(self.vectors, dtype="<f4").reshape(len(self.token_counts), self.dimensions)


class ModelFiles(Struct, frozen=True, kw_only=True):
    """A model's files, whole and on disk.

    `revision` is the commit, or for a folder without one a fingerprint of names, sizes and times.
    `size_bytes` is what they take on disk. `stamp`: another one when a file was replaced or written to, though its
    content should be the same; empty where `revision` tells that.
    """

    path: str
    revision: str
    size_bytes: int
    stamp: str = ""


class ModelInfo(Struct, frozen=True, kw_only=True):
    """What a loaded engine knows of itself.

    `attention`: `packed` (no padding), `padded`, or `unpadded` (one length a batch). `path`: the forward path in use
    (`engines/models/transformer.py` lists them). `is_fallback`: the path that was chosen at load failed, and the
    slowest one is in use until that is tried again. `notes`: what fell back and why.
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


class ModelStatus(Struct, frozen=True, kw_only=True):
    """One slot of one host, as operators see it. Times are Unix seconds; bytes are charged against the budget.

    `need_bytes`: weights when it is resident, estimated or measured; 0 when nothing is known. `need_workspace_bytes`:
    what its largest forward pass takes on top; a guess until it was loaded once.
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
    """One device at one moment. `residents` are model ids in eviction order, the next to leave first.

    `used_bytes` is the sum of all charged weights (loading and unloading ones too), `workspace_bytes` the largest
    workspace: engines of a device take turns, so their workspaces do not add up. `claimed_bytes`: weights of models
    that wait for memory here and are not charged yet. `ceiling_bytes`: what this process could have of the device at
    most, others using it too, where it was read of late; None where it was not. `stuck`: why nothing can be loaded or
    freed there, because a load does not end; empty when it can. `restarts`: how often the process that it lives in has
    died and was started anew.
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
    """One step of one slot. `kind` `state`: `source → target` and why. `kind` `progress`: bytes of a download.

    `seq` rises by one on each host; `time_s` is Unix time; `cause` is for people and, for an eviction, names its
    claimant; `claimant` holds that model id for programs. `missing_bytes`: not 0 when the two models take turns
    because they cannot both fit; so much more memory would end it.

    For programs: `reason` is why a model leaves (`room, over_budget, idle, operator, registry, shutdown, damaged`, on
    the step to `unloading`) or the kind of a failure; `seconds` how long a load took (on `ready`) or the model stayed
    (on `unloading`); `estimated_bytes` and `measured_bytes` what a load was admitted with, and what it turned out to
    take.
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
    """What loading a model would do, without doing it. `seconds` is an estimate from earlier loads, None if unknown."""

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
    """A short stable name for a sequence of printable values (40 hex digits, as long as a commit)."""
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()[:40]
