"""`Upload`: parses a multipart body as it arrives, and writes its file to disk. Blocking: call it on a thread."""

import os
import re
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from msgspec import Struct
from multipart import MultipartError, MultipartSegment, PushMultipartParser, parse_options_header

from engines.errors import InvalidValue
from router.batches.records import Room
from router.errors import FileTooLarge

_MAX_FIELD_BYTES = 1024
_MAX_PARTS = 8
_MAX_FILENAME_CHARS = 255
_MIN_EXPIRY_S, _MAX_EXPIRY_S = 3600, 30 * 86400
_BOUNDARY = re.compile(r"[0-9A-Za-z'()+_,./:=? -]{1,70}", re.ASCII)
_NOT_MULTIPART = "Content-Type must be multipart/form-data with a boundary, a field purpose and a file"


class UploadedFile(Struct, frozen=True, kw_only=True):
    """A file that has arrived. `expires_after_s`: as the client asks; None: as long as the server keeps files."""

    filename: str
    num_bytes: int
    expires_after_s: int | None


class Upload:
    """One upload.

    Args:
        content_type: the header.
        path: to write to.
        room: for the file.
    """

    def __init__(self, content_type: str, path: Path, room: Room) -> None:
        kind, options = parse_options_header(content_type)
        boundary = options.get("boundary", "")
        if kind != "multipart/form-data" or not _BOUNDARY.fullmatch(boundary):
            raise InvalidValue(_NOT_MULTIPART)
        self._parser = PushMultipartParser(boundary, max_segment_count=_MAX_PARTS)
        self._path = path
        self._room = room
        self._file: BinaryIO | None = None
        self._segment: MultipartSegment | None = None
        self._fields: dict[str, bytearray] = {}
        self._filename = ""
        self._num_bytes = 0

    def write(self, chunk: bytes) -> None:
        """Parse the next bytes of the body.

        Raises:
            InvalidValue: the body is not valid.
            FileTooLarge.
        """
        try:
            for event in self._parser.parse(chunk):
                if isinstance(event, MultipartSegment):
                    self._begin(event)
                elif event is None:
                    self._segment = None
                else:
                    self._add(event)
        except MultipartError as error:
            raise InvalidValue(f"Invalid multipart body: {error}") from None

    def finish(self) -> UploadedFile:
        """Check that the body is complete, and sync the file.

        Raises:
            InvalidValue: a part is missing, or wrong.
        """
        try:
            self._parser.close()
        except MultipartError as error:
            raise InvalidValue(f"Invalid multipart body: {error}") from None
        if self._file is None:
            raise InvalidValue("The field file is missing: send the JSONL file", param="file")
        self._check_purpose()
        expires_after_s = self._expiry()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return UploadedFile(filename=self._filename, num_bytes=self._num_bytes, expires_after_s=expires_after_s)

    def abandon(self) -> None:
        """Close and delete what was written. Idempotent."""
        if self._file is not None:
            self._file.close()
        self._path.unlink(missing_ok=True)

    def _begin(self, segment: MultipartSegment) -> None:
        self._segment = segment
        if segment.name != "file":
            self._fields[segment.name or ""] = bytearray()
            return
        if self._file is not None:
            raise InvalidValue("The field file comes twice: upload one file per request", param="file")
        if "purpose" in self._fields:
            self._check_purpose()  # before the file arrives, if the client sends it first as OpenAI's do
        self._filename = clean_filename(segment.filename or "")
        self._file = self._path.open("xb")

    def _add(self, data: bytes | bytearray) -> None:
        assert self._segment is not None, "the parser reports data within a part only"
        if self._segment.name == "file":
            assert self._file is not None, "opened when the part began"
            self._num_bytes += len(data)
            if self._num_bytes > self._room.num_bytes:
                remedy = "split it" if self._room.setting == "MAX_FILE_BYTES" else "delete files"
                raise FileTooLarge(
                    f"File too large: more than {self._room.num_bytes} bytes ({self._room.setting}); {remedy}"
                )
            self._file.write(data)
            return
        field = self._fields[self._segment.name or ""]
        field += data
        if len(field) > _MAX_FIELD_BYTES:
            raise InvalidValue(
                f"A form field has more than {_MAX_FIELD_BYTES} bytes: shorten it", param=self._segment.name
            )

    def _check_purpose(self) -> None:
        purpose = self._fields.get("purpose")
        if purpose is None:
            raise InvalidValue("The field purpose is missing: send purpose=batch", param="purpose")
        if purpose != b"batch":
            shown = purpose[:40].decode(errors="replace")
            raise InvalidValue(
                f"purpose {shown!r} is not supported: this server stores files for batch", param="purpose"
            )

    def _expiry(self) -> int | None:
        """Return `expires_after[seconds]`."""
        given = self._fields.get("expires_after[seconds]")
        if given is None:
            return None
        if not given.isdigit() or not _MIN_EXPIRY_S <= int(given) <= _MAX_EXPIRY_S:
            raise InvalidValue(
                f"expires_after[seconds] must be a whole number from {_MIN_EXPIRY_S} to {_MAX_EXPIRY_S}",
                param="expires_after[seconds]",
            )
        return int(given)


def clean_filename(given: str) -> str:
    """Return the last part of a path, printable and short: it is shown, and never names a file here."""
    name = PurePosixPath(given.replace("\\", "/")).name
    return "".join(char for char in name if char.isprintable())[:_MAX_FILENAME_CHARS] or "file.jsonl"
