"""A fake engine without torch: its vectors are hashes of model and text, so that tests can compute the right ones."""

import asyncio
import hashlib
import re
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from engines.errors import (
    ContextLengthExceeded,
    DimensionsNotSupported,
    InvalidTokenId,
    InvalidValue,
    PromptNotFound,
    TaskNotSupported,
)
from engines.space import output_name
from engines.spec import Matryoshka, ModelSpec, Output
from engines.testing.outputs import (
    SPARSE_ENTRIES,
    TOKEN_WIDTH,
    Terms,
    chosen_terms,
    fake_maxsim,
    fake_names,
    fake_row,
    join_body,
)
from engines.testing.spaces import check_expected, fake_ingredients, fake_space
from engines.types import (
    Call,
    ContextualCall,
    EmbedCall,
    Embeddings,
    ModelInfo,
    Outputs,
    OutputsCall,
    Result,
    ScoreCall,
    Scores,
    TextCall,
    Timings,
    TokenizeCall,
    Tokens,
)

WIDTH = 16
WEIGHT_BYTES = 1000
WORKSPACE_BYTES = 100
VOCABULARY = 30_000

_LABELS: dict[str, tuple[str, ...]] = {"rerank": ("LABEL_0",), "classify": ("negative", "neutral", "positive")}

Script = Mapping[str, Sequence[Exception | None]]
"""By model id, the errors of the first attempts; None succeeds, and so do all later attempts."""


def fake_vector(model_id: str, text: str | tuple[int, ...], width: int = WIDTH) -> NDArray[np.float32]:
    """Computes the vector that `FakeEngine` returns: `WIDTH` random components, cut to `width` and normalised."""
    digest = hashlib.blake2b(f"{model_id}\0{text}".encode(), digest_size=8).digest()
    raw = np.random.default_rng(int.from_bytes(digest, "little")).standard_normal(WIDTH)[:width]
    return (raw / np.linalg.norm(raw)).astype("<f4")


def fake_score(model_id: str, query: str, text: str, label: int = 0) -> float:
    """Computes the score that `FakeEngine` returns for a pair (an empty query: a single text): from 0 to 1."""
    digest = hashlib.blake2b(f"{model_id}\0{query}\0{text}\0{label}".encode(), digest_size=8).digest()
    return float(np.float32(int.from_bytes(digest, "little") / 2**64))


class Attempts:
    """Counts attempts by model and raises the scripted errors."""

    def __init__(self, script: Script | None) -> None:
        self._script = script or {}
        self.counts: Counter[str] = Counter()

    def next(self, model_id: str) -> None:
        attempt = self.counts[model_id]
        self.counts[model_id] += 1
        failures = self._script.get(model_id, ())
        error = failures[attempt] if attempt < len(failures) else None
        if error is not None:
            raise error


