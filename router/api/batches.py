"""OpenAI's Batch API: jobs over the lines of a file, which run when the server has time."""

from typing import Annotated, Any

from litestar import Controller, Request, get, post
from litestar.params import FromPath, JSONBody, QueryParameter

from router.api.batch_service import batches_of
from router.api.decoding import StrictRequest
from router.api.files import STORED, After
from router.api.openapi import BEARER, BODY, failures
from router.auth.guards import key_of, owner_of, requires
from router.batches.records import Page
from router.schemas.batches import BatchList, BatchObject, CreateBatchRequest

_MAX_PAGE = 100
_DEFAULT_PAGE = 20

Limit = Annotated[int, QueryParameter(description="The most entries of the page.", ge=1, le=_MAX_PAGE)]


class BatchesController(Controller):
    """OpenAI's Batch API."""

    path = "/v1/batches"
    tags = ("batches",)
    guards = (requires("batch"),)
    security = BEARER

    @post(
        status_code=200,
        request_class=StrictRequest,
        responses=failures(*STORED, *BODY, "quota_exceeded"),
        summary="Create a batch",
    )
    async def create_batch(self, request: Request[Any, Any, Any], data: JSONBody[CreateBatchRequest]) -> BatchObject:
        """Runs every line of the input file against the endpoint, with this key's models, until the window closes."""
        return (await batches_of(request).create_batch(owner_of(key_of(request)), data)).to_object()

    @get(responses=failures(*STORED), summary="List the batches")
    async def list_batches(
        self, request: Request[Any, Any, Any], after: After = None, limit: Limit = _DEFAULT_PAGE
    ) -> BatchList:
        """Lists the batches of the key, newest first."""
        records, has_more = await batches_of(request).batches(owner_of(key_of(request)), Page(limit=limit, after=after))
        data = [record.to_object() for record in records]
        first, last = (data[0].id, data[-1].id) if data else (None, None)
        return BatchList(data=data, has_more=has_more, first_id=first, last_id=last)

    @get("/{batch_id:str}", responses=failures(*STORED), summary="Show a batch")
    async def retrieve_batch(self, request: Request[Any, Any, Any], batch_id: FromPath[str]) -> BatchObject:
        """Shows how far a batch of the key is."""
        return (await batches_of(request).batch(owner_of(key_of(request)), batch_id)).to_object()

    @post(
        "/{batch_id:str}/cancel",
        status_code=200,
        responses=failures(*STORED, "batch_finished"),
        summary="Cancel a batch",
    )
    async def cancel_batch(self, request: Request[Any, Any, Any], batch_id: FromPath[str]) -> BatchObject:
        """Stops a batch within a second; the lines that are done stay in its files."""
        return (await batches_of(request).cancel(owner_of(key_of(request)), batch_id)).to_object()
