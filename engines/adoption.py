"""A snapshot that other tools left in the hub cache: is it all of the model? Decided without the network.

A tool that loads a model with transformers alone brings the weights and leaves modules.json behind: such a snapshot
loads, and pools wrongly. So a snapshot counts as complete only where its list of files is known, or modules.json is
there or known not to exist, or `.gitattributes` shows that the whole repository was downloaded.
"""

from collections.abc import Mapping

from msgspec import Struct

from engines.errors import BadModel
from engines.hub_cache import RepoCache
from engines.part_file import FileEntry
from engines.selection import MODULES, Selection, select

_WHOLE_REPOSITORY = ".gitattributes"


class Found(Struct, frozen=True, kw_only=True):
    """A complete snapshot; its hashes are still to be checked."""

    commit: str
    files: tuple[FileEntry, ...]
    selection: Selection


def find_snapshot(cache: RepoCache, *, with_code: bool) -> Found | None:
    """The snapshot of the revision that the cache knows, when nothing of the model is missing from it."""
    commit = cache.known_commit()
    if commit is None:
        return None
    here = cache.entries(commit)
    names = _all_names(cache, commit, here, with_code=with_code)
    if names is None:
        return None
    try:
        selection = select(names, lambda name: cache.path(commit, name).read_bytes(), source="", with_code=with_code)
        files = tuple(here[name] for name in selection.files)
    except (BadModel, OSError, KeyError):
        return None
    return Found(commit=commit, files=files, selection=selection)


def _all_names(
    cache: RepoCache, commit: str, here: Mapping[str, FileEntry], *, with_code: bool
) -> Mapping[str, object] | None:
    """The names of all files that the repository has, as far as the model is concerned; None when not known."""
    listed = cache.listed(commit)
    if listed is not None:
        return listed
    if _WHOLE_REPOSITORY in here:
        return here
    knows_modules = MODULES in here or cache.is_known_absent(commit, MODULES)
    return here if knows_modules and not with_code else None
