"""Structs of the compatibility routes: what clients of other embedding servers send and get. A leaf.

Only what their clients read is answered; fields that they send and we have no use for are ignored.
"""

from typing import Annotated, Literal

from msgspec import Meta, Struct, field

from router.schemas.inference import MAX_INPUTS, KeepAlive, Name, Width

_TEXTS = f"1 to {MAX_INPUTS} texts; none of them empty."
_TEXT_SCHEMA = {"type": "string", "minLength": 1}
_TEXTS_SCHEMA = {"type": "array", "minItems": 1, "maxItems": MAX_INPUTS, "items": _TEXT_SCHEMA}
_FORMS_SCHEMA = {"anyOf": [_TEXT_SCHEMA, _TEXTS_SCHEMA]}
"""For the document alone: decoding leaves these bounds to `router/api/decoding.py`, which has a code for each."""
_MAX_TYPES = 16
"""Of vectors in one answer; there are six, and a client may repeat itself."""
CohereType = Literal["float", "int8", "uint8", "binary", "ubinary", "base64"]


class TeiRequest(Struct, frozen=True, kw_only=True):
    """text-embeddings-inference: texts for the default model."""

    inputs: Annotated[
        str | list[str],
        Meta(description=f"One text, or {_TEXTS}", extra_json_schema=_FORMS_SCHEMA, examples=["a text"]),
    ]
    model: Annotated[Name | None, Meta(description="Our addition: a model other than the default.")] = None
    normalize: bool | None = None
    truncate: Annotated[
        bool | None,
        Meta(description="false: an input longer than the model reads is refused. Null: as the model has it."),
    ] = None
    truncation_direction: Annotated[
        Literal["left", "right", "Left", "Right"] | None,
        Meta(description="The end that is cut off; `right` by default."),
    ] = None
    prompt_name: Annotated[Name | None, Meta(description="A prompt of the model, put in front.")] = None
    dimensions: Width | None = None


class TeiEmbeddingType(Struct, frozen=True, kw_only=True):
    """How vectors are pooled; null: as the model's own files say."""

    pooling: str | None


class TeiModelType(Struct, frozen=True, kw_only=True):
    """What kind of model it is: one that embeds."""

    embedding: TeiEmbeddingType


class TeiInfo(Struct, frozen=True, kw_only=True):
    """The default model. Null: not known before it was loaded."""

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
    """Cohere's API, version 2: texts only, no images."""

    texts: Annotated[list[str], Meta(description=_TEXTS, extra_json_schema=_TEXTS_SCHEMA)]
    model: Name
    input_type: Annotated[
        Name | None,
        Meta(description="Picks the prompt put in front.", examples=["search_query", "search_document"]),
    ] = None
    embedding_types: Annotated[
        Annotated[list[CohereType], Meta(max_length=_MAX_TYPES)] | None,
        Meta(
            description="`float` by default; `base64` is of float32. `int8` and `uint8` need a calibrated model, or at "
            "least two texts."
        ),
    ] = None
    truncate: Annotated[
        Literal["NONE", "START", "END"] | None,
        Meta(description="`NONE`: an input longer than the model reads is refused."),
    ] = None
    output_dimension: Width | None = None


class CohereEmbeddings(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One list of vectors for each type asked for."""

    float_: list[list[float]] | None = field(name="float", default=None)
    int8: list[list[int]] | None = None
    uint8: list[list[int]] | None = None
    binary: list[list[int]] | None = None
    ubinary: list[list[int]] | None = None
    base64: list[str] | None = None


class CohereVersion(Struct, frozen=True, kw_only=True):
    """The version of the API that answers."""

    version: str = "2"


class CohereUnits(Struct, frozen=True, kw_only=True):
    """Tokens run through the model, special tokens included."""

    input_tokens: int


class CohereMeta(Struct, frozen=True, kw_only=True):
    """What the answer cost."""

    api_version: CohereVersion
    billed_units: CohereUnits


class CohereResponse(Struct, frozen=True, kw_only=True):
    """The vectors by type, each in the order of the texts."""

    id: str
    response_type: Literal["embeddings_by_type"]
    embeddings: CohereEmbeddings
    texts: list[str]
    meta: CohereMeta


class OllamaRequest(Struct, frozen=True, kw_only=True):
    """Ollama: `model` may end in `:latest`, as its clients write it."""

    model: Name
    input: Annotated[str | list[str], Meta(description=f"One text, or {_TEXTS}", extra_json_schema=_FORMS_SCHEMA)]
    truncate: Annotated[
        bool | None,
        Meta(description="false: an input longer than the model reads is refused. Null: as the model has it."),
    ] = None
    keep_alive: Annotated[
        KeepAlive | None, Meta(description="Seconds, a duration, 0 or any negative number.", examples=["5m", -1])
    ] = None
    dimensions: Width | None = None


class OllamaResponse(Struct, frozen=True, kw_only=True):
    """The vectors in input order. Durations are nanoseconds."""

    model: str
    embeddings: list[list[float]]
    total_duration: int
    load_duration: int
    prompt_eval_count: int


class OllamaDetails(Struct, frozen=True, kw_only=True):
    """What Ollama's clients show of a model."""

    quantization_level: str
    parent_model: str = ""
    format: str = "safetensors"
    family: str = ""
    families: tuple[str, ...] = ()
    parameter_size: str = ""


class OllamaModel(Struct, frozen=True, kw_only=True):
    """A model that may be served. `size` is bytes in memory, 0 if unknown; `digest` is the revision of its files."""

    name: str
    model: str
    modified_at: str
    size: int
    digest: str
    details: OllamaDetails


class OllamaModels(Struct, frozen=True, kw_only=True):
    """All of them."""

    models: list[OllamaModel]


class OllamaRunning(Struct, frozen=True, kw_only=True):
    """A model in memory. `expires_at` is null when idleness never sends it away."""

    name: str
    model: str
    size: int
    size_vram: int
    digest: str
    details: OllamaDetails
    expires_at: str | None
    context_length: int


class OllamaProcesses(Struct, frozen=True, kw_only=True):
    """All that are in memory, on any device."""

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
