"""Records of models and hosts: their files and their state. Sent like those of `engines/types.py`, from which they are
imported."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from msgspec import Struct

from engines.space import Ingredients
from engines.spec import Matryoshka, Output, PoolingMode, Precision, Side, Task

State = Literal[
    "absent", "fetching", "cold", "waiting_space", "loading", "warming", "ready", "draining", "unloading",
    "parking", "parked", "waking", "failed", "retired",
]  # fmt: skip
"""The states of a slot in the pool; `engines/pool/state_machine.py` has the diagram."""


Tier = Literal["host", "disk"]
"""Where a model goes that leaves the device: to main memory (it is parked), or only its files stay."""


class ModelInfo(Struct, frozen=True, kw_only=True):
    """Properties of a loaded engine.

    `attention`: `packed` (no padding), `padded`, or `unpadded` (one length per batch). `path`: the forward path in use
    (`engines/models/transformer.py` lists them). `is_fallback`: the path selected at load failed, and the slowest
    path is in use until the selected one is retried. `notes`: each fallback and its reason. `task`: what it computes;
    `dimensions` is 0 unless that is `embed`. `labels`: names of the columns of `Scores`, `is_multi_label`: whether they
    do not exclude each other; none and False for `embed`. `precision`: of a reduced dtype, where it was measured.
    `outputs`: what an `OutputsCall` may ask for, none unless the task is `embed`; `vocab_size`: the number of entries
    that sparse outputs index; `vector_width`: the width of the vectors of tokens. Both are 0 without such an output;
    `dimensions` is 0 without a dense one. `token_pooling`: how the model itself merges vectors of tokens, in words, by
    the side of a search. `pooling`: how a transformer's tokens become its dense vector; else empty. `share_bytes`: of
    a split model, its weights on each device, then in main memory. `ingredients`: what decides its vectors' space; None
    until its files are hashed, and for scores. `checked`: `all` forms of its path at this load; `canary`: one form at
    this load, and the others by an earlier load, until they are checked once more.
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
    outputs: tuple[Output, ...] = ("dense",)
    vocab_size: int = 0
    vector_width: int = 0
    token_pooling: dict[Side, str] = {}
    pooling: tuple[PoolingMode, ...] = ()
    share_bytes: tuple[int, ...] = ()
    ingredients: Ingredients | None = None
    checked: Literal["all", "canary"] = "all"


class ModelShare(Struct, frozen=True, kw_only=True):
    """What one host is charged for a model that is split over several.

    `device_bytes`: of its device, with the workspace; `host_bytes`: of its part of main memory. `num_parts`: how many
    parts of the model are on the device: its layers, and on the first host one for everything else.
    """

    host_id: str
    device_bytes: int = 0
    host_bytes: int = 0
    num_parts: int = 0


class ModelStatus(Struct, frozen=True, kw_only=True):
    """The status of one model on one host. Times are Unix seconds.

    `weight_bytes` and `workspace_bytes` are charged against the budget. `need_bytes`: its weights when resident,
    estimated or measured; 0 if unknown. `need_workspace_bytes`: the additional memory of its largest forward pass;
    a guess until the first load. `bytes_by_dtype`: of the weights in each dtype that a load may take, where the
    registry lists several. `host_bytes` are charged against the host budget: of a parked model. `wake_s`: how long it
    last took to come back from main memory; `wakes`: how often it has. `shares`: of a split model, whose
    `weight_bytes` are those of the host alone, what each host is charged; empty for others.
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
    bytes_by_dtype: dict[str, int] = {}
    host_bytes: int = 0
    wake_s: float | None = None
    wakes: int = 0
    shares: tuple[ModelShare, ...] = ()


class HostSnapshot(Struct, frozen=True, kw_only=True):
    """The state of one device at one moment. `residents` are model ids in eviction order, the next victim first.

    `used_bytes` is the sum of all charged weights (of loading and unloading models too), `workspace_bytes` the largest
    workspace: a model's is for as many batches as run at once, so the largest holds those of any models together.
    `claimed_bytes`: weights of models that wait for memory here and are not charged yet. `ceiling_bytes`: the memory
    that this process could use at most beside other processes, as of a recent reading; None without one. `stuck`: the
    load that hangs and blocks all loads and unloads; empty if none does. `restarts`: how often the host's process has
    died and was restarted. `host_budget_bytes`: main memory for parked models, 0 where none are parked;
    `host_used_bytes`: what is charged to it. `parked` are model ids in the order in which they leave main memory.
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
    host_budget_bytes: int = 0
    host_used_bytes: int = 0
    parked: tuple[str, ...] = ()


class Event(Struct, frozen=True, kw_only=True):
    """One change of one slot. `kind` `state`: `source → target` and its cause. `kind` `progress`: bytes of a download.

    `seq` rises by one on each host; `time_s` is Unix time; `cause` is text for people, and names the claimant of an
    eviction; `claimant` holds that model id for programs. `missing_bytes`: not 0 when the two models take turns
    because they do not fit together; that much more memory would end the thrashing.

    For programs: `reason` is why a model is evicted (`room, over_budget, idle, operator, registry, shutdown, damaged`,
    on the step from `draining`) or the kind of a failure; `seconds` is the duration of the load (on `ready`) or of the
    residency (on the step from `draining`); `estimated_bytes` is what a load was admitted with, `measured_bytes` what
    it took.
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
    """The predicted effect of loading a model. `seconds` is an estimate from earlier loads, None if unknown.

    `dtype`: what it would be loaded in, as the registry has it; `bytes_by_dtype`, `shares`: see `ModelStatus`.
    """

    model_id: str
    host_id: str
    state: State
    fits: bool
    need_bytes: int
    free_bytes: int
    evict: tuple[str, ...] = ()
    seconds: float | None = None
    reason: str = ""
    dtype: str = ""
    bytes_by_dtype: dict[str, int] = {}
    shares: tuple[ModelShare, ...] = ()


class ModelFiles(Struct, frozen=True, kw_only=True):
    """A model's files, complete and on disk.

    `revision` is the commit, or for a folder without one a fingerprint of names, sizes and times. `size_bytes` is
    their size on disk. `stamp` changes when a file is replaced or written, even if `revision` stays the same; empty
    if `revision` covers that. `parts`: of a model with an adapter, the files of the model and of the adapter.
    """

    path: str
    revision: str
    size_bytes: int
    stamp: str = ""
    parts: tuple["ModelFiles", ...] = ()

    def with_adapter(self, adapter: "ModelFiles") -> "ModelFiles":
        """Returns the files of this model with an adapter; both revisions, and both stamps, are part of theirs."""
        return ModelFiles(
            path=self.path,
            revision=f"{self.revision}+{adapter.revision}",
            size_bytes=self.size_bytes + adapter.size_bytes,
            stamp=fingerprint([self.stamp, adapter.stamp]) if self.stamp or adapter.stamp else "",
            parts=(self, adapter),
        )

    @property
    def adapter_folder(self) -> Path | None:
        """The folder of the adapter; None without one."""
        return Path(self.parts[1].path) if self.parts else None


def fingerprint(parts: Sequence[object]) -> str:
    """Hashes a sequence of printable values to 40 hex digits, the length of a commit."""
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()[:40]
