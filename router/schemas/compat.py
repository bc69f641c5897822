"""Requests and responses of the compatibility routes, for clients of other embedding servers.

Responses have the fields that these clients read. Request fields that this server does not use are ignored.
"""

from typing import Annotated, Literal

from msgspec import Meta, Struct, field

from engines.types import MAX_LISTED_CHARS
from router.schemas.inference import (
    INPUT_FORMS,
    MAX_INPUTS,
    MAX_WIDTH,
    Embedding,
    EmbeddingRequest,
    EncodingFormat,
    Input,
    Model,
    Name,
    OutputDtype,
    Width,
)

_TEXTS = f"1 to {MAX_INPUTS} texts, none empty."
_TEXT_SCHEMA = {"type": "string", "minLength": 1}
_TEXTS_SCHEMA = {"type": "array", "minItems": 1, "maxItems": MAX_INPUTS, "items": _TEXT_SCHEMA}
_FORMS_SCHEMA = {"anyOf": [_TEXT_SCHEMA, _TEXTS_SCHEMA]}
"""For the OpenAPI document only: `router/api/decoding.py` checks these bounds and has an error code for each."""
_MAX_TYPES = 16
"""Most vector types in one request. There are six; a client may repeat some."""
CohereType = Literal["float", "int8", "uint8", "binary", "ubinary", "base64"]


class TeiRequest(Struct, frozen=True, kw_only=True):
    """TEI's request: texts for the default model."""

    inputs: Annotated[
        Input,
        Meta(
            description=f"One text, {_TEXTS[:-1]}, or the token ids of one or of several.",
            extra_json_schema={"anyOf": INPUT_FORMS},
            examples=["a text"],
        ),
    ]
    model: Annotated[Name | None, Meta(description="Extension: a model other than the default.")] = None
    normalize: bool | None = None
    truncate: Annotated[
        bool | None,
        Meta(description="false: refuse inputs that are longer than the model's limit. Null: the model's default."),
    ] = None
    truncation_direction: Annotated[
        Literal["left", "right", "Left", "Right"] | None,
        Meta(description="The end that is truncated; default `right`."),
    ] = None
    prompt_name: Annotated[
        Name | None, Meta(description="Name of a prompt of the model, which is prepended to each text.")
    ] = None
    dimensions: Width | None = None


class TeiTokenizeRequest(Struct, frozen=True, kw_only=True):
    """TEI's request for the tokens of texts."""

    inputs: Annotated[
        str | list[str],
        Meta(
            description=f"One text, or {_TEXTS} At most {MAX_LISTED_CHARS} characters in all.",
            extra_json_schema=_FORMS_SCHEMA,
            examples=["a text"],
        ),
    ]
    model: Annotated[Name | None, Meta(description="Extension: a model other than the default.")] = None
    add_special_tokens: Annotated[bool | None, Meta(description="false: without the tokens around each text.")] = None
    prompt_name: Annotated[
        Name | None, Meta(description="Name of a prompt of the model, which is prepended to each text.")
    ] = None


class TeiToken(Struct, frozen=True):
    """A token and the characters that it stands for, `start` to `stop`; a special token has its name, and no place."""

    id: int
    text: str
    special: bool
    start: int | None
    stop: int | None


class TeiEmbeddingType(Struct, frozen=True, kw_only=True):
    """The pooling of the model; null: as its own files specify."""

    pooling: str | None


class TeiLabels(Struct, frozen=True, kw_only=True):
    """The labels of a reranker or classifier; empty until it is loaded."""

    id2label: dict[str, str]
    label2id: dict[str, int]


