"""Requests and responses with outputs beside dense vectors: weights of vocabulary entries, and vectors of tokens.

Entries of a vocabulary are called terms here, the vectors of a text's tokens multi-vectors.
"""

from typing import Annotated, Literal

from msgspec import Meta, Struct

from router.schemas.inference import INPUT_FORMS, MAX_INPUTS, Input, Name


class SparseEmbedding(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The terms of one text: ids of vocabulary entries, which rise, and as many weights.

    `tokens`: the entries as the vocabulary writes them (`##ing`, `▁the`), if the request has `return_tokens`.
    """

    indices: list[int]
    values: list[float]
    tokens: list[str] | None = None


class EncodedVectors(Struct, frozen=True, kw_only=True):
    """An array as base64 of its little-endian bytes, row after row; `shape` counts its rows and the numbers in a row.

    The numbers are float32, or those of `output_dtype`: int8 and binary are signed bytes, uint8 and ubinary unsigned.
    """

    shape: tuple[int, int]
    data: str


class TextOutputs(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The outputs of one text, if they are not only dense, each only if it was asked for.

    `multi_vector_embedding`: a vector for each token, as numbers; with `encoding_format` `base64` the array as base64.
    """

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str | None = None
    sparse_embedding: SparseEmbedding | None = None
    multi_vector_embedding: list[list[float]] | EncodedVectors | None = None


class TeiOutputsRequest(Struct, frozen=True, kw_only=True):
    """The request of text-embeddings-inference (TEI) for sparse outputs, or for the vectors of all tokens."""

    inputs: Annotated[
        Input,
        Meta(
            description=f"One text, 1 to {MAX_INPUTS} texts, none empty, or the token ids of one or of several.",
            extra_json_schema={"anyOf": INPUT_FORMS},
            examples=["a text"],
        ),
    ]
    model: Annotated[Name | None, Meta(description="Extension: a model other than the default.")] = None
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


class TeiTerm(Struct, frozen=True, kw_only=True):
    """A vocabulary entry and its weight."""

    index: int
    value: float


WIRE = (TextOutputs, TeiOutputsRequest, TeiTerm)