class FakeEngine:
    """Fakes one model. `running`, `cancelled` and `is_closed` record its calls.

    A call on a closed engine, or closing one during a call, is added to `violations`; a test that checks these at its
    end finds misuse that the pool's error handling would hide.

    Args:
        spec: prompts, matryoshka and truncation are applied; a text has one token per word, and two more.
        embed_s, sleep: how long a call takes, and the function that waits for it.
        failures: the errors of its first calls.
        warm_failure, park_failure, wake_failure: the errors of `warm_up`, `park` and `resume`.
        outputs: of a model that embeds.
    """

    def __init__(  # noqa: PLR0913  # a script: every argument is optional and named
        self,
        spec: ModelSpec,
        *,
        embed_s: float = 0.0,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        failures: Sequence[Exception | None] = (),
        warm_failure: Exception | None = None,
        park_failure: Exception | None = None,
        wake_failure: Exception | None = None,
        violations: list[str] | None = None,
        outputs: tuple[Output, ...] = ("dense",),
    ) -> None:
        self.spec = spec
        self.weight_bytes = WEIGHT_BYTES
        self.workspace_bytes = WORKSPACE_BYTES
        self.max_queue_items = 8192
        self.running = 0
        self.cancelled = 0
        self.is_closed = self.is_parked = False
        outputs = outputs if spec.task in (None, "embed") else ()
        self.info = ModelInfo(
            dimensions=WIDTH if "dense" in outputs else 0,
            max_tokens=spec.max_tokens or 512,
            dtype="float32",
            attention="packed",
            prompts=spec.prompts,
            matryoshka=spec.matryoshka or Matryoshka(),
            task=spec.task or "embed",
            labels=_LABELS.get(spec.task or "embed", ()),
            outputs=outputs,
            vocab_size=SPARSE_ENTRIES if "sparse" in outputs else 0,
            vector_width=TOKEN_WIDTH if "multi_vector" in outputs else 0,
            ingredients=fake_ingredients(spec) if outputs else None,
        )
        self.violations = [] if violations is None else violations
        self._embed_s = embed_s
        self._sleep = sleep
        self._attempts = Attempts({spec.model_id: failures})
        self._warm_failure, self._park_failure, self._wake_failure = warm_failure, park_failure, wake_failure

    @property
    def queue_items(self) -> int:
        return self.running

    async def warm_up(self) -> None:
        await self._sleep(0)
        if self._warm_failure is not None:
            raise self._warm_failure

    async def run(self, call: Call) -> Result:
        """As a real engine: the same fields are obeyed, the same errors raised."""
        if self.is_closed or self.is_parked:
            self.violations.append(
                f"{self.spec.model_id} was used after it was {'freed' if self.is_closed else 'parked'}"
            )
        self.running += 1
        try:
            self._attempts.next(call.model_id)
            await self._sleep(self._embed_s)
            if isinstance(call, TokenizeCall):
                return self._tokenize_now(call)
            if isinstance(call, OutputsCall):
                return self._outputs_now(call)
            if isinstance(call, ContextualCall):
                return self._contextual_now(call)
            return self._embed_now(call) if isinstance(call, EmbedCall) else self._score_now(call)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.running -= 1

    def park(self) -> int:
        if self.running or self.is_parked or self.is_closed:
            self.violations.append(f"{self.spec.model_id} was parked under {self.running} requests, or twice")
        if self._park_failure is not None:
            raise self._park_failure
        self.is_parked = True
        return self.weight_bytes

    def wake(self) -> None:
        if not self.is_parked or self.is_closed:
            self.violations.append(f"{self.spec.model_id} was woken without having been parked")

    async def resume(self) -> None:
        await self._sleep(0)
        if self._wake_failure is not None:
            raise self._wake_failure
        self.is_parked = False

    def close(self) -> None:
        if self.running:
            self.violations.append(f"{self.spec.model_id} was freed under {self.running} requests")
        self.is_closed = True

    def _outputs_now(self, call: OutputsCall) -> Outputs:
        for name in call.outputs:
            if name != "tokens" and name not in self.info.outputs:
                raise TaskNotSupported(f"{call.model_id} has no {name} output", param="outputs")
        parts: list[NDArray[np.float32] | NDArray[np.int32]] = []
        width = self._width(call.dimensions) if "dense" in call.outputs else 0
        space = self._space_of_outputs(call, width)
        items: list[str | tuple[int, ...]] = [self._prompted(call, text) for text in call.texts]
        items += call.token_ids
        texts = [item if isinstance(item, str) else " ".join(map(str, item)) for item in items]
        counts = [self._count(call, item, index) for index, item in enumerate(items)]
        rows = [fake_row(text) for text in texts]
        if width:
            parts += [fake_vector(self.spec.model_id, item, width) for item in items]
        terms = [chosen_terms(row, call) for row in rows] if "sparse" in call.outputs else []
        parts += [entries for entries, _ in terms] + [weights for _, weights in terms]
        vectors = [row.vectors for row in rows] if {"multi_vector", "tokens"} & {*call.outputs} else []
        return Outputs(
            body=join_body([*parts, *vectors]),
            dimensions=width,
            num_terms=tuple(len(entries) for entries, _ in terms),
            num_vectors=tuple(map(len, vectors)),
            vector_width=TOKEN_WIDTH if vectors else 0,
            term_names=self._term_names(texts, terms) if call.names_terms else {},
            space=space,
            token_counts=tuple(counts),
            timings=Timings(forward_s=self._embed_s),
        )

    def _space_of_outputs(self, call: OutputsCall, width: int) -> str:
        kinds = [kind for kind in ("dense", "sparse", "multi_vector", "tokens") if kind in call.outputs]
        name = output_name(kinds, "query" if call.input_type == "query" else "document")
        before = "" if call.token_ids else self._prompted(call, "")
        token_width = TOKEN_WIDTH if {"multi_vector", "tokens"} & {*kinds} else 0
        space = fake_space(self.spec, width=width or token_width, native_width=WIDTH, before=before, output=name)
        return check_expected(call.expect_space, space)

    def _width(self, dimensions: int | None) -> int:
        width = dimensions or WIDTH
        if width != WIDTH and not self.info.matryoshka.allows(width, WIDTH):
            allowed = self.info.matryoshka.describe(WIDTH)
            raise DimensionsNotSupported(f"dimensions {width} is not one of {allowed}", param="dimensions")
        return width

    def _term_names(self, texts: Sequence[str], terms: Sequence[Terms]) -> dict[int, str]:
        wanted = {int(entry) for entries, _ in terms for entry in entries}
        known = {entry: name for text in texts for entry, name in fake_names(text).items()}
        return {entry: known[entry] for entry in sorted(wanted)}

    def _embed_now(self, call: EmbedCall) -> Embeddings:
        if "dense" not in self.info.outputs:
            can = self.info.task if self.info.task != "embed" else f"give {' and '.join(self.info.outputs)} outputs"
            raise TaskNotSupported(f"{call.model_id} can {can}, not embed", param="model")
        width = self._width(call.dimensions)
        items: list[str | tuple[int, ...]] = [self._prompted(call, text) for text in call.texts]
        items += call.token_ids
        before = "" if call.token_ids else self._prompted(call, "")
        space = fake_space(self.spec, width=width, native_width=WIDTH, before=before)
        check_expected(call.expect_space, space)
        counts = [self._count(call, item, index) for index, item in enumerate(items)]
        limit = self.info.max_tokens
        rows = [fake_vector(self.spec.model_id, item, width) for item in items]
        return Embeddings(
            vectors=np.stack(rows).tobytes(),
            dimensions=width,
            token_counts=tuple(min(count, limit) for count in counts),
            truncated=tuple(index for index, count in enumerate(counts) if count > limit),
            space=space,
            timings=Timings(forward_s=self._embed_s),
        )

    def _contextual_now(self, call: ContextualCall) -> Embeddings:
        """The vector of a piece is that of its whole document, a line break and the piece."""
        width, vectors, counts, start = self._width(call.dimensions), [], [], 0
        for num_pieces in call.pieces:
            pieces = call.texts[start : start + num_pieces]
            document, start = self._prompted(call, "".join(pieces)), start + num_pieces
            vectors += [fake_vector(self.spec.model_id, f"{document}\n{piece}", width) for piece in pieces]
            counts += [len(piece.split()) for piece in pieces[:-1]] + [len(pieces[-1].split()) + 2]
        return Embeddings(
            vectors=np.stack(vectors).tobytes(),
            dimensions=width,
            token_counts=tuple(counts),
            timings=Timings(forward_s=self._embed_s),
        )

    def _score_now(self, call: ScoreCall) -> Scores:
        """Without an activation the scores are logits: `ln(p / (1 - p))`. With vectors of tokens they are MaxSim."""
        has_vectors = "multi_vector" in self.info.outputs
        if self.info.task == "embed" and not (has_vectors and call.queries):
            raise TaskNotSupported(f"{call.model_id} can embed, not score", param="model")
        queries = call.queries if len(call.queries) == len(call.texts) else (call.queries or ("",)) * len(call.texts)
        pairs = list(zip(queries, call.texts, strict=True))
        labels = ("maxsim",) if has_vectors else self.info.labels
        if has_vectors and call.activation == "probabilities":
            raise InvalidValue(
                "the scores of this model are no probabilities: send raw_scores: true", param="raw_scores"
            )
        if has_vectors:
            values = np.array([[fake_maxsim(query, text)] for query, text in pairs], "<f4")
        else:
            values = self._scores(pairs, is_raw=call.activation == "none")
        counts = [len(query.split()) + len(text.split()) + 3 for query, text in pairs]
        limit = self.info.max_tokens
        return Scores(
            values=values.tobytes(),
            num_labels=len(labels),
            labels=labels,
            token_counts=tuple(min(count, limit) for count in counts),
            truncated=tuple(index for index, count in enumerate(counts) if count > limit),
            timings=Timings(forward_s=self._embed_s),
        )

    def _scores(self, pairs: Sequence[tuple[str, str]], *, is_raw: bool) -> NDArray[np.float32]:
        rows = [
            [fake_score(self.spec.model_id, query, text, label) for label in range(len(self.info.labels))]
            for query, text in pairs
        ]
        values = np.array(rows, "<f4")
        return np.log(values / (1 - values)).astype("<f4") if is_raw else values

    def _tokenize_now(self, call: TokenizeCall) -> Tokens:
        """Each word is a token, whose id is its length; `[CLS]` (101) and `[SEP]` (102) are around them."""
        before = self._named_prompt(call.input_type)
        rows = []
        for text in call.texts:
            words = [(len(word[0]), *word.span()) for word in re.finditer(r"\S+", before + text)]
            rows.append([(101, -1, -1), *words, (102, -1, -1)] if call.add_special_tokens else words)
        return Tokens(
            places=np.array(list(chain.from_iterable(rows)), "<i4").tobytes(),
            token_counts=tuple(map(len, rows)),
            specials={101: "[CLS]", 102: "[SEP]"},
            before=before,
        )

    def _prompted(self, call: TextCall, text: str) -> str:
        return (self._named_prompt(call.input_type) if call.prompt is None else call.prompt) + text

    def _named_prompt(self, name: str | None) -> str:
        if name is None or (not self.spec.prompts and name in ("query", "document")):
            return ""
        if name not in self.spec.prompts:
            known = ", ".join(self.spec.prompts) or "none"
            raise PromptNotFound(f"no prompt {name!r}; this model has {known}", param="input_type")
        return self.spec.prompts[name]

    def _count(self, call: TextCall, item: str | tuple[int, ...], index: int) -> int:
        if not isinstance(item, str) and max(item) >= VOCABULARY:
            raise InvalidTokenId(f"token id {max(item)} of input {index} is not below {VOCABULARY}", param="input")
        count = len(item.split()) + 2 if isinstance(item, str) else len(item)
        if count > self.info.max_tokens and (call.truncate or self.spec.truncate) == "error":
            raise ContextLengthExceeded(
                f"input {index} has {count} tokens, the limit is {self.info.max_tokens}", param="input"
            )
        return count
