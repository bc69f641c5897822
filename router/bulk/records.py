"""The records that readers, embedders and writers of a bulk job exchange."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from engines.spec import Output, Truncate
from router.quantization import Matrix
from router.schemas.inference import OutputDtype


class BulkError(Exception):
    """The job cannot run as it was asked for; the message has the remedy."""


class BulkStopped(Exception):
    """The job stopped before its end, for a cause outside of it. The same command continues it."""


class Cursor(Struct, frozen=True):
    """A place between two records of the input.

    Args:
        source: the index of the file.
        offset: bytes of it that were read; rows in Parquet.
        number: records read so far of all files.
        checksum: CRC-32 of the bytes read from standard input.
    """

    source: int = 0
    offset: int = 0
    number: int = 0
    checksum: int = 0


class Refusal(Struct, frozen=True):
    """Why a record has no vector: a code of the HTTP contract, and a message."""

    code: str
    message: str


class Record(Struct, frozen=True):
    """One record of the input.

    Args:
        number: counted from 1 over all files.
        id: of the id column; the number without one.
        text: not empty, unless there is a `refusal`.
        kept: the columns that the output keeps.
        after: the place behind it.
    """

    number: int
    id: str | int
    text: str
    after: Cursor
    kept: Mapping[str, Any] = {}
    refusal: Refusal | None = None


class EmbedOptions(Struct, frozen=True, kw_only=True):
    """What is asked of the model for every text, as the fields of `POST /v1/embeddings` of these names."""

    outputs: tuple[Output, ...] = ("dense",)
    dimensions: int | None = None
    dtype: OutputDtype = "float"
    input_type: str | None = None
    prompt: str | None = None
    truncate: Truncate | None = None


class Vectors(Struct, frozen=True, kw_only=True):
    """The outputs of some texts, in their order; None is what was not asked for.

    Args:
        dense: `[n, width]`.
        sparse: entries of the vocabulary, int32 `[k]`, rising, and their weights, float32 `[k]`, of each text.
        tokens: the vectors of the tokens of each text, `[m, width]`.
    """

    dense: Matrix | None = None
    sparse: Sequence[tuple[NDArray[np.int32], NDArray[np.float32]]] | None = None
    tokens: Sequence[Matrix] | None = None


class WindowAnswer(Struct, frozen=True, kw_only=True):
    """The outcome of some texts: `vectors` has those that are not in `refusals`, which are by index."""

    vectors: Vectors
    refusals: Mapping[int, Refusal] = {}
    num_tokens: int = 0


class VectorWidths(Struct, frozen=True):
    """The numbers in a dense vector and in the vector of a token; 0 for what was not asked for."""

    dense: int = 0
    tokens: int = 0
