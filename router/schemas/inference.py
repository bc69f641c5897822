"""Requests and responses of OpenAI's API, and the error envelope.

The OpenAPI document is generated from these Structs, including the descriptions.
"""

from typing import Annotated, Literal

from msgspec import Meta, Struct

from engines.space import MAX_SPACE_CHARS
from engines.spec import Matryoshka, Output, Precision, Task, Truncate
from engines.types import ModelShare, State

MAX_INPUTS = 2048

MAX_IDS_OF_TEXT = 2**20
"""Most token ids in one text; no model reads more."""

MAX_IDS = 2**23
"""Most token ids in one request; LangChain's largest, 1,000 texts of 8,191 ids, is smaller."""

MAX_NAME_CHARS = 1024
"""Most characters in a name in a request: models, prompts, hosts, users."""

MAX_QUANTITY_CHARS = 64
MAX_WIDTH = 2**31 - 1
MAX_TOP_K = 2**16
"""Most entries of a sparse output that a request may ask for; no vocabulary in use has five times as many."""
MAX_POOL_FACTOR = 16
EncodingFormat = Literal["float", "base64"]
OutputDtype = Literal["float", "int8", "uint8", "binary", "ubinary"]

ServiceTier = Literal["auto", "default", "flex", "priority"]
"""OpenAI's values; all but `flex` are the ordinary class."""

TokenId = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
"""64 bits, which is what can be sent to an engine; the engine checks whether the model has the id."""

Name = Annotated[str, Meta(max_length=MAX_NAME_CHARS)]
KeepAlive = float | Annotated[str, Meta(max_length=MAX_QUANTITY_CHARS)]
Width = Annotated[int, Meta(ge=1, le=MAX_WIDTH)]

Input = str | list[str | TokenId | tuple[TokenId, ...]]
"""msgspec allows one array type in a union, so `router/api/decoding.py` checks that all items are of one kind."""


_TEXT = {"type": "string", "minLength": 1}
_IDS = {"type": "array", "minItems": 1, "maxItems": MAX_IDS_OF_TEXT, "items": {"type": "integer", "minimum": 0}}
_MANY = {"type": "array", "minItems": 1, "maxItems": MAX_INPUTS}
INPUT_FORMS: list[dict[str, object]] = [_TEXT, _MANY | {"items": _TEXT}, _IDS, _MANY | {"items": _IDS}]
"""The four forms of `Input` as JSON Schemas, for the OpenAPI document."""


class EmbeddingRequest(Struct, frozen=True, kw_only=True):
    """Texts or token ids to embed. Unknown fields are ignored; null means not given."""

    input: Annotated[
        Input,
        Meta(
            description=f"One text, 1 to {MAX_INPUTS} texts, the token ids of one text, or of 1 to {MAX_INPUTS} texts. "
            "All items must be of one kind, and none may be empty.",
            examples=["The cat sits outside", ["first text", "second text"], [101, 4937, 102]],
        ),
    ]
    model: Annotated[
        Name | None,
        Meta(description="A model id or alias from GET /v1/models. Default: the registry's default model."),
    ] = None
    encoding_format: Annotated[
        EncodingFormat | None,
        Meta(
            description="`float` (default): JSON numbers. `base64`: little-endian bytes, float32 unless `output_dtype`."
        ),
    ] = None
    dimensions: Annotated[
        Width | None,
        Meta(description="Truncate vectors to this width and normalize them again, if the model supports it."),
    ] = None
    user: Annotated[Name | None, Meta(description="Accepted for compatibility; not used.")] = None
    input_type: Annotated[
        Name | None,
        Meta(
            description="`query`, `document` or another prompt name of the model: selects the prompt to prepend. "
            "Default: the model's default prompt, if it has one.",
            examples=["query", "document"],
        ),
    ] = None
    instruction: Annotated[
        str | None, Meta(description="The task for an instruct model, which is inserted into its query template.")
    ] = None
    prompt: Annotated[
        str | None, Meta(description="Text to prepend verbatim; cannot be combined with `input_type` or `instruction`.")
    ] = None
    truncate: Annotated[
        Truncate | None,
        Meta(
            description="The end at which too long inputs are truncated (default `end`), or `error` to refuse them. "
            " The header x-embed-truncated lists the truncated inputs."
        ),
    ] = None
    truncate_prompt_tokens: Annotated[
        Annotated[int, Meta(ge=-1, le=MAX_WIDTH)] | None,
        Meta(
            description="As in vLLM: read at most so many tokens of each input, special tokens included; -1: as many "
            "as the model reads.",
            examples=[256],
        ),
    ] = None
    normalize: Annotated[
        bool | None, Meta(description="false: return vectors as the model's own modules output them. Default true.")
    ] = None
    output_dtype: Annotated[
        OutputDtype | None,
        Meta(
            description="Quantization as sentence-transformers defines it. `int8` and `uint8` use the ranges of "
            "the model's calibration in the registry, or else those of the vectors of this request, which must have at "
            "least two inputs."
        ),
    ] = None
    late_chunking: Annotated[
        bool | None,
        Meta(
            description="true: all of `input` is one document, in pieces, which are joined as they are. Each gets a "
            "vector in the context of the whole. For models that pool by the mean."
        ),
    ] = None
    keep_alive: Annotated[
        KeepAlive | None,
        Meta(
            description="How long the model stays in memory when idle after this request: seconds, a duration, "
            "0 (unload at once) or -1 (stay until memory is needed).",
            examples=[300, "10m", 0, -1],
        ),
    ] = None
    expect_space: Annotated[
        Annotated[str, Meta(max_length=MAX_SPACE_CHARS)] | None,
        Meta(
            description="The `x-embedding-space` of the index that the vectors are for: refused with 409 if they would "
            "lie in another space.",
            examples=["s1-3f2a77c0b19e-5d41402abc4b2a76"],
        ),
    ] = None
    outputs: Annotated[
        Annotated[list[Output], Meta(min_length=1, max_length=3)] | None,
        Meta(
            description="What to return for each input, from one forward pass. Default: `dense`, or all that a model "
            "without dense vectors has; GET /v1/models lists it.",
            examples=[["dense", "sparse", "multi_vector"]],
        ),
    ] = None
    sparse_top_k: Annotated[
        Annotated[int, Meta(ge=1, le=MAX_TOP_K)] | None,
        Meta(description="Return only so many terms of each input, the heaviest."),
    ] = None
    sparse_min_weight: Annotated[
        Annotated[float, Meta(ge=0, le=1e9)] | None, Meta(description="Leave out terms that weigh less. Default 0.")
    ] = None
    return_tokens: Annotated[
        bool | None, Meta(description="true: sparse outputs have the vocabulary's strings beside its ids.")
    ] = None
    pool_factor: Annotated[
        Annotated[int, Meta(ge=1, le=MAX_POOL_FACTOR)] | None,
        Meta(
            description="Cluster the token vectors of each document to one for so many tokens, as token pooling of "
            "PyLate does. Default 1: all."
        ),
    ] = None
    service_tier: Annotated[
        ServiceTier | None,
        Meta(
            description="`flex`: use only what other requests leave idle; the request may take long. `auto`, `default` "
            "and `priority` are the ordinary class."
        ),
    ] = None


