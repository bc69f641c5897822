"""OpenAI's Files API: the input files of batches, and their results. Each key sees its own files only."""

from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from litestar import Controller, Request, delete, get, post
from litestar.exceptions import InternalServerException
from litestar.openapi import ResponseSpec
from litestar.params import FromPath, QueryParameter
from litestar.response import Stream

from router.api.batch_service import batches_of
from router.api.openapi import BEARER, GUARDED, failures
from router.auth.guards import key_of, owner_of, requires
from router.batches.records import Page
from router.errors import ClientLeft
from router.schemas.batches import DeletedFile, FileList, FileObject, Purpose

_MAX_LIMIT = 10_000
_MAX_PAGE = 1000
"""More files are on further pages, also if the client asks for OpenAI's 10,000: they are encoded on the event loop."""
STORED = (*GUARDED, "not_found", "storage_unavailable")
"""Error codes of every route for files and batches."""
_CONTENT = ResponseSpec(
    bytes, media_type="application/octet-stream", generate_examples=False, description="The bytes of the file"
)

FileId = FromPath[str]
After = Annotated[str | None, QueryParameter(description="The id behind which the page begins.", max_length=64)]
Limit = Annotated[int, QueryParameter(description="The most entries of the page.", ge=1, le=_MAX_LIMIT)]
Order = Annotated[Literal["asc", "desc"], QueryParameter(description="By time of creation.")]


class FilesController(Controller):
    """OpenAI's Files API."""

    path = "/v1/files"
    tags = ("batches",)
    guards = (requires("batch"),)
    security = BEARER

    @post(
        status_code=200,
        request_max_body_size=None,  # MAX_FILE_BYTES is checked as the bytes arrive
        responses=failures(*STORED, "invalid_value", "body_too_large", "quota_exceeded", "too_many_requests"),
        summary="Upload a file",
    )
    async def upload_file(self, request: Request[Any, Any, Any]) -> FileObject:
        """Writes the file to disk as it arrives. The purpose is `batch`, the file JSONL."""
        record = await batches_of(request).upload(
            owner_of(key_of(request)), request.headers.get("content-type", ""), _chunks(request)
        )
        return record.to_object()

    @get(responses=failures(*STORED), summary="List the files")
    async def list_files(
        self,
        request: Request[Any, Any, Any],
        after: After = None,
        limit: Limit = _MAX_LIMIT,
        order: Order = "desc",
        purpose: Annotated[Purpose | None, QueryParameter(description="Only files of this purpose.")] = None,
    ) -> FileList:
        """Lists the files of the key, uploads and results, newest first."""
        page = Page(limit=min(limit, _MAX_PAGE), after=after, is_ascending=order == "asc")
        records, has_more = await batches_of(request).files(owner_of(key_of(request)), page, purpose)
        data = [record.to_object() for record in records]
        first, last = (data[0].id, data[-1].id) if data else (None, None)
        return FileList(data=data, has_more=has_more, first_id=first, last_id=last)

    @get("/{file_id:str}", responses=failures(*STORED), summary="Show a file")
    async def retrieve_file(self, request: Request[Any, Any, Any], file_id: FileId) -> FileObject:
        """Shows a file of the key."""
        return (await batches_of(request).file(owner_of(key_of(request)), file_id)).to_object()

    @get("/{file_id:str}/content", responses={200: _CONTENT} | failures(*STORED), summary="Download a file")
    async def download_file(self, request: Request[Any, Any, Any], file_id: FileId) -> Stream:
        """Sends the bytes as they come from disk."""
        record, pieces = await batches_of(request).content(owner_of(key_of(request)), file_id)
        headers = {"content-length": str(record.bytes)}
        return Stream(pieces, media_type="application/octet-stream", headers=headers)

    @delete(
        "/{file_id:str}",
        status_code=200,
        responses=failures(*STORED, "file_in_use"),
        summary="Delete a file",
    )
    async def delete_file(self, request: Request[Any, Any, Any], file_id: FileId) -> DeletedFile:
        """Deletes a file of the key; not while a batch reads it."""
        await batches_of(request).delete_file(owner_of(key_of(request)), file_id)
        return DeletedFile(id=file_id)


async def _chunks(request: Request[Any, Any, Any]) -> AsyncIterator[bytes]:
    """Yield the body as it arrives."""
    try:
        async for chunk in request.stream():
            yield chunk
    except InternalServerException:
        raise ClientLeft from None
