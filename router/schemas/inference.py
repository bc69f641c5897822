"""The wire: what clients send and what they get. A leaf: it knows the engines' records and nothing of HTTP.

The OpenAPI document is generated from these Structs, so a description here is a description there.
"""

from typing import Annotated, Literal

from msgspec import Meta, Struct

from engines.spec import Matryoshka, Truncate
from engines.types import State

MAX_INPUTS = 2048


MAX_IDS_OF_TEXT = 2**20
"""Token ids of one text: no model reads more."""


MAX_IDS = 2**23
"""Token ids of one request: LangChain's largest, 1,000 texts of 8,191 ids, is smaller."""


MAX_NAME_CHARS = 1024
"""Of whatever a request names or is called by: models, prompts, hosts, users."""


MAX_QUANTITY_CHARS = 64


MAX_WIDTH = 2**31 - 1


EncodingFormat = Literal["float", "base64"]


OutputDtype = Literal["float", "int8", "uint8", "binary", "ubinary"]


TokenId = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
"""Whether a number is an id of the model is the engine's to say; more than 64 bits do not travel to one."""


Name = Annotated[str, Meta(max_length=MAX_NAME_CHARS)]


KeepAlive = float | Annotated[str, Meta(max_length=MAX_QUANTITY_CHARS)]


Width = Annotated[int, Meta(ge=1, le=MAX_WIDTH)]


Input = str | list[str | TokenId | tuple[TokenId, ...]]
"""msgspec admits one array type in a union, so `router/api/decoding.py` checks that a request holds one kind only."""


class EmbeddingRequest(Struct, frozen=True, kw_only=True):
    """Texts (or token ids) to embed. Unknown fields are ignored, and null means: not given."""

    input: Annotated[
        Input,
        Meta(
            description=f"One text, 1 to {MAX_INPUTS} texts, the token ids of one text, or of 1 to {MAX_INPUTS} texts. "
            "One kind a request; nothing in it may be empty.",
            examples=["The cat sits outside", ["first text", "second text"], [101, 4937, 102]],
        ),
    ]
    model: Annotated[
        Name | None,
        Meta(description="A model id or alias of GET /v1/models; without one, the registry's default model."),
    ] = None
    encoding_format: Annotated[
        EncodingFormat | None,
        Meta(
            description="`float` (default): JSON numbers. `base64`: little-endian bytes, float32 unless `output_dtype`."
        ),
    ] = None
    dimensions: Annotated[
        Width | None,
        Meta(description="Cut vectors to this width and normalise them again, where the model admits it."),
    ] = None
    user: Annotated[Name | None, Meta(description="Accepted for compatibility; not used.")] = None
    input_type: Annotated[
        Name | None,
        Meta(
            description="`query`, `document`, or any prompt name of the model: picks the prompt put in front. "
            "Without it no prompt is added.",
            examples=["query", "document"],
        ),
    ] = None
    instruction: Annotated[
        str | None, Meta(description="The task of an instruct model, put into its query template.")
    ] = None
    prompt: Annotated[
        str | None, Meta(description="Put in front verbatim; excludes `input_type` and `instruction`.")
    ] = None
    truncate: Annotated[
        Truncate | None,
        Meta(
            description="Which end of an input longer than the model reads is cut off (default `end`), or `error`. "
            "The header x-embed-truncated names the inputs that were cut."
        ),
    ] = None
    normalize: Annotated[
        bool | None, Meta(description="false: the vector as the model's own modules leave it. Default true.")
    ] = None
    output_dtype: Annotated[
        OutputDtype | None,
        Meta(
            description="Quantisation as sentence-transformers defines it. `int8` and `uint8` take their ranges from "
            "the model's calibration in the registry; without one from the vectors of this request, of which there "
            "must be two at least."
        ),
    ] = None
    keep_alive: Annotated[
        KeepAlive | None,
        Meta(
            description="How long the model stays without work after this request: seconds, a duration, "
            "0 (leave at once) or -1 (stay until memory is needed).",
            examples=[300, "10m", 0, -1],
        ),
    ] = None


class Embedding(Struct, frozen=True, kw_only=True):
    """One vector: numbers, or base64 of its bytes."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class Usage(Struct, frozen=True, kw_only=True):
    """Tokens run through the model, special tokens included."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingResponse(Struct, frozen=True, kw_only=True):
    """The vectors in input order. `model` is the id of the model that computed them, also when an alias was asked."""

    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: Usage


class ErrorDetail(Struct, frozen=True, kw_only=True):
    """What went wrong: `message` for people, `code` for programs, `param` names the request field."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorEnvelope(Struct, frozen=True, kw_only=True):
    """Every failure, whatever its cause, looks like this."""

    error: ErrorDetail


class Model(Struct, frozen=True, kw_only=True):
    """OpenAI's model object, and beside it what this server knows. Null: not known before the model was loaded."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    state: State
    source: str
    aliases: tuple[str, ...]
    dimensions: int | None = None
    matryoshka: Matryoshka | None = None
    max_tokens: int | None = None
    prompts: dict[str, str] = {}
    dtype: str = "auto"
    device: str = "auto"
    memory_bytes: int = 0
    revision: str | None = None
    trust_remote_code: bool = False


class ModelList(Struct, frozen=True, kw_only=True):
    """The models that may be served, in memory or not."""

    object: Literal["list"] = "list"
    data: list[Model]
