"""Requests and responses of Ollama's API. Responses have the fields that its clients read."""

from typing import Annotated

from msgspec import Meta, Struct

from router.schemas.inference import MAX_INPUTS, KeepAlive, Name, Width

_FORMS_SCHEMA = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "maxItems": MAX_INPUTS, "items": {"type": "string", "minLength": 1}},
        {"type": "null"},
    ]
}
_KEEP_ALIVE = Annotated[
    KeepAlive | None,
    Meta(
        description="Seconds, a duration, 0 (unload at once), or a negative number (never unload when idle).",
        examples=["5m", -1],
    ),
]


class OllamaRequest(Struct, frozen=True, kw_only=True):
    """Ollama's request. `model` may end in `:latest`, as its clients write it."""

    model: Name
    input: Annotated[
        str | list[str] | None,
        Meta(
            description=f"One text, or up to {MAX_INPUTS} texts, none empty. An empty text, list or null: no vectors.",
            extra_json_schema=_FORMS_SCHEMA,
        ),
    ]
    truncate: Annotated[
        bool | None,
        Meta(description="false: refuse inputs that are longer than the model's limit. Null: the model's default."),
    ] = None
    keep_alive: _KEEP_ALIVE = None
    dimensions: Width | None = None


class OllamaResponse(Struct, frozen=True, kw_only=True):
    """The vectors in input order. Durations are in nanoseconds."""

    model: str
    embeddings: list[list[float]]
    total_duration: int
    load_duration: int
    prompt_eval_count: int


class OllamaPrompt(Struct, frozen=True, kw_only=True):
    """The request of the older route: one text."""

    model: Name
    prompt: Annotated[str, Meta(description="One text. Empty: no vector.", examples=["a text"])]
    keep_alive: _KEEP_ALIVE = None


class OllamaVector(Struct, frozen=True, kw_only=True):
    """The answer of the older route: one vector; empty for an empty text."""

    embedding: list[float]


class OllamaModelName(Struct, frozen=True, kw_only=True):
    """A request about one model, which older clients send as `name`."""

    model: Annotated[Name | None, Meta(examples=["bge-m3"])] = None
    name: Annotated[Name | None, Meta(description="The older name of `model`.")] = None


class OllamaPull(OllamaModelName, frozen=True, kw_only=True):
    """A request to fetch and load a model of the registry."""

    stream: Annotated[bool | None, Meta(description="false: one answer at the end. Default true: a line a step.")] = (
        None
    )


class OllamaProgress(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One step of a pull; the last one is `success`, or has an `error`."""

    status: str = ""
    digest: str = ""
    total: int = 0
    completed: int = 0
    error: str = ""


class OllamaError(Struct, frozen=True, kw_only=True):
    """The body of every error response below /api."""

    error: str


class OllamaVersion(Struct, frozen=True, kw_only=True):
    """The version of Ollama whose API these routes follow."""

    version: str


class OllamaDetails(Struct, frozen=True, kw_only=True):
    """The details of a model that Ollama's clients show."""

    quantization_level: str
    parent_model: str = ""
    format: str = "safetensors"
    family: str = ""
    families: tuple[str, ...] = ()
    parameter_size: str = ""


class OllamaModel(Struct, frozen=True, kw_only=True):
    """A registered model. `size`: bytes in memory, or of its download; 0 if unknown. `digest`: of its files."""

    name: str
    model: str
    modified_at: str
    size: int
    digest: str
    details: OllamaDetails


class OllamaShown(Struct, frozen=True, kw_only=True):
    """What is known of a model. `model_info`: its context length and width, once it has been in memory."""

    details: OllamaDetails
    model_info: dict[str, str | int]
    capabilities: tuple[str, ...]
    modified_at: str
    license: str = ""
    modelfile: str = ""
    parameters: str = ""
    template: str = ""


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
    OllamaRequest, OllamaResponse, OllamaPrompt, OllamaVector, OllamaModelName, OllamaPull, OllamaProgress, OllamaError,
    OllamaVersion, OllamaShown, OllamaModels, OllamaProcesses,
)  # fmt: skip
