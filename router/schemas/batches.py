"""Requests and answers of OpenAI's Files and Batches APIs."""

from typing import Annotated, Literal

from msgspec import Meta, Struct

Endpoint = Literal["/v1/embeddings", "/v1/rerank"]
BatchStatus = Literal[
    "validating", "in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled"
]
Purpose = Literal["batch", "batch_output"]

_MetadataKey = Annotated[str, Meta(min_length=1, max_length=64)]
_MetadataText = Annotated[str, Meta(max_length=512)]
Metadata = Annotated[dict[_MetadataKey, _MetadataText], Meta(max_length=16)]


class FileObject(Struct, kw_only=True):
    """A stored file. Times are Unix seconds."""

    id: str
    bytes: int
    created_at: int
    expires_at: int
    filename: str
    purpose: Purpose
    object: Literal["file"] = "file"
    status: Literal["processed"] = "processed"


class FileList(Struct, kw_only=True):
    """One page of the key's files."""

    data: list[FileObject]
    has_more: bool
    first_id: str | None = None
    last_id: str | None = None
    object: Literal["list"] = "list"


class DeletedFile(Struct, kw_only=True):
    """The answer to a deletion."""

    id: str
    object: Literal["file"] = "file"
    deleted: Literal[True] = True


class CreateBatchRequest(Struct, kw_only=True):
    """A job over the lines of an input file.

    Attributes:
        input_file_id: a file of the same key with the purpose `batch`.
        endpoint: the route that every line calls.
        completion_window: after it the batch expires with what it has done.
        metadata: kept and returned.
    """

    input_file_id: Annotated[str, Meta(min_length=1, max_length=64)]
    endpoint: Endpoint
    completion_window: Annotated[str, Meta(pattern=r"^[1-9][0-9]{0,2}[mhd]\Z")] = "24h"
    metadata: Metadata | None = None


class BatchRequestCounts(Struct, kw_only=True):
    """Lines of a batch: all, answered with 200, and in the error file."""

    total: int = 0
    completed: int = 0
    failed: int = 0


class BatchError(Struct, kw_only=True):
    """Why a batch failed as a whole."""

    code: str
    message: str
    param: str | None = None
    line: int | None = None


class BatchErrors(Struct, kw_only=True):
    """The list of them."""

    data: list[BatchError]
    object: Literal["list"] = "list"


class BatchObject(Struct, kw_only=True):
    """A batch. Times are Unix seconds; those of states that it has not reached are null."""

    id: str
    endpoint: Endpoint
    input_file_id: str
    completion_window: str
    status: BatchStatus
    created_at: int
    expires_at: int
    request_counts: BatchRequestCounts
    object: Literal["batch"] = "batch"
    errors: BatchErrors | None = None
    output_file_id: str | None = None
    error_file_id: str | None = None
    in_progress_at: int | None = None
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None
    metadata: dict[str, str] | None = None


class BatchList(Struct, kw_only=True):
    """One page of the key's batches, newest first."""

    data: list[BatchObject]
    has_more: bool
    first_id: str | None = None
    last_id: str | None = None
    object: Literal["list"] = "list"


WIRE = (FileObject, FileList, DeletedFile, CreateBatchRequest, BatchObject, BatchList)
