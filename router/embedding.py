"""From what a client wants to the engines' answer: the one path that OpenAI's route and every skin share."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import structlog
from litestar import Request
from msgspec import Struct, structs

from engines.errors import InvalidRequest
from engines.records import Embeddings
from engines.spec import Calibration
from router.access import resolve
from router.decode import embed_call
from router.limits import ticket_of
from router.middleware import while_client_stays
from router.quantize import check_ranges
from router.schema import EmbeddingRequest
from router.token_encoding import decode_token_ids
from router.visit import visit_of
from router.yard import Yard

log = structlog.get_logger()


class Answer(Struct, frozen=True):
    """The vectors, the id of the model that computed them, also when an alias was asked, and its calibration."""

    model_id: str
    embeddings: Embeddings
    calibration: Calibration | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens run through the model, special tokens included."""
        return sum(self.embeddings.token_counts)

    @property
    def headers(self) -> dict[str, str]:
        """`Server-Timing` in milliseconds, and the inputs that were cut, if any."""
        spent = self.embeddings.timings
        parts = {"load": spent.load_s, "tokenize": spent.tokenize_s, "queue": spent.queue_s, "forward": spent.forward_s}
        headers = {"server-timing": ", ".join(f"{name};dur={seconds * 1000:.1f}" for name, seconds in parts.items())}
        if self.embeddings.truncated:
            headers["x-embed-truncated"] = ",".join(map(str, self.embeddings.truncated))
        return headers


async def embed(request: Request[Any, Any, Any], yard: Yard, wanted: EmbeddingRequest) -> Answer:
    """Embed as `wanted` says, which for a skin is what its request means in our words.

    A model that is not in memory is loaded first. The work ends when the client leaves.
    """
    spec = resolve(request, yard.registry, wanted.model)
    call = embed_call(wanted, spec.model_id, load_timeout_s=yard.settings.load_timeout_s)
    check_ranges(spec, (wanted.output_dtype,), call.num_items, wanted.normalize)
    if call.token_ids and spec.token_encoding is not None:
        texts = await decode_token_ids(spec.token_encoding, call.token_ids)
        call = structs.replace(call, texts=texts, token_ids=())
    began_s = time.perf_counter()
    async with while_client_stays(request):
        embeddings = await yard.backend.embed(call)
    visit_of(request).embedded(embeddings, began_s)
    await ticket_of(request).charge(sum(embeddings.token_counts))
    if embeddings.truncated:
        log.warning("inputs.truncated", inputs=call.num_items, truncated=len(embeddings.truncated))
    return Answer(spec.model_id, embeddings, spec.calibration)


@contextmanager
def spelt(**names: str) -> Iterator[None]:
    """Inside, a refusal names the request's fields as the skin spells them: `spelt(input="texts")`."""
    try:
        yield
    except InvalidRequest as error:
        error.param = names.get(error.param or "", error.param)
        raise