class Embedding(Struct, frozen=True, kw_only=True):
    """One dense vector, as numbers or base64; with other outputs the items are `TextOutputs`."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class Usage(Struct, frozen=True, kw_only=True):
    """Tokens that the model processed, including special tokens."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingResponse(Struct, frozen=True, kw_only=True):
    """The vectors in input order. `model`: the id of the model that computed them, even if an alias was requested."""

    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: Usage


class ErrorDetail(Struct, frozen=True, kw_only=True):
    """One error: `message` for people, `code` for programs, `param`: the request field."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorEnvelope(Struct, frozen=True, kw_only=True):
    """The body of every error response."""

    error: ErrorDetail


AnyOutput = Output | Literal["score", "labels"]
OUTPUTS: dict[Task, tuple[AnyOutput, ...]] = {"embed": (), "rerank": ("score",), "classify": ("labels",)}
"""What the models of each task return; of those that embed, it is known once they are loaded."""


class Model(Struct, frozen=True, kw_only=True):
    """OpenAI's model object, with additional fields. Null: unknown until the model is loaded.

    `outputs`: what it returns; `labels`: the names of a classifier's labels. Both are empty while unknown.
    `model_type`, `model_ability`: in Xinference's words, which its client asks for before it sends texts; a model whose
    task is not known yet counts as one for embeddings.
    `bytes_by_dtype`: of the weights in each dtype that a load may take, where the registry lists several. `shares`: of
    a model that is split, what each host is charged.
    `space`: the spaces of its dense vectors, by the name of the prompt (empty: none) and the width. `output_spaces`:
    those of its other outputs, by output, prompt and side of a search (`query`, `document`: the `input_type`); outputs
    that one request asks for together have one space, and stand joined by `+`.
    `dimensions`: the width of its dense vectors; `vocab_size`: of the vocabulary that its sparse outputs index;
    `vector_width`: of its vectors of tokens. Null without such an output.
    """

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    state: State
    source: str
    aliases: tuple[str, ...]
    task: Task | None = None
    outputs: tuple[AnyOutput, ...] = ()
    model_type: Literal["embedding", "rerank"] | None = None
    model_ability: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    dimensions: int | None = None
    vocab_size: int | None = None
    vector_width: int | None = None
    matryoshka: Matryoshka | None = None
    max_tokens: int | None = None
    prompts: dict[str, str] = {}
    dtype: str = "auto"
    bytes_by_dtype: dict[str, int] = {}
    shares: tuple[ModelShare, ...] = ()
    precision: Precision | None = None
    space: dict[str, dict[str, str]] | None = None
    output_spaces: dict[str, dict[str, dict[str, str]]] | None = None
    device: str = "auto"
    memory_bytes: int = 0
    revision: str | None = None
    trust_remote_code: bool = False
    adapter: str | None = None


class ModelList(Struct, frozen=True, kw_only=True):
    """The models that may be served, in memory or not."""

    object: Literal["list"] = "list"
    data: list[Model]