class TeiModelType(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The type of the model; one of the three is present."""

    embedding: TeiEmbeddingType | None = None
    reranker: TeiLabels | None = None
    classifier: TeiLabels | None = None


class TeiInfo(Struct, frozen=True, kw_only=True):
    """The default model.

    `max_batch_tokens`: tokens of one request, if the size of batches is found by measuring. `max_batch_requests`,
    `sha` and `docker_label`: TEI has them; null here.
    """

    model_id: str
    model_sha: str | None
    model_dtype: str
    model_type: TeiModelType
    served_model_name: str
    max_input_length: int
    max_concurrent_requests: int
    max_batch_tokens: int
    max_batch_requests: int | None = None
    max_client_batch_size: int
    auto_truncate: bool
    tokenization_workers: int
    version: str
    sha: str | None = None
    docker_label: str | None = None


class InfinityRequest(EmbeddingRequest, frozen=True, kw_only=True):
    """OpenAI's request as Infinity's client writes it, which sends its defaults."""

    dimensions: Annotated[
        Annotated[int, Meta(ge=0, le=MAX_WIDTH)] | None, Meta(description="As for POST /v1/embeddings; 0: not given.")
    ] = None
    model: Annotated[
        Name | None, Meta(description="As for POST /v1/embeddings; `default/not-specified`: the default model.")
    ] = None


class CohereContent(Struct, frozen=True, kw_only=True):
    """One part of an input: text only, no images."""

    type: Literal["text"]
    text: str


class CohereInput(Struct, frozen=True, kw_only=True):
    """One input, of one part."""

    content: Annotated[list[CohereContent], Meta(min_length=1, max_length=1)]


class CohereRequest(Struct, frozen=True, kw_only=True):
    """Cohere's request, API version 2: `texts`, or the same as `inputs`; no images."""

    texts: Annotated[list[str] | None, Meta(description=_TEXTS, extra_json_schema=_TEXTS_SCHEMA)] = None
    inputs: Annotated[
        list[CohereInput] | None,
        Meta(
            description=f"1 to {MAX_INPUTS} inputs, instead of `texts`.",
            extra_json_schema={"minItems": 1, "maxItems": MAX_INPUTS},
            examples=[[{"content": [{"type": "text", "text": "a text"}]}]],
        ),
    ] = None
    model: Name
    input_type: Annotated[
        Name | None,
        Meta(
            description="Selects the prompt that is prepended to each text.",
            examples=["search_query", "search_document"],
        ),
    ] = None
    embedding_types: Annotated[
        Annotated[list[CohereType], Meta(max_length=_MAX_TYPES)] | None,
        Meta(
            description="Default `float`; `base64` encodes float32. `int8` and `uint8` need a calibrated model or two "
            "texts."
        ),
    ] = None
    truncate: Annotated[
        Literal["NONE", "START", "END"] | None,
        Meta(description="`NONE`: refuse inputs that are longer than the model's limit."),
    ] = None
    output_dimension: Width | None = None


class CohereV1Request(CohereRequest, frozen=True, kw_only=True):
    """The request of API version 1, where a model need not be named."""

    model: Annotated[Name | None, Meta(description="Default: the registry's default model.")] = None  # type: ignore[assignment]  # a wider type than the base class has; both are frozen


class CohereEmbeddings(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One list of vectors for each requested type."""

    float_: list[list[float]] | None = field(name="float", default=None)
    int8: list[list[int]] | None = None
    uint8: list[list[int]] | None = None
    binary: list[list[int]] | None = None
    ubinary: list[list[int]] | None = None
    base64: list[str] | None = None


class CohereVersion(Struct, frozen=True, kw_only=True):
    """The version of the API."""

    version: str


class CohereUnits(Struct, frozen=True, kw_only=True):
    """Tokens that the model processed, including special tokens."""

    input_tokens: int


class CohereMeta(Struct, frozen=True, kw_only=True):
    """The API version and the tokens used."""

    api_version: CohereVersion
    billed_units: CohereUnits


class CohereResponse(Struct, frozen=True, kw_only=True):
    """The vectors by type, in the order of the texts."""

    id: str
    response_type: Literal["embeddings_by_type"]
    embeddings: CohereEmbeddings
    texts: list[str]
    meta: CohereMeta


class CohereFloats(Struct, frozen=True, kw_only=True):
    """The answer of API version 1 to a request without `embedding_types`."""

    id: str
    response_type: Literal["embeddings_floats"]
    embeddings: list[list[float]]
    texts: list[str]
    meta: CohereMeta


class InfinityStats(Struct, frozen=True, kw_only=True):
    """What waits and runs for a model: texts in its queues, their share of `MAX_QUEUE_SIZE`, and running requests."""

    queue_fraction: float
    queue_absolute: int
    results_pending: int
    batch_size: int


class InfinityModel(Model, frozen=True, kw_only=True):
    """OpenAI's model object with the fields that Infinity's client needs; its owner is always `infinity`."""

    stats: InfinityStats
    backend: str = "torch"
    capabilities: tuple[str, ...] = ()


class InfinityModelList(Struct, frozen=True, kw_only=True):
    """The models that may be served, in memory or not."""

    object: Literal["list"] = "list"
    data: list[InfinityModel]


class ContextualizedRequest(Struct, frozen=True, kw_only=True):
    """Voyage's request: documents in pieces, each of which is embedded in the context of its document."""

    inputs: Annotated[
        list[list[str]],
        Meta(
            description=f"Documents, each a list of its pieces in order; 1 to {MAX_INPUTS} pieces in all, none empty. "
            "The pieces of a document are joined as they are.",
            extra_json_schema={"type": "array", "minItems": 1, "maxItems": MAX_INPUTS, "items": _TEXTS_SCHEMA},
            examples=[[["Berlin is the capital of Germany. ", "It has 3.85 million inhabitants."], ["One piece."]]],
        ),
    ]
    model: Annotated[Name | None, Meta(description="A model that pools by the mean.")] = None
    input_type: Annotated[Name | None, Meta(description="As in POST /v1/embeddings; `query` or `document`.")] = None
    output_dimension: Width | None = None
    output_dtype: OutputDtype | None = None
    encoding_format: EncodingFormat | None = None


class ContextualizedDocument(Struct, frozen=True, kw_only=True):
    """The vectors of one document's pieces."""

    object: Literal["list"]
    data: list[Embedding]
    index: int


class TotalTokens(Struct, frozen=True, kw_only=True):
    """Tokens that the model processed, including special tokens and the overlap of windows."""

    total_tokens: int


class ContextualizedResponse(Struct, frozen=True, kw_only=True):
    """The vectors, in input order."""

    object: Literal["list"]
    data: list[ContextualizedDocument]
    model: str
    usage: TotalTokens


WIRE = (
    InfinityRequest,
    InfinityModelList,
    TeiRequest,
    TeiTokenizeRequest,
    TeiInfo,
    CohereRequest,
    CohereV1Request,
    CohereResponse,
    CohereFloats,
    TeiToken,
    ContextualizedRequest,
    ContextualizedResponse,
)
