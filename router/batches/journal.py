"""`BatchJournal`: writes the results of one lease of a batch, so that a death loses no line and repeats none.

1. the results are appended to the segments of this lease, and synced;
2. one transaction journals how many bytes of them count, and up to which line.

A crash between the two leaves bytes behind the journaled ones, which nobody reads: the next lease has segments of its
own and begins at the journaled line. The output is written to a file of this lease, too, and the transaction that ends
the batch names it: a server that was suspended and has lost its lease has no file to spoil. Blocking: call it on a
thread, one call at a time.
"""

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import BinaryIO

import msgspec
from msgspec import Struct, structs

from router.batches.folder import KINDS, DataFolder, Kind
from router.batches.leases import LeaseLost, Leases
from router.batches.parts import LineAnswer
from router.batches.records import BatchRecord, FileRecord, Segment
from router.schemas.batches import BatchError, BatchStatus

_COLUMNS: Mapping[Kind, str] = {"output": "output_file_id", "errors": "error_file_id"}


class LineResult(Struct, frozen=True):
    """The result of one line.

    Attributes:
        number: of the line.
        end: offset of the next line in the input file.
        text: one line of the output file or the error file.
        is_completed: whether it belongs into the output file.
    """

    number: int
    end: int
    text: bytes
    is_completed: bool


class BatchJournal:
    """Holds the progress of one lease.

    Attributes:
        batch: with the progress that is journaled.
    """

    def __init__(self, folder: DataFolder, leases: Leases, batch: BatchRecord) -> None:
        self.batch = batch
        self._folder = folder
        self._leases = leases
        self._segment = Segment(epoch=batch.epoch, output_bytes=0, error_bytes=0)
        self._open = ExitStack()
        self._opened: dict[Kind, BinaryIO] = {}
        self._is_broken = False

    def append(self, results: Sequence[LineResult]) -> None:
        """Write and journal the results of the next lines, in their order.

        Raises:
            LeaseLost: another server has taken the batch over; nothing was journaled.
            OSError: the disk is full, or an earlier call has failed, behind whose bytes nothing may be written.
        """
        if self._is_broken:
            raise OSError("an earlier write of this lease has failed")
        output = b"".join(result.text for result in results if result.is_completed)
        errors = b"".join(result.text for result in results if not result.is_completed)
        completed = sum(result.is_completed for result in results)
        self._is_broken = True
        self._write("output", output)
        self._write("errors", errors)
        segment = Segment(
            epoch=self.batch.epoch,
            output_bytes=self._segment.output_bytes + len(output),
            error_bytes=self._segment.error_bytes + len(errors),
        )
        batch = structs.replace(
            self.batch,
            input_offset=results[-1].end,
            next_line=results[-1].number + 1,
            completed=self.batch.completed + completed,
            failed=self.batch.failed + len(results) - completed,
        )
        self._leases.advance(batch, segment)
        self.batch, self._segment, self._is_broken = batch, segment, False

    def finish(self, status: BatchStatus, expires_at: float, errors: Sequence[BatchError] = ()) -> None:
        """Publish the output and the errors of all leases, and end the batch. Can be repeated after a crash.

        Args:
            status: how the batch ends.
            expires_at: of the files.
            errors: why it failed as a whole.

        Raises:
            LeaseLost: nothing was published.
        """
        batch = self.batch
        segments = self._leases.segments(batch.id)
        files: dict[str, FileRecord] = {}
        for kind in KINDS:
            sizes = [_size(segment, kind) for segment in segments]
            if not any(sizes):
                continue
            paths = [self._folder.segment(batch.id, segment.epoch, kind) for segment in segments]
            file_id = result_id(batch.id, batch.epoch, kind)
            self._folder.join(list(zip(paths, sizes, strict=True)), file_id, f"{batch.id}.{batch.epoch}.{kind}")
            files[_COLUMNS[kind]] = FileRecord(
                id=file_id,
                owner=batch.owner,
                purpose="batch_output",
                filename=f"{batch.id}_{kind}.jsonl",
                bytes=sum(sizes),
                created_at=self._leases.now(),
                expires_at=expires_at,
            )
        try:
            self._leases.finish(batch, status, files, errors)
        except LeaseLost:
            self._folder.delete_files([record.id for record in files.values()])
            raise
        epochs = [segment.epoch for segment in segments]
        self._folder.delete_segments(batch.id, epochs)
        # of leases whose server died just before its transaction
        self._folder.delete_files(
            [result_id(batch.id, epoch, kind) for epoch in epochs if epoch != batch.epoch for kind in KINDS]
        )

    def close(self) -> None:
        """Close the segments."""
        self._open.close()

    def _write(self, kind: Kind, data: bytes) -> None:
        if not data:
            return
        if kind not in self._opened:
            file = self._folder.open_segment(self.batch.id, self.batch.epoch, kind)
            self._opened[kind] = self._open.enter_context(file)
        self._folder.append(self._opened[kind], data)


def _size(segment: Segment, kind: Kind) -> int:
    return segment.output_bytes if kind == "output" else segment.error_bytes


def result_id(batch_id: str, epoch: int, kind: Kind) -> str:
    """Return the id of the output or error file that one lease of a batch publishes."""
    return "file-" + hashlib.blake2b(f"{batch_id}/{epoch}/{kind}".encode(), digest_size=16).hexdigest()


def line_id(batch_id: str, number: int) -> str:
    """Return the id of one line's request, which is the same in each run: `batch_req_` and 32 hexadecimal digits."""
    return "batch_req_" + hashlib.blake2b(f"{batch_id}/{number}".encode(), digest_size=16).hexdigest()


def encode_response(request_id: str, custom_id: str, answer: LineAnswer) -> bytes:
    """Encode the line of a request that was answered."""
    head = msgspec.json.encode({"id": request_id, "custom_id": custom_id})[:-1]
    response = b',"response":{"status_code":%d,"request_id":"%s",' % (answer.status, request_id.encode())
    headers = b'"headers":%s,' % msgspec.json.encode(answer.headers) if answer.headers else b""
    return b"".join((head, response, headers, b'"body":', answer.body, b'},"error":null}\n'))


def encode_failure(request_id: str, custom_id: str | None, code: str, message: str) -> bytes:
    """Encode the line of a request that was never sent."""
    error = {"code": code, "message": message}
    return msgspec.json.encode({"id": request_id, "custom_id": custom_id, "response": None, "error": error}) + b"\n"
