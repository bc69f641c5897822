"""What a hub says is in a repository: names, sizes and hashes at one commit, checked before anything trusts them."""

import re
from collections.abc import Mapping

from huggingface_hub.hf_api import ModelInfo
from msgspec import Struct

from engines.part_file import FileEntry
from engines.selection import is_safe

_COMMIT = re.compile("[0-9a-f]{40}")
_ETAG = re.compile("[0-9a-f]{40}|[0-9a-f]{64}")


class Listing(Struct, frozen=True, kw_only=True):
    """Everything in a repository at one commit."""

    repo_id: str
    commit: str
    files: Mapping[str, FileEntry]


def read_listing(repo_id: str, info: ModelInfo) -> Listing:
    """Our form of the hub's answer. Commits, etags and names become parts of paths, so nothing odd gets through.

    Raises:
        ValueError: no commit, no files, or a file without size or hash.
    """
    files = {}
    for sibling in info.siblings or ():
        etag = sibling.lfs.sha256 if sibling.lfs else sibling.blob_id
        if sibling.size is None or etag is None or not _ETAG.fullmatch(etag):
            raise ValueError(f"{sibling.rfilename} of {repo_id} is listed without size and hash")
        if is_safe(sibling.rfilename):
            files[sibling.rfilename] = FileEntry(name=sibling.rfilename, size_bytes=sibling.size, etag=etag)
    if not files or not info.sha or not _COMMIT.fullmatch(info.sha):
        raise ValueError(f"{repo_id} is listed without commit or files")
    return Listing(repo_id=repo_id, commit=info.sha, files=files)
