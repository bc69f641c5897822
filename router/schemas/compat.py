"""Requests and responses of the compatibility routes, for clients of other embedding servers.

Responses have the fields that these clients read. Request fields that this server does not use are ignored.
"""

from typing import Annotated, Literal

from msgspec import Meta, Struct, field

from router.schemas.inference import MAX_INPUTS, KeepAlive, Name, Width

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
        str | list[str],
        Meta(description=f"One text, or {_TEXTS}", extra_json_schema=_FORMS_SCHEMA, examples=["a text"]),
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
    """The default model. Null: unknown until the model is loaded."""

    model_id: str
    model_sha: str | None
    model_dtype: str
    model_type: TeiModelType
    max_input_length: int | None
    max_concurrent_requests: int
    max_batch_tokens: int | None
    max_client_batch_size: int
    auto_truncate: bool
    tokenization_workers: int
    version: str


class CohereRequest(Struct, frozen=True, kw_only=True):
    """Cohere's request, API version 2: texts only, no images."""

    texts: Annotated[list[str], Meta(description=_TEXTS, extra_json_schema=_TEXTS_SCHEMA)]
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

    version: str = "2"


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


class OllamaRequest(Struct, frozen=True, kw_only=True):
    """Ollama's request. `model` may end in `:latest`, as its clients write it."""

    model: Name
    input: Annotated[str | list[str], Meta(description=f"One text, or {_TEXTS}", extra_json_schema=_FORMS_SCHEMA)]
    truncate: Annotated[
        bool | None,
        Meta(description="false: refuse inputs that are longer than the model's limit. Null: the model's default."),
    ] = None
    keep_alive: Annotated[
        KeepAlive | None,
        Meta(
            description="Seconds, a duration, 0 (unload at once), or a negative number (never unload when idle).",
            examples=["5m", -1],
        ),
    ] = None
    dimensions: Width | None = None


class OllamaResponse(Struct, frozen=True, kw_only=True):
    """The vectors in input order. Durations are in nanoseconds."""

    model: str
    embeddings: list[list[float]]
    total_duration: int
    load_duration: int
    prompt_eval_count: int


class OllamaDetails(Struct, frozen=True, kw_only=True):
    """The details of a model that Ollama's clients show."""

    quantization_level: str
    parent_model: str = ""
    format: str = "safetensors"
    family: str = ""
    families: tuple[str, ...] = ()
    parameter_size: str = ""


class OllamaModel(Struct, frozen=True, kw_only=True):
    """A registered model. `size`: bytes in memory, 0 if unknown. `digest`: the revision of its files."""

    name: str
    model: str
    modified_at: str
    size: int
    digest: str
    details: OllamaDetails


class OllamaModels(Struct, frozen=True, kw_only=True):
    """The models that the key may use."""

    models: list[OllamaModel]


class OllamaRunning(Struct, frozen=True, kw_only=True):
    """A loaded model. `expires_at` is null if the model is never unloaded when idle."""

    name: str
    model: str
    size: int
    size_vram: int
    digest: str
    details: OllamaDetails
    expires_at: str | None
    context_length: int


class OllamaProcesses(Struct, frozen=True, kw_only=True):
    """The loaded models on all devices."""

    models: list[OllamaRunning]


WIRE = (
    TeiRequest,
    TeiInfo,
    CohereRequest,
    CohereResponse,
    OllamaRequest,
    OllamaResponse,
    OllamaModels,
    OllamaProcesses,
)
