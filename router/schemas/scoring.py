"""Requests and responses of the routes that score pairs and texts: rerank, score, classify, predict.

The shapes are those of Cohere, Jina, vLLM, Infinity and text-embeddings-inference (TEI). Unknown fields are ignored;
null means not given.
"""

from typing import Annotated, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

from engines.spec import Truncate
from router.schemas.inference import MAX_INPUTS, KeepAlive, Name, ServiceTier, Usage

_TEXT_SCHEMA = {"type": "string", "minLength": 1}
_DOCUMENT_SCHEMA = {
    "anyOf": [_TEXT_SCHEMA, {"type": "object", "required": ["text"], "properties": {"text": _TEXT_SCHEMA}}]
}
_MANY = {"type": "array", "minItems": 1, "maxItems": MAX_INPUTS}
_DOCUMENTS_SCHEMA = _MANY | {"items": _DOCUMENT_SCHEMA}
_TEXTS_SCHEMA = _MANY | {"items": _TEXT_SCHEMA}
_FORMS_SCHEMA = {"anyOf": [_TEXT_SCHEMA, _TEXTS_SCHEMA]}
"""For the OpenAPI document only: `router/api/scoring.py` checks these bounds and has an error code for each."""
_MODEL = "A model id or alias from GET /v1/models. Default: the registry's default model."
_MAX_FIELDS = 64
"""Most `rank_fields` in a request."""

Method = Literal["cosine", "maxsim"]
"""How an embedding model compares query and document."""
UsedMethod = Literal["cosine", "maxsim", "meanmaxsim"]
"""How it has: a model's own MaxSim is the sum over the query's tokens, or their mean."""
_METHOD = (
    "How an embedding model compares query and document: `cosine` of its dense vectors, or `maxsim` of the vectors of "
    "their tokens. Default: `cosine`, if it has dense vectors. Rerankers have none."
)

Count = Annotated[int, Meta(ge=0, le=2**31 - 1)]
"""0 means no limit, which is what vLLM's clients send for it."""


class DocumentText(Struct, frozen=True):
    """A document as an object; other fields than its text are ignored."""

    text: str


class RerankOptions(Struct, frozen=True, kw_only=True):
    """What rerank requests of all shapes share."""

    query: Annotated[str, Meta(description="What the documents are ranked for; not empty.", examples=["a big cat"])]
    model: Annotated[Name | None, Meta(description=_MODEL)] = None
    top_n: Annotated[Count | None, Meta(description="The best documents to return. Default and 0: all.")] = None
    return_documents: Annotated[
        bool | Literal["true", "false"] | None, Meta(description="true: each result has its document.")
    ] = None
    max_tokens_per_doc: Annotated[
        Count | None, Meta(description="Truncate documents to so many tokens. Default and 0: as many as fit.")
    ] = None
    instruction: Annotated[
        str | None, Meta(description="The task for a reranker whose template has one; default: the model's own.")
    ] = None
    raw_scores: Annotated[
        bool | None, Meta(description="true: scores before the model's activation (logits). Default false.")
    ] = None
    rank_fields: Annotated[
        Annotated[list[Name], Meta(max_length=_MAX_FIELDS)] | None,
        Meta(description='Only `["text"]`: documents are ranked by their text.'),
    ] = None
    keep_alive: Annotated[
        KeepAlive | None, Meta(description="As for POST /v1/embeddings.", examples=["10m", 0, -1])
    ] = None
    method: Annotated[Method | None, Meta(description=_METHOD)] = None
    service_tier: Annotated[ServiceTier | None, Meta(description="As for POST /v1/embeddings.")] = None


class RerankRequest(RerankOptions, frozen=True, kw_only=True):
    """Documents to rank for a query, as Cohere, Jina, vLLM and LiteLLM write it."""

    documents: Annotated[
        list[str | DocumentText],
        Meta(
            description=f"1 to {MAX_INPUTS} documents, none empty: strings, or objects with `text`.",
            extra_json_schema=_DOCUMENTS_SCHEMA,
            examples=[["A lion sleeps.", "The train is late."]],
        ),
    ]
    truncate: Annotated[
        Truncate | bool | None,
        Meta(description="The end at which too long documents are truncated (default `end`), or `error` (or false)."),
    ] = None


class EitherRerankRequest(RerankOptions, frozen=True, kw_only=True):
    """The request above (with `documents`), or that of text-embeddings-inference (with `texts`).

    With `documents` and `raw_scores`, it is Infinity's, and so is the answer.
    """

    documents: Annotated[
        list[str | DocumentText] | None,
        Meta(description="As for POST /v1/rerank.", extra_json_schema=_DOCUMENTS_SCHEMA),
    ] = None
    texts: Annotated[
        list[str] | None,
        Meta(description=f"TEI: 1 to {MAX_INPUTS} texts, none empty.", extra_json_schema=_TEXTS_SCHEMA),
    ] = None
    truncate: Annotated[
        Truncate | bool | None,
        Meta(description="With `documents`: `end`, `start` or `error`. TEI: false refuses texts that are too long."),
    ] = None
    return_text: Annotated[bool | None, Meta(description="TEI: each result has its text.")] = None
    truncation_direction: Annotated[
        Literal["left", "right", "Left", "Right"] | None,
        Meta(description="TEI: the end that is truncated; default `right`."),
    ] = None


