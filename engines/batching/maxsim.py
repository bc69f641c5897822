"""Scores documents for queries by late interaction: answers a `ScoreCall` on a model that gives vectors of tokens.

Queries run first. Documents follow, and each batch of them is scored where it ran, as soon as it has: their vectors are
never held together, unless the model merges those of a document, which needs all of them and takes long.
"""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, Unpack

import numpy as np
import torch
from msgspec import structs
from numpy.typing import NDArray
from torch import Tensor

from engines.batching.output import FinishedRows, OutputSpec, Row
from engines.batching.outputs import OutputFacts, kind_of_outputs
from engines.batching.pooled import check_pooled
from engines.errors import EngineError, InvalidRequest, InvalidValue, NonFiniteEmbedding
from engines.inputs.pairs import renamed
from engines.inputs.prompts import select_prompt
from engines.inputs.tokenizer import Ids, Tokenizer
from engines.layers.maxsim import max_sim
from engines.layers.token_pooling import TokenPooling
from engines.models.base import Encoder
from engines.models.outputs import OutputsEncoder, RawOutputs, Wanted
from engines.spec import ModelSpec
from engines.types import Outputs, OutputsCall, ResultDetails, ScoreCall, Scores


class MaxSimOutput(OutputSpec, frozen=True, eq=False):
    """One score for each document, answered by `Scores`. Raw outputs are `RawOutputs`.

    Each request has its own queries, so that no two are equal.

    Args:
        queries: vectors of all queries, float32 `[Q, W]`, in main memory.
        query_ends: where each of them ends.
        query_of: the query of each document.
        label: the name of the score.
        is_mean: whether a score is the mean over a query's vectors.
        pooling: how documents' vectors are merged; None leaves them.
    """

    is_cached: ClassVar[bool] = False

    queries: NDArray[np.float32]
    query_ends: NDArray[np.int64]
    query_of: Sequence[int]
    label: str
    is_mean: bool
    pooling: TokenPooling | None = None

    @classmethod
    def encode(cls, encoder: Encoder, texts: Sequence[Ids], prompt_tokens: Sequence[int] | None) -> RawOutputs:
        """See `OutputSpec`."""
        assert isinstance(encoder, OutputsEncoder), "the model gives vectors of tokens"
        return encoder.run_outputs(texts, prompt_tokens, Wanted(multi_vector=True))

    def finish_inputs(self, raw: RawOutputs, indexes: Sequence[int] | None, inputs: Sequence[int]) -> FinishedRows:
        """See `OutputSpec`: scores, or the documents' vectors where these are merged first."""
        assert raw.tokens is not None, "they were wanted"
        counts, vectors = raw.tokens
        ends = np.cumsum(counts).tolist()
        every = range(len(counts))
        chosen = [
            vectors[ends[index] - counts[index] : ends[index]] for index in (every if indexes is None else indexes)
        ]
        if self.pooling is not None:
            rows = [part.cpu().numpy() for part in chosen]
            return FinishedRows(rows, np.array([bool(np.isfinite(row).all()) for row in rows]))
        scores = self._scores(chosen, inputs)
        return FinishedRows(scores, np.isfinite(scores[:, 0]))

    def check_size(self, token_counts: Sequence[int]) -> None:
        """See `OutputSpec`."""
        poolings = () if self.pooling is None else (self.pooling,)
        check_pooled(poolings, token_counts, self.queries.shape[-1], "documents")

    def allocate(self, num_items: int) -> list[Row]:
        """See `OutputSpec`."""
        return [np.empty(1, np.float32)] * num_items

    def remaining_steps(self, allocated: list[Row]) -> Sequence[Callable[[], None]]:
        """See `OutputSpec`: one for each document whose vectors are merged."""
        if self.pooling is None:
            return ()
        return [partial(self._pool_and_score, allocated, index) for index in range(len(allocated))]

    def pack(self, allocated: list[Row], **details: Unpack[ResultDetails]) -> Scores:
        """See `OutputSpec`."""
        return Scores(values=np.concatenate(allocated).tobytes(), num_labels=1, labels=(self.label,), **details)

    def not_finite(self, index: int) -> EngineError:
        """See `OutputSpec`."""
        return NonFiniteEmbedding(
            f"the score of documents[{index}] is not finite: the model's dtype overflows on this text. Serve the model "
            "with `dtype: float32` or `bfloat16`",
            index=index,
        )

    def _pool_and_score(self, allocated: list[Row], index: int) -> None:
        assert self.pooling is not None, "the caller has asked"
        pooled = self.pooling(torch.from_numpy(allocated[index]))
        allocated[index] = self._scores([pooled], [index])[0]

    @torch.inference_mode()
    def _scores(self, documents: Sequence[Tensor], inputs: Sequence[int]) -> NDArray[np.float32]:
        """Returns the scores `[n, 1]` of documents `[*, W]`; those that share a query are scored together."""
        scores = documents[0].new_empty(len(documents), 1)
        places_of: dict[int, list[int]] = {}
        for place, index in enumerate(inputs):
            places_of.setdefault(self.query_of[index], []).append(place)
        for query, places in places_of.items():
            vectors = torch.from_numpy(self._query(query)).to(scores.device)
            scores[places, 0] = self._of_query(vectors, [documents[place] for place in places])
        rows: NDArray[np.float32] = scores.cpu().numpy()
        return rows

    def _query(self, index: int) -> NDArray[np.float32]:
        end = self.query_ends[index]
        return self.queries[self.query_ends[index - 1] if index else 0 : end].copy()  # torch takes no read-only ones

    def _of_query(self, query: Tensor, documents: Sequence[Tensor]) -> Tensor:
        found = max_sim(query, torch.cat(list(documents)), [len(document) for document in documents])
        if not self.is_mean:
            return found
        return found / max(len(query), 1)


