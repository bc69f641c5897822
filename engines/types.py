"""Records that cross a thread, a process or the network between router and engine: frozen, without live objects.

Vectors are bytes: little-endian float32, row after row, so that a record is sent without conversion.
"""

from typing import TYPE_CHECKING, Any, Literal, NotRequired, Self, TypedDict

from msgspec import Struct, structs

from engines.spec import Output, Truncate
from engines.status import Event as Event
from engines.status import HostSnapshot as HostSnapshot
from engines.status import ModelFiles as ModelFiles
from engines.status import ModelInfo as ModelInfo
from engines.status import ModelShare as ModelShare
from engines.status import ModelStatus as ModelStatus
from engines.status import Plan as Plan
from engines.status import State as State
from engines.status import Tier as Tier
from engines.status import fingerprint as fingerprint

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
        size = self.size_bytes
        return f"{(self.fraction or 0.0) * 100:g}%" if size is None else f"{size / 2**30:.2f} GiB"


HostBudget = Budget | Literal["auto"]
"""Main memory for parked models; `auto`: what a machine with GPUs can spare (`engines.device.memory.spare_bytes`)."""


def format_bytes(size_bytes: int) -> str:
    """Formats bytes with about three digits and a binary unit (1 GiB = 2**30 B): `9.1 GiB`, `512 B`."""
    size = float(size_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1023.5:
            return f"{size:.0f} {unit}" if unit == "B" or abs(size) >= 99.95 else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


class BaseCall(Struct, frozen=True, kw_only=True):
    """Fields that every kind of call has; pools, backends and transports read only these.

    `load_timeout_s` is how long the call waits for a cold model; `keep_alive_s` overrides the model's idle time from
    this request on (0: evict after it). `None` means the model's own default.
    `may_move`: another host could take the call, so it is refused rather than made to wait for memory that other
    processes hold.
    `caller` separates the users of one server: no caller fills a queue alone, and none learns what another has asked.
    Empty where there is one user.
    `is_flex`: the call uses only what other calls leave idle, and may take long.
    """

    model_id: str
    keep_alive_s: float | None = None
    load_timeout_s: float = 300.0
    may_move: bool = False
    caller: str = ""
    is_flex: bool = False


class TextCall(BaseCall, frozen=True, kw_only=True):
    """A call about independent inputs. Exactly one of `texts` and `token_ids` is not empty.

    `input_type`, `instruction` and `prompt` choose the prompt as `engines/inputs/prompts.py` documents; `token_ids` are
    taken verbatim. `max_tokens`: tokens that are read of each input, special tokens included, where that is fewer than
    the model reads. `None` means the model's own default.
    `expect_space`: the space that the vectors must lie in (`engines/space.py`), or the call is refused.
    """

    texts: tuple[str, ...] = ()
    token_ids: tuple[tuple[int, ...], ...] = ()
    input_type: str | None = None
    instruction: str | None = None
    prompt: str | None = None
    truncate: Truncate | None = None
    max_tokens: int | None = None
    expect_space: str | None = None

    @property
    def num_items(self) -> int:
        """Returns the number of inputs, which is the number of rows of the result."""
        return len(self.texts) or len(self.token_ids)


class EmbedCall(TextCall, frozen=True, kw_only=True, tag="embed"):
    """Asks for one dense vector for each input, answered by `Embeddings`."""

    dimensions: int | None = None
    normalize: bool | None = None


MAX_ANSWER_BYTES = 256 * 2**20  # the most bytes that the outputs of one call may take, before they are encoded


class OutputsCall(TextCall, frozen=True, kw_only=True, tag="outputs"):
    """Asks for several kinds of output of each input, from one forward pass; answered by `Outputs`.

    Args:
        outputs: what is wanted: not empty, no kind twice. `tokens` are the last hidden states of all tokens, which
            every embedding model has; they exclude `multi_vector`.
        dimensions, normalize: of the dense vectors, as in `EmbedCall`.
        sparse_top_k: the most entries of a sparse output, the heaviest; None is the server's ceiling.
        sparse_min_weight: entries that weigh less are left out; at least 0.
        pool_factor: vectors of a document's tokens are clustered to one for each so many, where that is more than 1.
        names_terms: whether `Outputs.term_names` is wanted.
    """

    outputs: tuple[Output | Literal["tokens"], ...]
    dimensions: int | None = None
    normalize: bool | None = None
    sparse_top_k: int | None = None
    sparse_min_weight: float = 0.0
    pool_factor: int = 1
    names_terms: bool = False


class ContextualCall(TextCall, frozen=True, kw_only=True, tag="contextual"):
    """Asks for one dense vector for each piece of documents, in the context of its document; answered by `Embeddings`.

    `texts` are the pieces of all documents, one document after the other; there are no `token_ids`. `truncate` is about
    single pieces. A prompt stands in front of each document.

    Args:
        pieces: how many of `texts` each document has.
        dimensions, normalize: as in `EmbedCall`.
    """

    pieces: tuple[int, ...]
    dimensions: int | None = None
    normalize: bool | None = None


SIMILARITIES = frozenset({("maxsim",), ("meanmaxsim",)})
"""The labels that the `Scores` of a model with vectors of tokens may have."""

Activation = Literal["default", "none", "probabilities"]
"""What becomes of the logits of a pair or text.

`default`: what `CrossEncoder.predict` of sentence-transformers applies for the folder. `none`: logits. `probabilities`:
softmax over the labels; sigmoid where the model has one label or its labels do not exclude each other.
"""


class ScoreCall(BaseCall, frozen=True, kw_only=True, tag="score"):
    """Asks for the scores of pairs or of single texts, answered by `Scores`.

    A model with vectors of tokens answers with MaxSim, for pairs only: the sum over the query's vectors of the greatest
    dot product with a vector of the document (Khattab and Zaharia, 2020, ColBERT), or their mean; one column, whose
    label is one of `SIMILARITIES`. It refuses the activation `probabilities`, which these scores are not.

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


class TokenizeCall(BaseCall, frozen=True, kw_only=True, tag="tokenize"):
    """Asks for the tokens of texts, not truncated, answered by `Tokens`.

    Args:
        texts: not empty, of at most `MAX_LISTED_CHARS` characters in all, prompts included.
        input_type: the prompt, as in `TextCall`.
        add_special_tokens: whether the tokens around each text are listed too.
    """

    texts: tuple[str, ...]
    input_type: str | None = None
    add_special_tokens: bool = True

    @property
    def num_items(self) -> int:
        """Returns the number of texts, which is the number of lists of the result."""
        return len(self.texts)


MAX_LISTED_CHARS = 2**18
"""Characters whose tokens one call may ask for: 3 MB of places, up to 20 MB as JSON."""

ModelCall = EmbedCall | ContextualCall | OutputsCall | ScoreCall
"""Calls that run the model, which limits count the tokens of."""
Call = EmbedCall | ContextualCall | OutputsCall | ScoreCall | TokenizeCall
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
    space: NotRequired[str]


class BaseResult(Struct, frozen=True, kw_only=True):
    """Fields that every kind of result has, and the split into head and body that transports need.

    `token_counts`: tokens run through the model for each input, special tokens included. `truncated`: indexes of the
    inputs that were cut. `batches`: forward passes to be counted with this result; one that several results shared is
    reported with the first of them only. `deduplicated`: inputs that were already in the queue, for another request or
    twice in this one; `cache_hits`: inputs found in the cache.
    `space`: the space that its vectors lie in; empty while it is unknown, and without vectors.
    """

    token_counts: tuple[int, ...]
    truncated: tuple[int, ...] = ()
    timings: Timings = Timings()
    batches: tuple[Batch, ...] = ()
    deduplicated: int = 0
    cache_hits: int = 0
    space: str = ""

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


class Outputs(BaseResult, frozen=True, kw_only=True, tag="outputs"):
    """The result of one `OutputsCall`, inputs in order. What was not asked for is empty.

    `body`, all little-endian, one part after the other: dense vectors, float32 `num_items × dimensions`; vocabulary
    entries of the sparse outputs, int32, rising within each input, and as many weights, float32; vectors of tokens,
    float32 `sum(num_vectors) × vector_width`. `num_terms`, `num_vectors`: how many of them each input has.
    `term_names`: of each distinct entry of the sparse outputs, its token as the vocabulary writes it (what
    `convert_ids_to_tokens` of transformers gives), if the call has `names_terms`; else empty.
    """

    body: bytes
    dimensions: int = 0
    num_terms: tuple[int, ...] = ()
    num_vectors: tuple[int, ...] = ()
    vector_width: int = 0
    term_names: dict[int, str] = {}

    def split_body(self) -> tuple[Self, bytes]:
        """See `BaseResult`."""
        return structs.replace(self, body=b""), self.body

    def with_body(self, body: bytes) -> Self:
        """See `BaseResult`."""
        return structs.replace(self, body=body)

    def array(self) -> "NDArray[np.float32]":
        """Returns a read-only view of the dense vectors, shape `[num_items, dimensions]`."""
        return self._part("<f4", 0, len(self.token_counts) * self.dimensions).reshape(-1, self.dimensions)

    def terms(self) -> "tuple[NDArray[Any], NDArray[np.float32]]":
        """Returns read-only views of the entries, int32, and of their weights, both of shape `[sum(num_terms)]`."""
        start, count = len(self.token_counts) * self.dimensions, sum(self.num_terms)
        return self._part("<i4", start, count), self._part("<f4", start + count, count)

    def vectors(self) -> "NDArray[np.float32]":
        """Returns a read-only view of the vectors of all tokens, shape `[sum(num_vectors), vector_width]`."""
        start = len(self.token_counts) * self.dimensions + 2 * sum(self.num_terms)
        return self._part("<f4", start, sum(self.num_vectors) * self.vector_width).reshape(-1, self.vector_width)

    def _part(self, dtype: str, start: int, count: int) -> "NDArray[Any]":
        import numpy as np  # imported late, as for `Embeddings`

        return np.frombuffer(self.body, dtype=dtype, count=count, offset=4 * start)


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


class Tokens(BaseResult, frozen=True, kw_only=True, tag="tokens"):
    """The result of one `TokenizeCall`: the tokens of all texts, in input order; `token_counts` says how many each has.

    `places`: int32 little-endian, `[id, start, stop]` for each token: the characters that it stands for, counted in the
    text with its prompt. Those of the special tokens around a text are -1. `specials`: names of the special tokens, by
    id. `before`, `behind`: the prompt around each text.
    """

    places: bytes
    specials: dict[int, str] = {}
    before: str = ""
    behind: str = ""

    def split_body(self) -> tuple[Self, bytes]:
        """See `BaseResult`; the body is `places`."""
        return structs.replace(self, places=b""), self.places

    def with_body(self, body: bytes) -> Self:
        """See `BaseResult`."""
        return structs.replace(self, places=body)

    def array(self) -> "NDArray[Any]":
        """Returns a read-only view of the places, int32, shape `[tokens of all texts, 3]`."""
        import numpy as np  # imported late, as for `Embeddings`

        return np.frombuffer(self.places, dtype="<i4").reshape(-1, 3)


Result = Embeddings | Outputs | Scores | Tokens
"""All kinds of results: a tagged union, by `type`. A new kind is a new member here."""
