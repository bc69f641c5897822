"""Serves static files: compressed once, and not sent again to a browser that has them cached."""

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
"""Media types by file suffix."""

_GZIP_REFUSED = re.compile(r"\bgzip\s*;\s*q=0(\.0*)?\s*(,|$)", re.IGNORECASE)


class Asset(Struct, frozen=True):
    """One file, plain and compressed.

    Attributes:
        compressed: the content in gzip; empty if that would not be smaller.
        etag: weak, because it identifies both encodings.
    """

    content: bytes
    compressed: bytes
    media_type: str
    etag: str

    @classmethod
    def of(cls, content: bytes, suffix: str) -> "Asset":
        """Build the asset of a file's content and suffix."""
        compressed = gzip.compress(content, mtime=0)
        etag = f'W/"{sha256(content).hexdigest()[:16]}"'
        return cls(content, compressed if len(compressed) < len(content) else b"", MEDIA_TYPES[suffix], etag)

    def answer(self, request: Request[Any, Any, Any], headers: Mapping[str, str]) -> Response[bytes]:
        """Answer 304 if the browser has this version. Browsers ask each time, so a new server's page shows at once."""
        all_headers = {"etag": self.etag, "cache-control": "no-cache", "vary": "accept-encoding", **headers}
        if self.etag in (tag.strip() for tag in request.headers.get("if-none-match", "").split(",")):
            return Response(b"", status_code=304, media_type=self.media_type, headers=all_headers)
        if not self.compressed or not _accepts_gzip(request.headers.get("accept-encoding", "")):
            return Response(self.content, media_type=self.media_type, headers=all_headers)
        return Response(self.compressed, media_type=self.media_type, headers=all_headers | {"content-encoding": "gzip"})


def _accepts_gzip(accepted: str) -> bool:
    return "gzip" in accepted.lower() and not _GZIP_REFUSED.search(accepted)