Answer = Callable[[OutputsCall, OutputSpec], Awaitable[Any]]
"""Runs the inputs of a call, for an output that need not be the call's own."""


class MaxSimScorer:
    """Answers calls for scores of one model.

    Args:
        facts: of a model whose `similarity` is known.
        tokenizer: of documents.
        spec: with its default prompt.
        prompts: of the model, by name.
    """

    def __init__(self, facts: OutputFacts, tokenizer: Tokenizer, spec: ModelSpec, prompts: Mapping[str, str]) -> None:
        self._facts, self._tokenizer, self._spec, self._prompts = facts, tokenizer, spec, prompts
        self._of_queries = kind_of_outputs(Wanted(multi_vector=True, side="query"))(
            dense=None, vector_width=facts.vector_width, max_terms=0, min_weight=0.0
        )

    async def score(self, call: ScoreCall, answer: Answer) -> Scores:
        """Answers a call. Token counts are those of the documents; a query's are added to the first of its own.

        Raises:
            InvalidRequest: the call cannot be answered as it says.
        """
        _check(call)
        distinct = {query: place for place, query in enumerate(dict.fromkeys(call.queries))}
        asked = call.queries if len(call.queries) > 1 else call.queries * len(call.texts)
        try:
            of_queries = structs.replace(
                _part(call, tuple(distinct), "query"),
                instruction=call.instruction,
                truncate="error" if call.truncate == "error" else None,
            )
            queries: Outputs = await answer(of_queries, self._of_queries)
        except InvalidRequest as error:
            raise renamed(error, "query") from error
        output = self._output(queries, [distinct[query] for query in asked])
        try:
            found: Scores = await answer(self._documents(call), output)
        except InvalidRequest as error:
            raise renamed(error, "documents") from error
        return _joined(found, queries, output.query_of)

    def _output(self, queries: Outputs, query_of: Sequence[int]) -> MaxSimOutput:
        facts = self._facts
        assert facts.similarity is not None, "the engine has asked"
        return MaxSimOutput(
            queries=queries.vectors(),
            query_ends=np.cumsum(queries.num_vectors, dtype=np.int64),
            query_of=query_of,
            label=facts.similarity,
            is_mean=facts.similarity == "meanmaxsim",
            pooling=facts.pooling if "document" in facts.pooled_on else None,
        )

    def _documents(self, call: ScoreCall) -> OutputsCall:
        documents = structs.replace(_part(call, call.texts, "document"), truncate=call.truncate)
        if call.max_text_tokens is None:
            return documents
        return structs.replace(documents, max_tokens=call.max_text_tokens + self._frame_tokens(documents))

    def _frame_tokens(self, documents: OutputsCall) -> int:
        """Returns the tokens around a document: the special ones, and those of its prompt."""
        prompt = select_prompt(documents, self._prompts, self._spec.default_prompt, None).before
        limits = self._tokenizer.limits
        in_prompt = len(self._tokenizer.encode_bare([prompt])[0]) if prompt else 0
        return len(limits.prefix) + len(limits.suffix) + in_prompt


def _part(call: ScoreCall, texts: tuple[str, ...], side: str) -> OutputsCall:
    return OutputsCall(
        model_id=call.model_id, texts=texts, outputs=("multi_vector",), input_type=side, caller=call.caller,
        is_flex=call.is_flex,
    )  # fmt: skip


def _check(call: ScoreCall) -> None:
    if not call.queries:
        raise InvalidValue("this model scores a text for a query: send a query too", param="query")
    if len(call.queries) not in (1, len(call.texts)):
        raise InvalidValue(
            f"there are {len(call.queries)} queries for {len(call.texts)} texts: send one for all of them, or one for "
            "each",
            param="query",
        )
    if call.activation == "probabilities":
        raise InvalidValue(
            "the scores of this model are similarities (MaxSim), no probabilities: send raw_scores: true",
            param="raw_scores",
        )


def _joined(found: Scores, queries: Outputs, query_of: Sequence[int]) -> Scores:
    """Returns scores with what their queries took."""
    counts = list(found.token_counts)
    first = {query: index for index, query in reversed(list(enumerate(query_of)))}
    for query, index in first.items():
        counts[index] += queries.token_counts[query]
    mine, theirs = found.timings, queries.timings
    together: dict[str, Any] = {
        name: getattr(mine, name) + getattr(theirs, name) for name in ("tokenize_s", "queue_s", "forward_s")
    }
    return structs.replace(
        found,
        token_counts=tuple(counts),
        timings=structs.replace(mine, **together),
        batches=(*queries.batches, *found.batches),
        deduplicated=found.deduplicated + queries.deduplicated,
    )