class RerankResult(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A document's place in the request and its score."""

    index: int
    relevance_score: float
    document: DocumentText | None = None


class ApiVersion(Struct, frozen=True, kw_only=True):
    """The version of Cohere's API."""

    version: Literal["1", "2"]


class SearchUnits(Struct, frozen=True, kw_only=True):
    """What Cohere bills: one search."""

    search_units: int


class RerankTokens(Struct, frozen=True, kw_only=True):
    """Tokens that the model processed, including special tokens; none are generated, and some clients add both."""

    input_tokens: int
    output_tokens: Literal[0]


class RerankMeta(Struct, frozen=True, kw_only=True):
    """Cohere's record of a request."""

    api_version: ApiVersion
    billed_units: SearchUnits
    tokens: RerankTokens


class RerankResponse(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Documents, best first; equal scores in the order of the request.

    `method`: how an embedding model has ranked; absent for a reranker.
    """

    id: str
    object: Literal["list"]
    model: str
    results: list[RerankResult]
    usage: Usage
    meta: RerankMeta
    method: UsedMethod | None = None


class InfinityRank(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Infinity: a document's place in the request, its score, and the document itself as a string."""

    index: int
    relevance_score: float
    document: str | None = None


class InfinityRerankResponse(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Infinity: documents, best first. `method`: as for POST /v1/rerank."""

    id: str
    object: Literal["rerank"]
    created: int
    model: str
    results: list[InfinityRank]
    usage: Usage
    method: UsedMethod | None = None


class TeiRank(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """TEI: a text's place in the request and its score."""

    index: int
    score: float
    text: str | None = None


class TextPair(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One text, or a pair of texts, as an array."""

    first: str
    second: str | UnsetType = UNSET


class PredictRequest(Struct, frozen=True, kw_only=True):
    """TEI's request for the labels of texts or pairs."""

    inputs: Annotated[
        str | list[str | TextPair],
        Meta(
            description=f"One text, one pair `[text, text]`, or a list of 1 to {MAX_INPUTS} of `[text]` and "
            "`[text, text]`.",
            extra_json_schema={
                "anyOf": [
                    _TEXT_SCHEMA,
                    {"type": "array", "minItems": 1, "maxItems": 2, "items": _TEXT_SCHEMA},
                    _MANY | {"items": {"type": "array", "minItems": 1, "maxItems": 2, "items": _TEXT_SCHEMA}},
                ]
            },
            examples=["a text"],
        ),
    ]
    model: Annotated[Name | None, Meta(description="Extension: a model other than the default.")] = None
    raw_scores: Annotated[bool | None, Meta(description="true: logits instead of probabilities.")] = None
    truncate: Annotated[bool | None, Meta(description="false: refuse texts that are too long.")] = None
    truncation_direction: Annotated[
        Literal["left", "right", "Left", "Right"] | None,
        Meta(description="The end that is truncated; default `right`."),
    ] = None


class Prediction(Struct, frozen=True, kw_only=True):
    """A label and its score."""

    score: float
    label: str


class ScoreRequest(Struct, frozen=True, kw_only=True):
    """vLLM's request for the scores of pairs: one text with each of many, or the two lists item by item."""

    text_1: Annotated[str | list[str], Meta(description="Queries.", extra_json_schema=_FORMS_SCHEMA)]
    text_2: Annotated[
        str | list[str],
        Meta(description="Documents: as many as in `text_1`, or any for one.", extra_json_schema=_FORMS_SCHEMA),
    ]
    model: Annotated[Name | None, Meta(description=_MODEL)] = None
    instruction: Annotated[str | None, Meta(description="As for POST /v1/rerank.")] = None
    use_activation: Annotated[
        bool | None, Meta(description="false: scores before the model's activation (logits). Default true.")
    ] = None
    truncate: Annotated[Truncate | None, Meta(description="As for POST /v1/rerank.")] = None
    keep_alive: KeepAlive | None = None
    method: Annotated[Method | None, Meta(description=_METHOD)] = None


class PairScore(Struct, frozen=True, kw_only=True):
    """The score of one pair."""

    index: int
    object: Literal["score"]
    score: float


class ScoreResponse(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Scores in the order of the request. `method`: as for POST /v1/rerank."""

    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[PairScore]
    usage: Usage
    method: UsedMethod | None = None


class ClassifyRequest(Struct, frozen=True, kw_only=True):
    """vLLM's request for the labels of texts. With `raw_scores`, it is Infinity's, and so is the answer."""

    input: Annotated[
        str | list[str],
        Meta(
            description=f"One text, or 1 to {MAX_INPUTS} texts, none empty.",
            extra_json_schema=_FORMS_SCHEMA,
            examples=["a text"],
        ),
    ]
    model: Annotated[Name | None, Meta(description=_MODEL)] = None
    use_activation: Annotated[
        bool | None, Meta(description="false: logits instead of probabilities. Default true.")
    ] = None
    raw_scores: Annotated[
        bool | None,
        Meta(description="Infinity: true: logits. If given, `data` is a list of `[{score, label}]`, best first."),
    ] = None
    truncate: Annotated[Truncate | None, Meta(description="As for POST /v1/embeddings.")] = None
    keep_alive: KeepAlive | None = None


class TextLabels(Struct, frozen=True, kw_only=True):
    """The most probable label of a text, and the probability of each label in the order of the model's labels."""

    index: int
    label: str
    probs: list[float]
    num_classes: int


class ClassifyResponse(Struct, frozen=True, kw_only=True):
    """The labels of the texts, in the order of the request."""

    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[TextLabels]
    usage: Usage


class InfinityClassifyResponse(Struct, frozen=True, kw_only=True):
    """The answer to a request with `raw_scores`: all labels of each text, best first."""

    id: str
    object: Literal["classify"]
    created: int
    model: str
    data: list[list[Prediction]]
    usage: Usage


WIRE = (
    RerankRequest, EitherRerankRequest, RerankResponse, InfinityRerankResponse, TeiRank, PredictRequest, Prediction,
    ScoreRequest, ScoreResponse, ClassifyRequest, ClassifyResponse, InfinityClassifyResponse,
)  # fmt: skip
