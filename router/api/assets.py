"""A page's files as they are sent: packed once, and not again to those who have them. Knows no page."""

import gzip
import re
from collections.abc import Mapping
from hashlib import sha256
from typing import Any

from litestar import Request, Response
from msgspec import Struct

MEDIA_TYPES = {
    ".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml", ".png": "image/png",
}  # fmt: skip
"""By the ending of a file's name."""

_REFUSED = re.compile(r"\bgzip\s*;\s*q=0(\.0*)?\s*(,|$)", re.IGNORECASE)


class Asset(Struct, frozen=True):
    """One file. `packed`: the same in gzip; empty where that would not be smaller.

    `etag` is a weak one, because it stands for both.
    """

    content: bytes
    packed: bytes
    media_type: str
    etag: str

    @classmethod
    def of(cls, content: bytes, suffix: str) -> "Asset":
        """A file by what is in it and how its name ends."""
        packed = gzip.compress(content, mtime=0)
        etag = f'W/"{sha256(content).hexdigest()[:16]}"'
        return cls(content, packed if len(packed) < len(content) else b"", MEDIA_TYPES[suffix], etag)

    def answer(self, request: Request[Any, Any, Any], headers: Mapping[str, str]) -> Response[bytes]:
        """Nothing but its tag to a browser that has it; it is asked each time, so a new server shows a new page."""
        own = {"etag": self.etag, "cache-control": "no-cache", "vary": "accept-encoding", **headers}
        if self.etag in (tag.strip() for tag in request.headers.get("if-none-match", "").split(",")):
            return Response(b"", status_code=304, media_type=self.media_type, headers=own)
        if not self.packed or not _takes_gzip(request.headers.get("accept-encoding", "")):
            return Response(self.content, media_type=self.media_type, headers=own)
        return Response(self.packed, media_type=self.media_type, headers=own | {"content-encoding": "gzip"})


def _takes_gzip(accepted: str) -> bool:
    return "gzip" in accepted.lower() and not _REFUSED.search(accepted)
