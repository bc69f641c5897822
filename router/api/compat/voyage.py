"""Voyage AI's `POST /v1/contextualizedembeddings`: vectors of pieces in the context of their documents."""

import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

from litestar import Controller, Request
from litestar.params import JSONBody
from litestar.response.base import ASGIResponse

from engines.errors import InvalidRequest
from router.api.encoding import EncodedAnswer, OutputFormat, encode_documents
from router.api.inference import InferenceRoute, embed, rename_error_params
from router.errors import EmptyInput, TooManyInputs
from router.schemas.compat import ContextualizedRequest, ContextualizedResponse
from router.schemas.inference import MAX_INPUTS, EmbeddingRequest

_PIECE = re.compile(r"\binputs?\[(\d+)\]")


class VoyageController(Controller):
    """The part of Voyage's API that OpenAI's does not have."""

    tags = ("skins",)

    @InferenceRoute(
        "/v1/contextualizedembeddings",
        summary="Embed pieces of documents in their context (Voyage)",
        returns=ContextualizedResponse,
        description="A list of vectors for each document, in input order",
    )
    async def contextualized_embeddings(
        self, request: Request[Any, Any, Any], data: JSONBody[ContextualizedRequest]
    ) -> ASGIResponse:
        """Reads each document once, and pools its pieces (late chunking)."""
        pieces = _count_pieces(data.inputs)
        wanted = EmbeddingRequest(
            input=[piece for document in data.inputs for piece in document],
            model=data.model,
            dimensions=data.output_dimension,
            input_type=data.input_type,
            output_dtype=data.output_dtype,
        )
        names = {"input": "inputs", "late_chunking": "model", "dimensions": "output_dimension"}
        with _places_in_documents(pieces), rename_error_params(**names):
            answer = await embed(request, wanted, pieces)
            output = OutputFormat(
                encoding=data.encoding_format or "float",
                dtype=data.output_dtype or "float",
                calibration=answer.calibration,
            )
            body = await encode_documents(answer.embeddings, pieces, answer.model_id, output)
        return EncodedAnswer(body, answer.headers)


def _count_pieces(documents: Sequence[Sequence[str]]) -> tuple[int, ...]:
    """Return how many pieces each document has.

    Raises:
        EmptyInput: there is no document, or one without pieces.
        TooManyInputs.
    """
    if not documents:
        raise EmptyInput("inputs is empty: send at least one document", param="inputs")
    pieces = tuple(map(len, documents))
    if 0 in pieces:
        raise EmptyInput(f"inputs[{pieces.index(0)}] is empty", param="inputs")
    if sum(pieces) > MAX_INPUTS:
        raise TooManyInputs(
            f"inputs has {sum(pieces)} pieces (maximum {MAX_INPUTS} per request); split the request", param="inputs"
        )
    return pieces


@contextmanager
def _places_in_documents(pieces: Sequence[int]) -> Iterator[None]:
    """Name pieces in errors raised inside the block by document and place: `inputs[2][0]`."""
    starts = [0, *accumulate(pieces)]

    def place(found: re.Match[str]) -> str:
        index = int(found[1])
        document = min(bisect_right(starts, index), len(pieces)) - 1
        return f"inputs[{document}][{index - starts[document]}]"

    try:
        yield
    except InvalidRequest as error:
        error.args = (_PIECE.sub(place, str(error)),)
        raise
